"""What a pruning group's channels are worth: the error that the tables expect, and the cost that it buys.

Decides how the width that a policy gives a group is judged: by the error added for each percent of the dense network's
cost, one step down and one step up, against the price that the policy pays elsewhere. Arithmetic on error tables and a
cost model; knows nothing of networks, and believes the tables, which add the groups' errors up as if they were
independent.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from autoprune.cost import MEMORY, CostModel
from autoprune.policy import Group, Policy

CHEAP, DEAR, BALANCED, FIXED, FREE = "cheap", "dear", "balanced", "fixed", "free"
_LEAST = 1e-30
TOLERANCE = 1.25
"""A price within this factor of the going price agrees with it: the tables are no more exact than that."""


@dataclass(frozen=True, slots=True)
class ErrorCurve:
    """A group's error by one criterion at some of its widths, ascending; between them it is taken to be straight.

    The error is the part of its consumers' output power that refitting cannot bring back, summed over the consumers.
    """

    widths: tuple[int, ...]
    errors: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.widths or len(self.widths) != len(self.errors):
            raise ValueError(f"an error curve has {len(self.widths)} widths and {len(self.errors)} errors")
        if any(b <= a for a, b in zip(self.widths, self.widths[1:], strict=False)):
            raise ValueError(f"the widths of an error curve must ascend, got {self.widths}")
        if not all(math.isfinite(error) for error in self.errors):
            raise ValueError("an error curve holds an error that is not finite")

    def at(self, width: int) -> float:
        """Returns the error at `width`; beyond the ends of the curve, that of the end."""
        place = bisect_left(self.widths, width)
        if place == len(self.widths):
            return self.errors[-1]
        if place == 0 or self.widths[place] == width:
            return self.errors[place]
        low, high = self.widths[place - 1], self.widths[place]
        part = (width - low) / (high - low)
        return self.errors[place - 1] * (1.0 - part) + self.errors[place] * part

    def scaled(self, factor: float) -> ErrorCurve:
        """Returns the curve with all errors multiplied by `factor`."""
        return ErrorCurve(self.widths, tuple(factor * error for error in self.errors))


Curves = Mapping[str, Mapping[str, ErrorCurve]]
"""Group → criterion → error curve."""


@dataclass(frozen=True, slots=True)
class Step:
    """The next feasible width in one direction.

    `error` is by how much the weighted error changes (down: rises), `cost` by how much the cost changes. `price` is
    the change of the error for each percent of the dense cost; None where the step does not change the cost.
    """

    width: int
    error: float
    cost: int
    price: float | None


@dataclass(frozen=True, slots=True)
class GroupPrice:
    """Why a group has its width.

    `error` is as the table has it; `weight` is how much it matters, which prices take into account.
    `share` is the part of the pruned network's cost in which the group takes part; groups share layers, so shares add
    up to more than one; None for a cost that has no shares. `uniform` is what a uniform policy of the same cost keeps.
    `verdict` is `cheap` (a step down costs less than the going price: it could be narrower), `dear` (a step up brings
    more than the going price: it could use more), `balanced`, `free` (its width does not change the cost), or `fixed`
    (it has one feasible width).
    """

    group: str
    size: int
    width: int
    criterion: str
    error: float
    weight: float
    share: float | None
    down: Step | None
    up: Step | None
    uniform: int
    verdict: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a policy has its widths.

    `error` and `uniform_error` are sums of weighted errors. `price` is the going price: the error for each percent of
    the dense cost at which the fewest groups would want another width; None where no step of any group changes the
    cost.
    """

    cost: str
    dense: int
    total: int
    error: float
    price: float | None
    uniform_total: int
    uniform_error: float
    groups: tuple[GroupPrice, ...]


