"""A finished (or interrupted) search as the report sees it.

Decides which points are the front, what the knee is and how the hypervolume is taken. Must not know where the values
come from: whoever composes a search fills these in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from autoprune.cost import COSTS, LATENCY, MACS
from autoprune.objective import ACCURACY, Objective
from autoprune.pareto import SAME, Point, front_indices, hypervolume, knee_index
from autoprune.policy import CHANNEL, UNITS, Policy, caveat
from autoprune.results import TrialResult, not_faster


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One evaluated network.

    `trial` is the number that a person types (`TRIAL=17`); `None` for the dense network and for a control that is no
    trial. `costs` holds the names of `autoprune.cost.COSTS`, and `LATENCY` where there is a latency table. `criterion`
    is readable text. `origin` says who proposed the policy; for a control it is its name (`uniform l2`). Accuracies
    are fractions of 1, or values of a metric of the user's own, of any size.
    """

    trial: int | None
    val_accuracy: float
    costs: Mapping[str, int]
    widths: Mapping[str, int] = field(default_factory=dict)
    test_accuracy: float | None = None
    criterion: str = ""
    origin: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [name for name in COSTS if name not in self.costs]
        if missing:
            raise ValueError(f"a point of the front lacks the costs {', '.join(missing)}")

    @property
    def name(self) -> str:
        """The trial's number, or the origin of what is no trial."""
        return str(self.trial) if self.trial is not None else self.origin


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer before and after: widths are output channels, MACs are for one sample."""

    module: str
    kind: str
    width_before: int
    width_after: int
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int


@dataclass(frozen=True, slots=True)
class SearchView:
    """What is known about a search.

    `trials` are the trials of the rung that is shown, `controls` simple policies, and points trained from scratch,
    under the same recipe. `sizes` are the dense widths of the groups. `primary` is the cost on the front's axis.
    `reference` is the hypervolume's reference point (validation error, fraction of the dense primary cost), as stored
    with the study. `limits` are the budget's upper limits in absolute numbers. `samples` holds the number of samples of
    each split where accuracies are fractions of them, so that their standard errors follow; `seeds` is how many
    trainings an accuracy is the mean of. `notes` are sentences for the end of the report, such as the proxy audit's.
    `pruning` says what a group's width counts: channels, or the non-zeros of a weight. `objective` says what the
    accuracies are, and how they are written.
    """

    name: str
    rung: str
    dense: FrontPoint
    trials: tuple[FrontPoint, ...]
    sizes: Mapping[str, int]
    controls: tuple[FrontPoint, ...] = ()
    primary: str = MACS
    reference: Point = (1.0, 1.0)
    limits: Mapping[str, int] = field(default_factory=dict)
    samples: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pruning: str = CHANNEL
    seeds: int = 1
    objective: Objective = ACCURACY

    def __post_init__(self) -> None:
        if self.primary not in (*COSTS, LATENCY):
            raise ValueError(f"unknown primary cost {self.primary!r}")
        if not self.dense.costs[self.primary] > 0:
            raise ValueError(f"the dense network's {self.primary} is {self.dense.costs[self.primary]}")

    @property
    def unit(self) -> str:
        """What widths count: `channels` or `weights`."""
        return UNITS[self.pruning]

    @property
    def caveat(self) -> str:
        """A sentence about costs that stands in every table and figure; empty where there is none."""
        return caveat(self.pruning)

    @property
    def costs(self) -> tuple[str, ...]:
        """The costs that every point has."""
        return (*COSTS, LATENCY) if LATENCY in self.dense.costs else COSTS

    def no_faster(self, point: FrontPoint) -> bool:
        """Whether a point's MACs fell and its measured latency did not, beyond the spread."""
        dense = self.dense
        return not_faster(point.costs, point.metrics, dense_costs=dense.costs, dense_metrics=dense.metrics)

    def over_limit(self, point: FrontPoint) -> bool:
        """Whether even a point's fastest pass took longer than the limit on latency."""
        limit, measured = self.limits.get(LATENCY), point.metrics.get("latency_least_ms")
        return limit is not None and measured is not None and 1e6 * measured > limit

    def fraction(self, point: FrontPoint, cost: str | None = None) -> float:
        """Returns a cost of `point`, by default the primary one, relative to dense; NaN where dense costs nothing."""
        name = cost or self.primary
        dense = self.dense.costs[name]
        return point.costs[name] / dense if dense else math.nan

    def coordinates(self, point: FrontPoint) -> Point:
        """Returns (validation error, fraction of the dense primary cost); the error is 1 less what is maximised."""
        return 1.0 - point.val_accuracy, self.fraction(point)

    @property
    def front(self) -> tuple[FrontPoint, ...]:
        """The trials that no other trial dominates, in order of rising primary cost."""
        return tuple(self.trials[i] for i in front_indices([self.coordinates(p) for p in self.trials]))

    @property
    def knee(self) -> FrontPoint | None:
        """The front's best point for the money; none where the front has fewer than three points."""
        front = self.front
        if len(front) < 3:
            return None
        index = knee_index([self.coordinates(p) for p in front])
        return None if index is None else front[index]

    @property
    def hypervolume(self) -> float:
        """The area that the trials dominate below the reference point."""
        return hypervolume([self.coordinates(p) for p in self.trials], self.reference)

    @property
    def controls_hypervolume(self) -> float:
        """The area that the controls dominate below the reference point."""
        return hypervolume([self.coordinates(p) for p in self.controls], self.reference)

    def margin(self, point: FrontPoint, split: str = "test") -> tuple[float, str] | None:
        """Returns by how much an accuracy of `point` is uncertain, and what that number is; None where nobody knows.

        The standard deviation over seeds where several were run, else the binomial standard error of a fraction of the
        split's samples. The larger one where both are known.
        """
        accuracy = point.val_accuracy if split == "val" else point.test_accuracy
        count, spread = self.samples.get(split, 0), point.metrics.get(f"{split}_accuracy_spread", math.nan)
        known = []
        if math.isfinite(spread):
            known.append((spread, "standard deviation over seeds"))
        if accuracy is not None and count > 0 and 0.0 <= accuracy <= 1.0:
            known.append(
                (math.sqrt(accuracy * (1.0 - accuracy) / count), f"binomial standard error, {count:,} samples")
            )
        return max(known) if known else None

    def gain(self, control: FrontPoint) -> float | None:
        """Returns by how much the front's best point within the control's cost is more accurate than the control.

        Costs up to 2 % above it count as within: both stand at the same budget, each at the widths next below it.
        """
        most = (1 + SAME) * control.costs[self.primary]
        within = [p.val_accuracy for p in self.front if p.costs[self.primary] <= most]
        return max(within) - control.val_accuracy if within else None


