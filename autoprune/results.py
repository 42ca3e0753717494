"""What is asked of an evaluation and what comes back: the values that cross from the search to the network and back.

Decides their fields and how they are written as JSON. Knows nothing of torch, Optuna or MLflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

from autoprune.budget import Budget
from autoprune.cost import MACS, CostModel
from autoprune.errors import AutopruneError
from autoprune.objective import ACCURACY, Objective
from autoprune.policy import Group, Policy

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How much of the recipe is run for a policy and on what it is scored.

    `epochs` 0 means compensation and recalibration only. `images` limits the validation images (None: all). With
    `seeds` > 1 the recipe is run once a seed and the scores are averaged. Where `test` is set the test set is scored
    too. Where `scratch` is set the pruned network forgets its weights and is trained from random ones, without repair.
    `calibration` images repair the network (None: those that the data sets aside for calibration).
    """

    rung: str
    epochs: float = 0
    images: int | None = None
    seeds: int = 1
    test: bool = False
    scratch: bool = False
    calibration: int | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything that the search knows about a network: groups, prices, budget, and the criteria that may be chosen.

    `activations` maps `<scope>/<kind>` to the kinds of activation that may stand there, the default first. `objective`
    says what the metric that is maximised is called, for the names that Optuna's dashboard shows.
    """

    groups: tuple[Group, ...]
    cost_model: CostModel
    budget: Budget
    criteria: tuple[str, ...]
    activations: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    objective: Objective = ACCURACY

    @property
    def default_activations(self) -> dict[str, str]:
        """The first choice of every place."""
        return {place: kinds[0] for place, kinds in self.activations.items()}

    @property
    def scopes(self) -> tuple[str, ...]:
        """The criterion scopes, in the order of the groups."""
        return tuple(dict.fromkeys(group.scope for group in self.groups))

    def costs(self, policy: Policy) -> dict[str, int]:
        """Returns every cost of `policy`."""
        return self.cost_model.costs(policy.widths(self.groups))

    def fraction(self, costs: Mapping[str, float]) -> float:
        """Returns the primary one of `costs` as a fraction of the dense network's."""
        primary = self.budget.primary
        return costs[primary] / self.cost_model.cost(primary, {})


@dataclass(frozen=True, slots=True)
class WarmStart:
    """A policy to try before the sampler's own proposals, and where it comes from (`uniform-l2`, `additive`, ...)."""

    policy: Policy
    origin: str


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What the evaluation of one policy at one fidelity found.

    `metrics` holds `val_accuracy` (the value that the search maximises: after everything that the fidelity asked for),
    `val_loss`, and where they were measured `val_accuracy_pruned` (after surgery alone), `val_accuracy_recalibrated`
    (after compensation and recalibration), `val_accuracy_tuned` (after fine-tuning), the same with `test_`,
    `latency_ms` with `latency_spread_ms` and `latency_least_ms`, `latency_predicted_ms` (where there is a latency
    table), `peak_memory_bytes` (of one sample, on CUDA). `costs` holds the names that the cost model prices. `curves`
    holds one list per epoch series. `seconds` tells where the time went. `model_path` is the folder that holds the
    finished model, where it was kept. `notes` are sentences about how it was done, such as why steps ran one by one.
    """

    policy: Policy
    identity: str
    fidelity: Fidelity
    widths: Mapping[str, int]
    costs: Mapping[str, int]
    metrics: Mapping[str, float]
    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    device: str = "cpu"
    seed: int = 0
    model_path: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def val_error(self) -> float:
        """1 - validation accuracy (or an own metric): the first objective, below 0 for a metric above 1."""
        return 1.0 - self.metrics["val_accuracy"]

    @property
    def finite(self) -> bool:
        """Whether the objective is a finite number, as Optuna needs it."""
        return math.isfinite(self.metrics.get("val_accuracy", math.nan))

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain JSON values."""
        return {
            "schema": SCHEMA,
            "policy": self.policy.to_json(),
            "identity": self.identity,
            "fidelity": asdict(self.fidelity),
            "widths": dict(self.widths),
            "costs": dict(self.costs),
            "metrics": dict(self.metrics),
            "curves": {name: list(values) for name, values in self.curves.items()},
            "seconds": dict(self.seconds),
            "device": self.device,
            "seed": self.seed,
            "model_path": self.model_path,
            "notes": list(self.notes),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TrialResult:
        """Reads what `to_json` wrote.

        Raises:
            AutopruneError: The schema is unknown.
        """
        if data.get("schema") != SCHEMA:
            raise AutopruneError(f"result schema {data.get('schema')!r} is unknown; this version reads schema {SCHEMA}")
        return TrialResult(
            policy=Policy.from_json(data["policy"]),
            identity=data["identity"],
            fidelity=Fidelity(**data["fidelity"]),
            widths=data["widths"],
            costs=data["costs"],
            metrics=data["metrics"],
            curves={name: tuple(values) for name, values in data["curves"].items()},
            seconds=data["seconds"],
            device=data["device"],
            seed=data["seed"],
            model_path=data["model_path"],
            notes=tuple(data.get("notes", ())),
        )


def not_faster(
    costs: Mapping[str, float],
    metrics: Mapping[str, float],
    *,
    dense_costs: Mapping[str, float],
    dense_metrics: Mapping[str, float],
) -> bool:
    """Whether a network multiplies less than the dense one, and its measured latency still is not lower beyond spread.

    A disturbed measurement has a wide spread; then the fastest passes are compared too, and one that is 2 % faster
    counts. False where either latency was not measured.
    """
    if "latency_ms" not in metrics or "latency_ms" not in dense_metrics or costs[MACS] >= dense_costs[MACS]:
        return False
    spread = max(metrics.get("latency_spread_ms", 0.0), dense_metrics.get("latency_spread_ms", 0.0))
    least, dense_least = (m.get("latency_least_ms", m["latency_ms"]) for m in (metrics, dense_metrics))
    return metrics["latency_ms"] > dense_metrics["latency_ms"] - spread and least > 0.98 * dense_least


Submit = Callable[[Policy, Fidelity], "Future[TrialResult]"]
"""How the search asks for an evaluation; the future raises `TrialError` where only this trial failed."""