def explain(
    policy: Policy,
    groups: Sequence[Group],
    model: CostModel,
    curves: Curves,
    *,
    cost: str,
    weights: Mapping[str, float] | None = None,
) -> Explanation:
    """Explains the widths of `policy` by what each group's channels are worth.

    Args:
        policy: What is explained.
        groups: The groups that the search may prune.
        model: Prices widths.
        curves: The error curve of every group by every criterion that the policy names.
        cost: The name of the cost that errors are weighed against.
        weights: How much each group's error matters; None, and for groups that it leaves out: 1.

    Raises:
        PolicyError: The policy does not fit the groups.
        ValueError: A group has no curve by the criterion that the policy names.
    """
    widths = policy.widths(groups)
    raw = {group.name: _curve(curves, group.name, policy.choices[group.name].criterion) for group in groups}
    matters = {group.name: (weights or {}).get(group.name, 1.0) for group in groups}
    chosen = {name: curve.scaled(matters[name]) for name, curve in raw.items()}
    dense, total = model.cost(cost, {}), model.cost(cost, widths)
    uniform = _uniform(groups, model, cost, total)
    steps = {group.name: _steps(group, widths, chosen[group.name], model, cost) for group in groups}
    price = going_price(
        [up.price for _, up in steps.values() if up is not None and up.price is not None],
        [down.price for down, _ in steps.values() if down is not None and down.price is not None],
    )
    rows = []
    for group in groups:
        name, (down, up) = group.name, steps[group.name]
        rows.append(
            GroupPrice(
                group=name,
                size=group.size,
                width=widths[name],
                criterion=policy.choices[name].criterion,
                error=raw[name].at(widths[name]),
                weight=matters[name],
                share=_share(model, cost, name, widths),
                down=down,
                up=up,
                uniform=uniform[name],
                verdict=_verdict(group, down, up, price),
            )
        )
    return Explanation(
        cost=cost,
        dense=dense,
        total=total,
        error=sum(row.weight * row.error for row in rows),
        price=price,
        uniform_total=model.cost(cost, uniform),
        uniform_error=sum(chosen[name].at(width) for name, width in uniform.items()),
        groups=tuple(rows),
    )


def going_price(ups: Sequence[float], downs: Sequence[float]) -> float | None:
    """Returns the price that the least groups disagree with; None without any price.

    A group agrees with every price between that of its step up and that of its step down. The sum over all groups of
    how far (in logarithms) they are from agreeing is least between the middle two of all prices, counted from below by
    the number of steps up.
    """
    prices = sorted(math.log(max(price, _LEAST)) for price in (*ups, *downs))
    if not prices:
        return None
    return math.exp(fmean(prices[max(0, len(ups) - 1) : len(ups) + 1]))


def _curve(curves: Curves, group: str, criterion: str) -> ErrorCurve:
    try:
        return curves[group][criterion]
    except KeyError as error:
        raise ValueError(f"there is no error curve of the group {group!r} by the criterion {criterion!r}") from error


def _share(model: CostModel, cost: str, group: str, widths: Mapping[str, int]) -> float | None:
    """Returns the part of the cost in which a group takes part; None for a cost that has no shares, or is nothing."""
    total = model.cost(cost, widths)
    return None if cost == MEMORY or total <= 0 else model.share(cost, group).cost(cost, widths) / total


def _steps(
    group: Group, widths: Mapping[str, int], curve: ErrorCurve, model: CostModel, cost: str
) -> tuple[Step | None, Step | None]:
    """Returns the steps to the next narrower and the next wider feasible width."""
    place = group.widths.index(widths[group.name])
    before = model.cost(cost, widths)
    percent = model.cost(cost, {}) / 100.0

    def step(width: int) -> Step:
        error = curve.at(width) - curve.at(widths[group.name])
        change = model.cost(cost, {**widths, group.name: width}) - before
        return Step(width, error, change, -error / (change / percent) if change else None)

    down = step(group.widths[place - 1]) if place > 0 else None
    up = step(group.widths[place + 1]) if place + 1 < len(group.widths) else None
    return down, up


def _verdict(group: Group, down: Step | None, up: Step | None, price: float | None) -> str:
    if len(group.widths) == 1:
        return FIXED
    prices = [step.price for step in (down, up) if step is not None]
    if price is None or all(p is None for p in prices):
        return FREE
    if down is not None and down.price is not None and down.price < price / TOLERANCE:
        return CHEAP
    if up is not None and up.price is not None and up.price > price * TOLERANCE:
        return DEAR
    return BALANCED


def _uniform(groups: Sequence[Group], model: CostModel, cost: str, total: int) -> dict[str, int]:
    """Returns the widths of the uniform policy whose cost is nearest to `total`."""

    def widths(ratio: float) -> dict[str, int]:
        return {group.name: group.width(ratio) for group in groups}

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2.0
        if model.cost(cost, widths(middle)) > total:
            low = middle
        else:
            high = middle
    return min((widths(high), widths(low)), key=lambda w: abs(model.cost(cost, w) - total))
