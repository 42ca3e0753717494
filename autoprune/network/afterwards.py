"""What is done with one pruned model after a search: it is trained longer, scored by class, timed, or evaluated again.

Decides how a saved model meets its data and recipe once more. Must not know which model a person chose, nor where
numbers go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoprune.cost import MEMORY
from autoprune.errors import CheckpointError, InputError, TrialError
from autoprune.network.artifacts.export import inputs_of
from autoprune.network.artifacts.saved import load, read_document, save_model
from autoprune.network.data.samples import Split
from autoprune.network.devices.device import resolve_device
from autoprune.network.devices.formats import precision_from
from autoprune.network.devices.precision import Precision
from autoprune.network.latency.cache import LOCK, conditions_of
from autoprune.network.latency.timing import Conditions, measure_latency, one_at_a_time
from autoprune.network.models.building import build_model
from autoprune.network.preparing import (
    Ingredients,
    Note,
    choose_precision,
    ingredients_of,
    trace_ingredients,
    train_baseline,
    workbench_of,
)
from autoprune.network.settings import recipe_of
from autoprune.network.training.evaluation import Score, evaluate, samples_at_once
from autoprune.network.training.recipe import Epoch, fine_tune
from autoprune.network.workbench import curves_of
from autoprune.objective import objective_of
from autoprune.policy import Group, Policy
from autoprune.results import Fidelity, TrialResult
from autoprune.space import Space

FINETUNE = "finetune"
"""The rung of models that were trained longer after a search."""


@dataclass(frozen=True)
class SplitScores:
    """How the dense and the pruned network do on one split; `classes` are rows of (name, samples, dense, pruned)."""

    split: str
    count: int
    dense: float
    pruned: float
    classes: tuple[tuple[str, int, float, float], ...]


@dataclass(frozen=True)
class Training:
    """How much longer a model is trained: `lr` is the peak learning rate (None: the recipe's), `seed` decides order,
    augmentation and dropout.
    """

    epochs: float
    lr: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.epochs < float("inf"):
            raise InputError(f"epochs must be positive and finite, got {self.epochs}")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise InputError(f"lr must be positive and finite, got {self.lr}")


@dataclass(frozen=True)
class Target:
    """Where a model goes that was trained longer, and what its document says about where it comes from."""

    folder: Path
    link: Mapping[str, Any]


def finetune(space: Space, folder: Path, *, training: Training, cache: Path, target: Target, note: Note) -> TrialResult:
    """Trains a saved model longer by the space's recipe and saves the result, which is there whole or not at all.

    Args:
        space: The settings of the search that the model comes from.
        folder: The saved model.
        training: How long and from which seed.
        cache: Folder of decoded images and of the baseline.
        target: Where the new model goes.
        note: Is told after each epoch.

    Raises:
        InputError: The model or the data cannot be used.
        TrialError: Training diverged.
    """
    document, model = read_document(folder), load(folder, allow_code=True)
    dense = _dense(space, cache=cache, note=note)
    device, recipe, val = resolve_device(space.device), recipe_of(space), dense.splits.val
    precision = choose_precision(dense, recipe, device=device, training=True, cache=cache, note=note)
    sample_bytes = _sample_bytes(document)
    scored = partial(
        _scored, dense, device=device, precision=_evaluating(space, dense, device, cache), sample_bytes=sample_bytes
    )

    own = objective_of(dense.metric)

    def told(epoch: Epoch) -> None:
        value = epoch.val_accuracy
        accuracy = "" if value is None else f", {own.label('val')} {own.text(value)}{own.hint}"
        note(f"  epoch {epoch.number}/{epoch.epochs}: training loss {epoch.train_loss:.3f}{accuracy}")

    metrics = {"val_accuracy_before": scored(model, val).accuracy}
    history = fine_tune(
        model,
        dense.splits.train,
        recipe=recipe,
        epochs=training.epochs,
        lr=training.lr,
        teacher=dense.model if recipe.distillation is not None else None,
        seed=training.seed,
        device=device,
        precision=precision,
        val=val,
        on_epoch=told,
        loss=dense.loss,
        metric=dense.metric,
        sample_bytes=sample_bytes,
    )
    for sentence in history.notes:
        note(sentence)
    for name, split in (("val", val), ("test", dense.splits.test)):
        score = scored(model, split)
        metrics |= {f"{name}_accuracy": score.accuracy, f"{name}_loss": score.loss}
    if not math.isfinite(metrics["val_accuracy"]):
        raise TrialError(f"the {own.long('val')} is {metrics['val_accuracy']} after training longer")
    with one_at_a_time(cache / LOCK):
        latency = measure_latency(model, inputs_of(document).sample(1), conditions_of(space))
    result = TrialResult(
        policy=Policy.from_json(document["policy"]),
        identity=document["result"]["identity"],
        fidelity=Fidelity(FINETUNE, epochs=training.epochs, test=True),
        widths=document["result"]["widths"],
        costs=document["costs"],
        metrics=metrics | latency.metrics,
        curves=curves_of(history),
        seconds={"fine_tuning": history.seconds},
        device=device,
        seed=training.seed,
        model_path=str(target.folder),
        notes=history.notes,
    )
    plain = result.to_json()
    kept = {key: plain[key] for key in document["result"]}
    said = {**target.link, "result": plain, "lr": training.lr}
    save_model(target.folder, model.to("cpu"), {**document, "result": kept, FINETUNE: said})
    return result


def score_by_class(space: Space, folder: Path, *, cache: Path, note: Note) -> list[SplitScores]:
    """Scores a saved model and the dense one on validation and test data, class by class.

    Raises:
        InputError: The model or the data cannot be used.
    """
    dense = _dense(space, cache=cache, note=note)
    device, model = resolve_device(space.device), load(folder, allow_code=True)
    scored = partial(
        _scored,
        dense,
        device=device,
        precision=_evaluating(space, dense, device, cache),
        sample_bytes=_sample_bytes(read_document(folder)),
    )
    found = []
    for name in ("val", "test"):
        split = getattr(dense.splits, name)
        given, got = (scored(m, split) for m in (dense.model, model))
        rows: list[tuple[str, int, float, float]] = []
        if got.per_class:
            counts = torch.cat([y for _, y in split.batches(1000)]).bincount(minlength=split.num_classes).tolist()
            labels = [str(c) for c in dense.splits.classes] or [str(i) for i in range(split.num_classes)]
            rows = list(zip(labels, counts, given.per_class, got.per_class, strict=True))
        found.append(SplitScores(name, got.count, given.accuracy, got.accuracy, tuple(rows)))
    return found


def time_both(
    folder: Path, *, device: str = "auto", batch: int = 1, dtype: str = "float32", threads: int = 1
) -> dict[str, Any]:
    """Times a saved model and the dense one on this machine.

    Args:
        folder: The saved model.
        device: Where; `auto` takes a GPU where there is one.
        batch: Samples of a pass.
        dtype: Number format.
        threads: Threads, on a CPU.

    Returns:
        `device`, `batch`, `dtype`, `threads`, and median and interquartile range in milliseconds: `dense_ms`,
        `dense_spread_ms`, `pruned_ms`, `pruned_spread_ms`.

    Raises:
        CheckpointError: The folder does not say how the dense model is built.
    """
    document = read_document(folder)
    origin = document.get("origin") or {}
    if not (origin.get("name") or origin.get("factory")):
        raise CheckpointError(f"{folder} does not say how its dense model is built, so it cannot be timed")
    dense = build_model(
        name=origin.get("name"),
        factory=origin.get("factory"),
        arguments=origin.get("arguments"),
        num_classes=origin.get("num_classes"),
    ).eval()
    conditions = Conditions(batch, dtype, threads, resolve_device(device))
    found: dict[str, Any] = {}
    for name, model in (("dense", dense), ("pruned", load(folder, allow_code=True))):
        latency = measure_latency(model, inputs_of(document).sample(1), conditions)
        found |= {key: getattr(latency, key) for key in ("device", "batch", "dtype", "threads")}
        found |= {f"{name}_ms": latency.median_ms, f"{name}_spread_ms": latency.spread_ms}
    return found


def evaluate_again(
    space: Space,
    choose: Callable[[Sequence[Group]], Policy],
    fidelity: Fidelity,
    *,
    facts: Mapping[str, str],
    cache: Path,
    note: Note,
) -> TrialResult:
    """Prunes, repairs, fine-tunes and scores one policy as a search did, from its settings.

    Args:
        space: The settings of the search.
        choose: Makes the policy from the searchable groups.
        fidelity: How much of the recipe was run.
        facts: What the settings leave open: `threads`, `precision`, `training_precision`, where they are known.
        cache: Folder of decoded images, the baseline and what was learnt.
        note: Is told what is going on.

    Raises:
        InputError: The model, the data or the policy cannot be used.
        TrialError: The evaluation failed.
    """
    ingredients = ingredients_of(space, cache=cache)
    network = trace_ingredients(ingredients, space)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(int(facts.get("threads", before)))
        train_baseline(space, ingredients, cache=cache, note=note)
        bench = workbench_of(space, ingredients, network, cache=cache, models=None, note=note)
        if "precision" in facts:
            bench = replace(bench, precision=precision_from(facts["precision"]))
        if "training_precision" in facts:
            bench = replace(bench, training_precision=precision_from(facts["training_precision"]))
        return bench.evaluate(choose(bench.groups), fidelity)
    finally:
        torch.set_num_threads(before)


def _dense(space: Space, *, cache: Path, note: Note) -> Ingredients:
    """Returns the dense model with its trained weights, and the data."""
    ingredients = ingredients_of(space, cache=cache)
    train_baseline(space, ingredients, cache=cache, note=note)
    return ingredients


def _evaluating(space: Space, dense: Ingredients, device: str, cache: Path) -> Precision:
    return choose_precision(dense, recipe_of(space), device=device, training=False, cache=cache)


def _sample_bytes(document: Mapping[str, Any]) -> int:
    return int(document.get("dense_costs", {}).get(MEMORY, 0))


def _scored(
    dense: Ingredients, model: nn.Module, split: Split, *, device: str, precision: Precision, sample_bytes: int
) -> Score:
    return evaluate(
        model,
        split,
        batch_size=samples_at_once(device, dense.metric, sample_bytes),
        device=device,
        autocast_dtype=precision.autocast_dtype,
        loss=dense.loss,
        metric=dense.metric,
    )