def criterion_text(policy: Policy) -> str:
    """Returns the criteria of `policy`, most frequent first, and the activations that it replaces: `obs`, or
    `obs 7, taylor 2; relu → relu6 in stage1`.
    """
    counts: dict[str, int] = {}
    for choice in policy.choices.values():
        counts[choice.criterion] = counts.get(choice.criterion, 0) + 1
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    text = ordered[0] if len(ordered) == 1 else ", ".join(f"{name} {counts[name]}" for name in ordered)
    places: dict[tuple[str, str], list[str]] = {}
    for place, kind in policy.activations.items():
        scope, _, dense = place.rpartition("/")
        if kind != dense:
            places.setdefault((dense, kind), []).append(scope)
    swaps = [f"{dense} → {kind}{_where(scopes)}" for (dense, kind), scopes in places.items()]
    return "; ".join([text, *swaps])


def _where(scopes: list[str]) -> str:
    return "" if scopes == ["model"] else f" in {', '.join(scopes) if len(scopes) <= 3 else f'{len(scopes)} places'}"


def point_of(result: TrialResult, *, trial: int | None, origin: str = "") -> FrontPoint:
    """Turns an evaluation's result into a point."""
    return FrontPoint(
        trial=trial,
        val_accuracy=result.metrics["val_accuracy"],
        costs=dict(result.costs),
        widths=dict(result.widths),
        test_accuracy=result.metrics.get("test_accuracy"),
        criterion=criterion_text(result.policy),
        origin=origin,
        metrics=dict(result.metrics),
    )
