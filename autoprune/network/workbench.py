"""The workbench: everything that the evaluation of a policy needs, prepared once a study.

Decides the way from a policy to a result: widths, channels, surgery, compensation, recalibration, fine-tuning,
evaluation. It is a plain value that travels to worker processes, and knows neither Optuna nor MLflow.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from torch import Tensor, nn

from autoprune.cost import LATENCY, MEMORY
from autoprune.errors import AutopruneError, TrialError
from autoprune.memory import tidy
from autoprune.network.artifacts.saved import model_document, save_model
from autoprune.network.calibration.targets import Targets
from autoprune.network.criteria.channels import choose
from autoprune.network.criteria.inputs import Scores
from autoprune.network.criteria.knowledge import Knowledge
from autoprune.network.data.loading import Splits
from autoprune.network.data.tasks import Loss
from autoprune.network.devices.device import ieee
from autoprune.network.devices.failures import described, free_memory, out_of_memory
from autoprune.network.devices.precision import Precision
from autoprune.network.graph.copies import deep_copy
from autoprune.network.graph.network import Network
from autoprune.network.latency.timing import Conditions, measure_latency, measure_peak_memory, one_at_a_time
from autoprune.network.repairs import Repairs
from autoprune.network.stage_clock import StageClock
from autoprune.network.surgery.activations import Site, replace_activations, replacements
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.folding import Pairs, folded, folded_copy
from autoprune.network.surgery.masks import keep, mask_tensors, mask_weights, masked, zeros_kept
from autoprune.network.surgery.selection import KeptSelections, Selection
from autoprune.network.training.evaluation import Score, evaluate, samples_at_once
from autoprune.network.training.recipe import History, Recipe, Stage, fine_tune
from autoprune.network.training.schedule import Outcome, Ranking, Tools, run_schedule
from autoprune.network.training.scratch import forget
from autoprune.objective import objective_of
from autoprune.policy import Group, Policy, digest
from autoprune.results import Fidelity, TrialResult

_CURVE_EPOCHS = 2
"""Fine-tuning of at least so many epochs records the validation accuracy after each of them."""
PARTS = (1, 2, 4)
"""In how many parts a batch goes through the network: the next one is tried where memory runs out."""
_LISTED = 100_000
_SAMPLED = 8192
"""More than any layer has channels: only groups of single weights are sampled."""


def _unheard() -> None:
    """Nobody listens to signs of progress."""


@dataclass(frozen=True)
class Workbench:
    """Evaluates policies for one network, data set and recipe.

    `groups` are the groups that the search may prune; all others stay whole. `origin` says how the dense model is
    built, for the document beside every saved model. `models` is the folder for finished models (None: they are not
    kept). `conditions` are those of measured latency, and `lock` a file that keeps two measurements apart. A batch goes
    through the network in `parts`. `beat` is called between the steps of an evaluation; `clock` tells their seconds.
    `deeper` keeps the targets on more images that a fidelity asked for, by their number. `folds` are batch norms that
    are folded away where a network is only run: the teacher's, and those of a candidate that is scored untrained.
    `selections` keeps those of the latest policies: who asks for the identity of a policy mostly evaluates it next.
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
    activations: tuple[Site, ...] = ()
    activation_scope: str = "model"
    conditions: Conditions = field(default_factory=Conditions)
    lock: Path | None = None
    parts: int = 1
    beat: Callable[[], None] = _unheard
    clock: Callable[[], float] = time.perf_counter
    deeper: dict[int, Targets] = field(default_factory=dict, repr=False, compare=False)
    folds: Pairs = ()
    selections: KeptSelections = field(default_factory=KeptSelections, repr=False, compare=False)

    def selection(self, policy: Policy) -> Selection:
        """Returns the channels of each group that stay under `policy`; it is computed once for a policy in a row.

        Raises:
            PolicyError: The policy does not fit the groups.
        """
        made_from = (self.network, self.groups, self.knowledge)
        return self.selections.of(policy, made_from, self._selected)

    def _selected(self, policy: Policy) -> Selection:
        widths = policy.widths(self.groups)
        narrowed = [group.name for group in self.groups if widths[group.name] < group.size]
        scores = {name: self.knowledge.scores[policy.choices[name].criterion][name] for name in narrowed}
        if self.network.masked:
            weights, pattern = mask_weights(self.network), self.network.pruning
            return {name: keep(weights[name], scores[name], widths[name], pattern) for name in narrowed}
        return {name: choose(scores[name], widths[name]) for name in narrowed}

    def identity(self, policy: Policy) -> str:
        """Returns the same text for policies that keep the same channels, whatever criteria chose them, and the same
        activations.

        In stages the criteria also decide what goes first and what a trained network keeps, so there they count.
        """
        selection = self.selection(policy)
        kept: dict[str, Any]
        if self.network.masked and sum(map(len, selection.values())) > _LISTED:  # listing millions takes seconds
            kept = {name: hashlib.sha256(kept.astype("<i8").tobytes()).hexdigest() for name, kept in selection.items()}
        else:
            kept = {name: kept.tolist() for name, kept in selection.items()}
        if self.recipe.staged:
            kept = {name: [policy.choices[name].criterion, channels] for name, channels in kept.items()}
        replaced = self.replaced(policy)
        return digest([kept, replaced] if replaced else kept)

    def replaced(self, policy: Policy) -> dict[str, str]:
        """Returns path → new kind for every activation module that `policy` replaces."""
        return replacements(self.activations, self.activation_scope, policy.activations)

    def ranking(self) -> dict[str, dict[str, list[float]]]:
        """Returns criterion → group → scores as plain numbers, for global rankings.

        Of a group of many single weights there is an even sample of the sorted scores.
        """
        return {
            criterion: {group: _sample(scores).tolist() for group, scores in by_group.items()}
            for criterion, by_group in self.knowledge.scores.items()
        }

    def evaluate(self, policy: Policy, fidelity: Fidelity) -> TrialResult:
        """Prunes, repairs, fine-tunes and scores one policy.

        Where memory runs out it is tried again with a half and then a quarter of each batch at a time; gradients are
        accumulated, so that the recipe's batch stays what it is. The result then has the metric `batch_parts`.

        Raises:
            TrialError: Training diverged, memory ran out with the smallest parts too, the score is not finite, or the
                model, the loss or the metric raised an error of their own.
            InputError: The loss or the metric does not give one number.
        """
        tidy()
        for parts in PARTS:
            try:
                with ieee(self.device):
                    return replace(self, parts=parts)._evaluate(policy, fidelity)
            except Exception as error:
                if not out_of_memory(error):
                    if isinstance(error, AutopruneError | OSError):  # a full disk is not the policy's fault
                        raise
                    raise TrialError(f"the evaluation raised {described(error)}") from error
                reason = str(error).partition("\n")[0] or type(error).__name__
            # Only here, where no traceback holds on to the tensors any more, does the memory come back.
            free_memory(self.device)
        raise TrialError(f"out of memory on {self.device}, even with 1/{PARTS[-1]} of a batch at a time: {reason}")

    def dense_result(self, fidelity: Fidelity) -> dict[str, float]:
        """Scores the dense model as it is: `val_accuracy`, `val_loss`, `latency_ms`, with `test_` where asked for."""
        metrics = self._scored("val", self.network.model, fidelity.images)
        if fidelity.test:
            metrics |= self._scored("test", self.network.model, None)
        return metrics | self.measure(self.network.model) | _predicted(self.network.cost_model.dense())

    def repair(self, selection: Selection, *, calibration: int | None = None) -> nn.Module:
        """Returns the pruned network after surgery (or masking), compensation and recalibration.

        `calibration` is how many images compensation refits on; None: those set aside for it.
        """
        return self._repairs.repaired(self.pruned(selection), selection, calibration=calibration)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Returns latency and, on CUDA, peak memory a sample of a model, under the workbench's conditions."""
        inputs = self.network.example_inputs
        with one_at_a_time(self.lock, self.beat):
            latency = measure_latency(model, inputs, self.conditions, beat=self.beat)
            peak = measure_peak_memory(model, inputs, self.conditions)
        memory = {} if peak is None else {"peak_memory_bytes": peak / self.conditions.batch}
        return latency.metrics | memory

    # --- the steps of a trial ---

    @property
    def _repairs(self) -> Repairs:
        return Repairs(
            self.network,
            self.splits,
            self.recipe,
            self.knowledge,
            device=self.device,
            precision=self.precision,
            seed=self.seed,
            deeper=self.deeper,
        )

    def _evaluate(self, policy: Policy, fidelity: Fidelity) -> TrialResult:
        clock = StageClock(self.clock, self.beat)
        selection = self.selection(policy)
        metrics: dict[str, float] = {}
        history = History()
        if self.recipe.staged and fidelity.epochs > 0:
            return self._result(policy, fidelity, self._staged(policy, fidelity, clock), clock)
        with clock("surgery"):
            model = self.pruned(selection).to(self.device)
            replace_activations(model, self.replaced(policy))
        if fidelity.scratch:
            model, metrics, history = self._tuned(model, selection, fidelity, clock)
            return self._result(policy, fidelity, (model, selection, metrics, history), clock)
        if fidelity.epochs > 0:
            with clock("evaluation"):
                metrics |= self._scored("val", model, fidelity.images, "_pruned")
        with clock("compensation"):
            model = self._repairs.repaired(model, selection, calibration=fidelity.calibration)
        with clock("evaluation"), folded(model, self.folds):
            repaired = self._scored("val", model, fidelity.images, "_recalibrated")
        metrics |= repaired
        if fidelity.epochs > 0:
            model, tuned, history = self._tuned(model, selection, fidelity, clock)
            metrics |= tuned
        else:
            metrics |= {
                "val_accuracy": repaired["val_accuracy_recalibrated"],
                "val_loss": repaired["val_loss_recalibrated"],
            }
            if fidelity.test:
                metrics |= self._scored("test", model, None)
        return self._result(policy, fidelity, (model, selection, metrics, history), clock)

    def _result(self, policy: Policy, fidelity: Fidelity, found: _Found, clock: StageClock) -> TrialResult:
        """Measures the finished model, keeps it where models are kept, and says what was found."""
        model, selection, metrics, history = found
        if not np.isfinite(metrics["val_accuracy"]):
            raise TrialError(f"the {objective_of(self.metric).long('val')} is {metrics['val_accuracy']}")
        if np.isnan(metrics["val_loss"]):  # an accuracy is a number even where every output is NaN
            raise TrialError("the validation loss is nan")
        if fidelity.epochs > 0 or fidelity.test:
            with clock("measurement"):
                metrics |= self.measure(model)
        if self.parts > 1:
            metrics["batch_parts"] = self.parts
        widths = policy.widths(self.groups)
        costs = self.network.cost_model.costs(widths)
        result = TrialResult(
            policy=policy,
            identity=self.identity(policy),
            fidelity=fidelity,
            widths=widths,
            costs=costs,
            metrics=metrics | _predicted(costs),
            curves=curves_of(history),
            seconds=clock.seconds,
            device=self.device,
            seed=self.seed,
            notes=history.notes,
        )
        if self.models is None or fidelity.scratch or not (fidelity.epochs > 0 or fidelity.test):
            return result
        folder = self.models / f"{fidelity.rung}-{result.identity}"
        document = model_document(self.network, policy, selection, result.to_json(), self.origin, model=model) | {
            "activations": self.replaced(policy)
        }
        save_model(folder, model, document)
        return replace(result, model_path=str(folder))

    def pruned(self, selection: Selection) -> nn.Module:
        """Returns the dense model with the channels (or weights) of `selection` alone, neither repaired nor trained."""
        return masked(self.network, selection) if self.network.masked else cut(self.network, selection)

    def _staged(self, policy: Policy, fidelity: Fidelity, clock: StageClock) -> _Found:
        """Runs the recipe's schedule once a seed; returns what `_tuned` does, and the channels of the first seed."""
        choices, scores = policy.choices, self.knowledge.scores
        names = [group.name for group in self.groups]
        ranking = Ranking(
            criteria={name: choices[name].criterion for name in names},
            scores={name: scores[choices[name].criterion][name] for name in names},
            widths=policy.widths(self.groups),
        )
        found: list[dict[str, float]] = []
        outcomes: list[Outcome] = []
        for number in range(fidelity.seeds):
            metrics: dict[str, float] = {}
            tools = self._tools(policy, fidelity, number, metrics=metrics, clock=clock)
            outcomes.append(run_schedule(self.network, ranking, self.recipe, tools))
            with clock("evaluation"):
                metrics |= self._scored_tuned(outcomes[-1].model, fidelity)
            found.append(metrics)
        first = outcomes[0]
        return first.model, first.selection, _mean(found), first.history

    def _tools(
        self, policy: Policy, fidelity: Fidelity, number: int, *, metrics: dict[str, float], clock: StageClock
    ) -> Tools:
        """Returns how one seed's schedule trains, repairs and scores; scores of the last cut go into `metrics`."""

        def train(model: nn.Module, stage: Stage, place: int) -> History:
            with clock("fine_tuning"):
                return self._fine_tuned(model, fidelity, number, stage=stage, seed=self.seed + number + 1000 * place)

        def repair(network: Network, model: nn.Module, selection: Selection) -> None:
            with clock("compensation"):
                self._repairs.repaired(model, selection, network)

        def watch(step: str, model: nn.Module) -> None:
            with clock("evaluation"):
                metrics.update(self._scored("val", model, fidelity.images, f"_{step}"))

        def alter(model: nn.Module) -> None:
            replace_activations(model, self.replaced(policy))

        return Tools(train, repair, watch, alter)

    def _tuned(
        self, start: nn.Module, selection: Selection, fidelity: Fidelity, clock: StageClock
    ) -> tuple[nn.Module, dict[str, float], History]:
        """Fine-tunes once a seed; returns the model of the first seed, mean metrics, and the first seed's history."""
        found: list[dict[str, float]] = []
        first: tuple[nn.Module, History] | None = None
        masks = mask_tensors(self.network, selection) if self.network.masked else {}
        for number in range(fidelity.seeds):
            model = deep_copy(start) if fidelity.seeds > 1 else start
            if fidelity.scratch:
                forget(model, self.seed + number)  # each seed its own initial weights, as its own order of images
            with clock("fine_tuning"), zeros_kept(model, masks):
                history = self._fine_tuned(model, fidelity, number, stage=Stage(), seed=self.seed + number)
            with clock("evaluation"):
                found.append(self._scored_tuned(model, fidelity))
            first = first or (model, history)
        assert first is not None
        return first[0], _mean(found), first[1]

    def _fine_tuned(self, model: nn.Module, fidelity: Fidelity, number: int, *, stage: Stage, seed: int) -> History:
        """Trains `model` in place for one stage; the first of several seeds records its validation accuracy."""
        return fine_tune(
            model,
            self.splits.train,
            recipe=self.recipe,
            epochs=fidelity.epochs,
            teacher=self._teacher(),
            seed=seed,
            device=self.device,
            precision=self.training_precision,
            val=self.splits.val if number == 0 and fidelity.epochs >= _CURVE_EPOCHS else None,
            loss=self.loss,
            metric=self.metric,
            stage=stage,
            parts=self.parts,
            sample_bytes=self.sample_bytes,
        )

    @property
    def at_once(self) -> int:
        """Samples of a forward pass that scores a model, at most."""
        return max(1, samples_at_once(self.device, self.metric, self.sample_bytes) // self.parts)

    @property
    def sample_bytes(self) -> int:
        """Bytes of activations that the dense network holds at once, of one sample."""
        return self.network.cost_model.dense()[MEMORY]

    def _teacher(self) -> nn.Module | None:
        return folded_copy(self.network.model, self.folds) if self.recipe.distillation is not None else None

    def _scored_tuned(self, model: nn.Module, fidelity: Fidelity) -> dict[str, float]:
        metrics = self._scored("val", model, fidelity.images)
        if fidelity.test:
            metrics |= self._scored("test", model, None)
        metrics["val_accuracy_tuned"] = metrics["val_accuracy"]
        return metrics

    def _scored(self, split: str, model: nn.Module, limit: int | None, suffix: str = "") -> dict[str, float]:
        score = self.score(model, split, limit)
        return {f"{split}_accuracy{suffix}": score.accuracy, f"{split}_loss{suffix}": score.loss}

    def score(self, model: nn.Module, split: str, limit: int | None) -> Score:
        """Scores `model` on the first `limit` samples (None: all) of the split of that name."""
        return evaluate(
            model,
            getattr(self.splits, split),
            batch_size=self.at_once,
            limit=limit,
            device=self.device,
            autocast_dtype=self.precision.autocast_dtype,
            loss=self.loss,
            metric=self.metric,
        )


def _predicted(costs: Mapping[str, int]) -> dict[str, float]:
    return {"latency_predicted_ms": costs[LATENCY] / 1e6} if LATENCY in costs else {}


def _sample(scores: Scores) -> Scores:
    if len(scores) <= _SAMPLED:
        return scores
    ordered = np.sort(scores)
    return ordered[np.linspace(0, len(ordered) - 1, _SAMPLED).round().astype(np.int64)]


def _mean(found: list[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of every metric over the seeds, and the spread of accuracies where there are several."""
    mean = {name: fmean(metrics[name] for metrics in found) for name in found[0]}
    if len(found) > 1:
        for name in [n for n in mean if n.endswith("accuracy")]:
            mean[f"{name}_spread"] = float(np.std([m[name] for m in found], ddof=1))
    return mean


def curves_of(history: History) -> dict[str, tuple[float, ...]]:
    """Returns the series of a training that hold at least one epoch, by name."""
    series = {"train_loss": history.train_loss, "val_accuracy": history.val_accuracy, "lr": history.lr}
    return {name: values for name, values in series.items() if values}


_Found = tuple[nn.Module, Selection, dict[str, float], History]
"""A finished model, the channels that it holds, its metrics and the history of its training."""
