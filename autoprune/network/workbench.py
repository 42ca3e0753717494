"""The workbench: everything that the evaluation of a policy needs, prepared once a study.

Decides the way from a policy to a result: widths, channels, surgery, compensation, recalibration, fine-tuning,
evaluation. It is a plain value that travels to worker processes, and knows neither Optuna nor MLflow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.cost import LATENCY
from autoprune.errors import TrialError
from autoprune.network.artifacts import model_document, save_model
from autoprune.network.calibration import Statistics
from autoprune.network.compensation import compensate
from autoprune.network.criteria import Scores, choose
from autoprune.network.data import Splits
from autoprune.network.evaluation import Loss, Precision, Score, evaluate, recalibrate
from autoprune.network.recipe import History, Recipe, fine_tune
from autoprune.network.sequential import Targets, refit_sequentially
from autoprune.network.surgery import Selection, cut
from autoprune.network.tables import Tables
from autoprune.network.timing import Conditions, measure_latency, measure_peak_memory, one_at_a_time
from autoprune.network.trace import Network
from autoprune.policy import Group, Policy, digest
from autoprune.results import Fidelity, TrialResult

_CURVE_EPOCHS = 2
"""Fine-tuning of at least so many epochs records the validation accuracy after each of them."""


@dataclass(frozen=True)
class Knowledge:
    """What was learnt about the dense network on calibration images: moments, targets, scores, error tables."""

    statistics: Statistics = field(default_factory=dict)
    targets: Targets | None = None
    scores: Mapping[str, Mapping[str, Scores]] = field(default_factory=dict)
    tables: Tables = field(default_factory=dict)


@dataclass(frozen=True)
class Workbench:
    """Evaluates policies for one network, data set and recipe.

    `groups` are the groups that the search may prune; all others stay whole. `origin` says how the dense model is
    built, for the document beside every saved model. `models` is the folder for finished models (None: they are not
    kept). `conditions` are those of measured latency, and `lock` a file that keeps two measurements apart.
    """

    network: Network
    groups: tuple[Group, ...]
    splits: Splits
    recipe: Recipe
    knowledge: Knowledge
    device: str = "cpu"
    precision: Precision = field(default_factory=Precision)
    training_precision: Precision = field(default_factory=Precision)
    seed: int = 0
    origin: Mapping[str, Any] = field(default_factory=dict)
    models: Path | None = None
    loss: Loss | None = None
    metric: Callable[[Any, Tensor], Tensor | float] | None = None
    conditions: Conditions = field(default_factory=Conditions)
    lock: Path | None = None

    def selection(self, policy: Policy) -> Selection:
        """Returns the channels of each group that stay under `policy`.

        Raises:
            PolicyError: The policy does not fit the groups.
        """
        widths = policy.widths(self.groups)
        return {
            group.name: choose(
                self.knowledge.scores[policy.choices[group.name].criterion][group.name], widths[group.name]
            )
            for group in self.groups
            if widths[group.name] < group.size
        }

    def identity(self, policy: Policy) -> str:
        """Returns the same text for policies that keep the same channels, whatever criteria chose them."""
        return _identity(self.selection(policy))

    def evaluate(self, policy: Policy, fidelity: Fidelity) -> TrialResult:
        """Prunes, repairs, fine-tunes and scores one policy.

        Raises:
            TrialError: Training diverged, memory ran out, or the score is not finite.
        """
        try:
            return self._evaluate(policy, fidelity)
        except torch.cuda.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise TrialError(f"out of memory on {self.device}: {str(error).splitlines()[0]}") from error

    def dense_result(self, fidelity: Fidelity) -> dict[str, float]:
        """Scores the dense model as it is: `val_accuracy`, `val_loss`, `latency_ms`, with `test_` where asked for."""
        metrics = self._scored("val", self.network.model, fidelity.images)
        if fidelity.test:
            metrics |= self._scored("test", self.network.model, None)
        return metrics | self.measure(self.network.model) | _predicted(self.network.cost_model.dense())

    def repair(self, selection: Selection) -> nn.Module:
        """Returns the pruned network after surgery, compensation and recalibration."""
        return self._repaired(cut(self.network, selection), selection)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Returns latency and, on CUDA, peak memory a sample of a model, under the workbench's conditions."""
        inputs = self.network.example_inputs
        with one_at_a_time(self.lock):
            latency = measure_latency(model, inputs, self.conditions)
            peak = measure_peak_memory(model, inputs, self.conditions)
        memory = {} if peak is None else {"peak_memory_bytes": peak / self.conditions.batch}
        return latency.metrics | memory

    # --- the steps of a trial ---

    def _evaluate(self, policy: Policy, fidelity: Fidelity) -> TrialResult:
        clock = _Clock()
        selection = self.selection(policy)
        metrics: dict[str, float] = {}
        with clock("surgery"):
            model = cut(self.network, selection).to(self.device)
        if fidelity.epochs > 0:
            with clock("evaluation"):
                metrics |= self._scored("val", model, fidelity.images, "_pruned")
        with clock("compensation"):
            model = self._repaired(model, selection)
        with clock("evaluation"):
            repaired = self._scored("val", model, fidelity.images, "_recalibrated")
        metrics |= repaired
        curves: dict[str, tuple[float, ...]] = {}
        if fidelity.epochs > 0:
            model, tuned, curves = self._tuned(model, fidelity, clock)
            metrics |= tuned
        else:
            metrics |= {
                "val_accuracy": repaired["val_accuracy_recalibrated"],
                "val_loss": repaired["val_loss_recalibrated"],
            }
            if fidelity.test:
                metrics |= self._scored("test", model, None)
        if not np.isfinite(metrics["val_accuracy"]):
            raise TrialError(f"the validation accuracy is {metrics['val_accuracy']}")
        if fidelity.epochs > 0 or fidelity.test:
            with clock("measurement"):
                metrics |= self.measure(model)
        widths = policy.widths(self.groups)
        costs = self.network.cost_model.costs(widths)
        result = TrialResult(
            policy=policy,
            identity=_identity(selection),
            fidelity=fidelity,
            widths=widths,
            costs=costs,
            metrics=metrics | _predicted(costs),
            curves=curves,
            seconds=clock.seconds,
            device=self.device,
            seed=self.seed,
        )
        if self.models is None or fidelity.epochs <= 0:
            return result
        folder = self.models / f"{fidelity.rung}-{result.identity}"
        document = model_document(self.network, policy, selection, result.to_json(), self.origin)
        save_model(folder, model, document)
        return replace(result, model_path=str(folder))

    def _repaired(self, model: nn.Module, selection: Selection) -> nn.Module:
        recipe, knowledge = self.recipe, self.knowledge
        if recipe.compensation and selection and knowledge.statistics:
            recalibrated = recipe.recalibration_batches > 0
            ridge, statistics = recipe.ridge, knowledge.statistics
            compensate(self.network, model, selection, statistics, ridge=ridge, recalibrated=recalibrated)
            if knowledge.targets is not None and recalibrated:
                refit_sequentially(
                    self.network, model, selection, knowledge.targets, ridge=recipe.ridge, seed=self.seed
                )
                return model  # that pass took the batch norms' statistics too
        # The very same statistics for every candidate: the same images in the same order.
        batches, calibration = recipe.recalibration_batches, self.splits.calibration
        recalibrate(model, calibration, batches=batches, device=self.device, seed=self.seed)
        return model

    def _tuned(
        self, start: nn.Module, fidelity: Fidelity, clock: _Clock
    ) -> tuple[nn.Module, dict[str, float], dict[str, tuple[float, ...]]]:
        """Fine-tunes once a seed; returns the model of the first seed, mean metrics, and the first seed's curves."""
        import copy

        found: list[dict[str, float]] = []
        first: nn.Module | None = None
        curves: dict[str, tuple[float, ...]] = {}
        for number in range(fidelity.seeds):
            model = copy.deepcopy(start) if fidelity.seeds > 1 else start
            with clock("fine_tuning"):
                history = fine_tune(
                    model,
                    self.splits.train,
                    recipe=self.recipe,
                    epochs=fidelity.epochs,
                    teacher=self.network.model if self.recipe.distillation is not None else None,
                    seed=self.seed + number,
                    device=self.device,
                    precision=self.training_precision,
                    val=self.splits.val if number == 0 and fidelity.epochs >= _CURVE_EPOCHS else None,
                    loss=self.loss,
                    metric=self.metric,
                )
            with clock("evaluation"):
                metrics = self._scored("val", model, fidelity.images)
                if fidelity.test:
                    metrics |= self._scored("test", model, None)
            metrics["val_accuracy_tuned"] = metrics["val_accuracy"]
            found.append(metrics)
            if first is None:
                first, curves = model, curves_of(history)
        assert first is not None
        mean = {name: fmean(metrics[name] for metrics in found) for name in found[0]}
        if len(found) > 1:
            for name in [n for n in mean if n.endswith("accuracy")]:
                mean[f"{name}_spread"] = float(np.std([m[name] for m in found], ddof=1))
        return first, mean, curves

    def _scored(self, split: str, model: nn.Module, limit: int | None, suffix: str = "") -> dict[str, float]:
        score: Score = evaluate(
            model,
            getattr(self.splits, split),
            limit=limit,
            device=self.device,
            autocast_dtype=self.precision.autocast_dtype,
            loss=self.loss,
            metric=self.metric,
        )
        return {f"{split}_accuracy{suffix}": score.accuracy, f"{split}_loss{suffix}": score.loss}


def _predicted(costs: Mapping[str, int]) -> dict[str, float]:
    return {"latency_predicted_ms": costs[LATENCY] / 1e6} if LATENCY in costs else {}


def _identity(selection: Selection) -> str:
    return digest({name: kept.tolist() for name, kept in selection.items()})


def curves_of(history: History) -> dict[str, tuple[float, ...]]:
    """Returns the series of a training that hold at least one epoch, by name."""
    series = {"train_loss": history.train_loss, "val_accuracy": history.val_accuracy, "lr": history.lr}
    return {name: values for name, values in series.items() if values}


class _Clock:
    """Adds up seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
