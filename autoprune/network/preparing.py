"""From a space to a workbench: model, data, baseline, trace, calibration statistics, scores and error tables.

Decides what is made once and cached. Knows nothing of how a policy is evaluated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import InputError
from autoprune.network.criteria.knowledge import read_knowledge, write_knowledge
from autoprune.network.criteria.learning import learn, learn_weights, mean_loss
from autoprune.network.criteria.own import criteria_key
from autoprune.network.data.loading import Splits, load_data
from autoprune.network.data.tasks import Loss, check_output, check_task
from autoprune.network.devices.device import device_name, ieee, resolve_device
from autoprune.network.devices.failures import described
from autoprune.network.devices.formats import Choice, named_choice, precision_text, remembered_choice, told
from autoprune.network.devices.precision import Precision
from autoprune.network.devices.processor import processor_text
from autoprune.network.graph.copies import runs_channels_last
from autoprune.network.graph.modules import device_of, evaluating
from autoprune.network.graph.network import Network
from autoprune.network.latency.cache import LOCK, conditions_of
from autoprune.network.models.building import build_model
from autoprune.network.models.checkpoints import load_checkpoint, save_state
from autoprune.network.settings import activation_scope, data_settings, recipe_of, searchable_groups
from autoprune.network.surgery.activations import activation_sites
from autoprune.network.surgery.attention import prunable
from autoprune.network.surgery.folding import foldable
from autoprune.network.tracing.cache import trace_or_read
from autoprune.network.tracing.removable import with_removable
from autoprune.network.tracing.trace import trace
from autoprune.network.training.evaluation import samples_at_once
from autoprune.network.training.recipe import Epoch, Recipe, fine_tune
from autoprune.network.training.regularisation import regulariser_of
from autoprune.network.workbench import Workbench
from autoprune.policy import CHANNEL, digest
from autoprune.space import Space

Note = Callable[[str], None]


@dataclass(frozen=True)
class Ingredients:
    """What a search starts from: a trained dense model, its data, and how it is built (for `load`)."""

    model: nn.Module
    splits: Splits
    origin: Mapping[str, Any]
    data_key: str
    loss: Loss | None = None
    metric: Callable[[Any, Tensor], Tensor | float] | None = None
    untrained: bool = False
    """Whether the model has its initial weights and must be trained before anything is learnt from it."""
    channels_last: bool = True
    """Whether images may lie channels-last in memory: `fitting` tells."""


def ingredients_of(space: Space, *, cache: Path) -> Ingredients:
    """Reads the data and builds the dense model of a space; without trained weights the result is marked `untrained`.

    Args:
        space: The settings.
        cache: Folder for decoded images.

    Raises:
        InputError: The model, its weights, its checkpoint or the data cannot be used.
    """
    settings = data_settings(space)
    splits = load_data(settings, seed=space.seed, cache_dir=cache / "data")
    check_task(splits, loss=None, metric=None)
    arguments = dict(space.model.arguments)
    model = build_model(
        name=space.model.name,
        factory=space.model.factory,
        arguments=arguments,
        weights=space.model.weights,
        num_classes=splits.num_classes,
        seed=space.seed,
    )
    origin = {
        "name": space.model.name,
        "factory": space.model.factory,
        "arguments": arguments,
        "num_classes": splits.num_classes,
        "classes": list(splits.classes),
    }
    if space.checkpoint is not None:
        load_checkpoint(model, space.checkpoint)
    untrained = space.checkpoint is None and space.model.weights is None
    key = digest([asdict(settings), space.seed])
    return fitting(Ingredients(prunable(model).eval(), splits, origin, key, untrained=untrained))


def fitting(ingredients: Ingredients) -> Ingredients:
    """Runs the dense model on two real samples, and gives data out as it takes them.

    Whole numbers become real ones where the model takes these alone; images lie contiguous in memory where its code
    does not run channels-last.

    Raises:
        InputError: The model does not run on a sample, or what it gives is no score for each class.
    """
    model, splits = ingredients.model, ingredients.splits
    x = example_of(splits)
    output = _output(model, x)
    if isinstance(output, Exception) and not x.is_floating_point():
        real = splits.given_out(whole=False)
        if not isinstance(found := _output(model, example_of(real)), Exception):
            splits, output, x = real, found, example_of(real)
    last = x.dim() == 4 and runs_channels_last(model, (x,))
    if isinstance(output, Exception):
        raise InputError(
            f"{type(model).__name__} does not run on two samples of the data, {str(x.dtype).removeprefix('torch.')}"
            f" of shape {tuple(x.shape)}: {described(output)}"
        ) from output
    check_output(output, splits.num_classes, loss=ingredients.loss, metric=ingredients.metric)
    if x.dim() == 4 and not last:
        splits = splits.given_out(channels_last=False)
    return replace(ingredients, splits=splits, channels_last=last or x.dim() != 4)


def _output(model: nn.Module, x: Tensor) -> Any:
    """Returns what a model gives in evaluation mode, or the error that it raises."""
    try:
        with evaluating(model), torch.no_grad():
            return model(x.to(device_of(model)))
    except Exception as error:  # whatever the model's own code raises
        return error


def train_baseline(space: Space, ingredients: Ingredients, *, cache: Path, note: Note) -> None:
    """Gives an untrained model its weights, in place: by `recipe.baseline` once, from `cache` afterwards.

    Raises:
        TrialError: The training diverged.
    """
    if not ingredients.untrained:
        return
    model, splits = ingredients.model, ingredients.splits
    recipe = replace(recipe_of(space), distillation=None, compensation=True, schedule=None, regularisation=None)
    # What a schedule is plays no part here, and baselines from before there were any are found.
    plain = {key: value for key, value in asdict(recipe).items() if key not in ("schedule", "regularisation")}
    settings = [ingredients.data_key, space.model.model_dump(mode="json"), plain, space.seed]
    path = cache / f"baseline-{digest(settings)}.safetensors"
    if path.is_file():
        load_checkpoint(model, path)
        return
    epochs = recipe.baseline.epochs
    device = resolve_device(space.device)
    precision = choose_precision(ingredients, recipe, device=device, training=True, cache=cache)
    text = precision_text(precision)
    note(f"no checkpoint: training a baseline for {epochs:g} epochs in {text} (once; it is cached)")

    def each(epoch: Epoch) -> None:
        if epoch.number == epoch.epochs or epoch.number % 5 == 0:
            note(f"  epoch {epoch.number}/{epoch.epochs}: training loss {epoch.train_loss:.3f}")

    history = fine_tune(
        model,
        splits.train,
        recipe=recipe,
        epochs=epochs,
        lr=recipe.baseline.lr,
        seed=space.seed,
        device=device,
        precision=precision,
        on_epoch=each,
        loss=ingredients.loss,
    )
    for sentence in history.notes:
        note(sentence)
    model.to("cpu").eval()
    for parameter in model.parameters():
        # As it is when read from the cache: in another memory layout bfloat16 rounds differently.
        parameter.data = parameter.data.contiguous()
    save_state(model, path, {"format": "pt", "name": space.name})


def choose_precision(
    ingredients: Ingredients,
    recipe: Recipe,
    *,
    device: str,
    training: bool,
    cache: Path,
    note: Note = lambda text: None,
) -> Precision:
    """Returns the number format that the recipe names; `auto` is probed once on this kind of device and remembered.

    `note` is told the choice and its reason.
    """
    choice = _format(ingredients, recipe, device=device, training=training, cache=cache)
    for sentence in told({"training" if training else "evaluation": choice}):
        note(sentence)
    last = choice.precision.channels_last and ingredients.channels_last
    return replace(choice.precision, channels_last=last)


def _format(ingredients: Ingredients, recipe: Recipe, *, device: str, training: bool, cache: Path) -> Choice:
    model, calibration = ingredients.model, ingredients.splits.calibration
    count = _PROBED
    if torch.device(device).type != "cpu":  # where few samples leave most of the device idle
        count = recipe.batch_size if training else samples_at_once(device, None)

    def examples(count: int = count) -> Tensor:
        return next(iter(calibration.batches(min(count, len(calibration)))))[0]

    if recipe.precision == "auto" and ingredients.splits.num_classes > 0:
        shapes = [[name, list(p.shape)] for name, p in model.state_dict().items()]
        # A processor that only emulates bfloat16 may have got the cache of one that does not.
        key = digest([type(model).__qualname__, shapes, device_name(device), processor_text(device), training])
        path = cache / f"precision-{key}.json"
        return remembered_choice(path, model, examples, device=device, training=training)
    dtype = torch.bfloat16 if recipe.precision == "bfloat16" else None
    choice = named_choice(dtype, model, examples(2), training=training)
    if recipe.precision != "auto":
        return choice
    quantities = "the targets are no classes, and bfloat16 keeps no more than three digits of a quantity"
    return replace(choice, reasons=(quantities, *choice.reasons))


def example_of(splits: Splits) -> Tensor:
    """Returns a batch of two real samples, to trace with: numbers that nobody made up may be ids out of range."""
    x = splits.first(2)
    return x.contiguous() if len(x) == 2 else torch.cat([x, x])


def trace_ingredients(
    ingredients: Ingredients, space: Space | None = None, *, cache: Path | None = None, note: Note = lambda text: None
) -> Network:
    """Traces the dense model on the CPU for the way of pruning of `space` (by default channels), and finds which groups
    may be removed whole where the space lets them.

    Args:
        ingredients: The model and its data.
        space: The settings; None: channels are pruned, and no block is removed.
        cache: Folder of kept traces; None: none is read or written.
        note: Told where a kept trace cannot be used.

    Raises:
        TraceError: It cannot be exported, or nothing in it can be pruned.
        InputError: Blocks may be removed and no searched group is one.
    """
    example, pruning = example_of(ingredients.splits), CHANNEL if space is None else space.pruning
    if cache is None:
        network = trace(ingredients.model, example, pruning=pruning)
    else:
        network = trace_or_read(ingredients.model, example, pruning=pruning, folder=cache, note=note)
    if space is None or not space.groups.blocks:
        return network
    names = [group.name for group in searchable_groups(network, space)]
    network, reasons = with_removable(network, names)
    if not network.removable:
        name, reason = next(iter(reasons.items()))
        raise InputError(f"groups.blocks: none of the {len(names)} groups can be removed whole; {name}: {reason}")
    return network


def workbench_of(
    space: Space, ingredients: Ingredients, network: Network, *, cache: Path, models: Path | None, note: Note
) -> Workbench:
    """Prepares everything that evaluations need; what was learnt before is read from `cache`.

    Raises:
        InputError: See `searchable_groups` and the criteria.
    """
    device = resolve_device(space.device)
    recipe = recipe_of(space)
    groups = searchable_groups(network, space)
    network.model.to(device)
    parts = [
        model_digest(network.model),
        ingredients.data_key,
        criteria_key(space.criteria.choices),
        space.seed,
        _KNOWLEDGE,
    ]
    if network.masked:
        parts.append([network.pruning, [[group.name, group.widths] for group in groups]])
    key = digest(parts)
    path = cache / f"knowledge-{key}.safetensors"
    knowledge = read_knowledge(path, device=device)
    if knowledge is None:
        choices, loss, calibration = space.criteria.choices, ingredients.loss, ingredients.splits.calibration
        note(f"learning about {len(network.groups)} pruning groups on {len(calibration)} samples")
        with ieee(device):
            if network.masked:
                batches, mean = list(calibration.batches(64, device=device)), mean_loss(loss)
                knowledge = learn_weights(network, batches, groups, criteria=choices, loss=mean, seed=space.seed)
            else:
                knowledge = learn(network, calibration, criteria=choices, loss=loss, device=device, seed=space.seed)
        write_knowledge(path, knowledge)
        # What a resumed search reads has another memory layout, by which losses differ in the seventh digit.
        knowledge = read_knowledge(path, device=device) or knowledge
    if recipe.regularisation is not None:
        regulariser_of(network, {}, recipe.regularisation)  # refused here rather than in the middle of a search
    if recipe.compensation is not True:
        knowledge = replace(knowledge, targets=None)
    formats = {"evaluation": _format(ingredients, recipe, device=device, training=False, cache=cache)}
    if any(rung.epochs > 0 for rung in space.search.ladder):  # a probe takes a second
        formats["training"] = _format(ingredients, recipe, device=device, training=True, cache=cache)
    for sentence in told(formats):
        note(sentence)
    evaluation = formats["evaluation"].precision
    return Workbench(
        network=network,
        groups=groups,
        splits=ingredients.splits,
        recipe=recipe,
        knowledge=knowledge,
        device=device,
        precision=evaluation,
        training_precision=formats["training"].precision if "training" in formats else evaluation,
        seed=space.seed,
        origin=ingredients.origin,
        models=models,
        loss=ingredients.loss,
        metric=ingredients.metric,
        activations=activation_sites(network) if space.activations.choices else (),
        activation_scope=activation_scope(space),
        conditions=conditions_of(space),
        lock=cache / LOCK,
        folds=foldable(network),
    )


_PROBED = 64
"""Samples that number formats are probed on, on a CPU at most."""
_KNOWLEDGE = 4
"""Version of what `learn` and `learn_weights` compute; a change makes cached files stale."""


def model_digest(model: nn.Module) -> str:
    """Returns a text that is the same for models with the same state, names and shapes included."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            if tensor.numel()
            else b""
        )
    return total.hexdigest()[:16]


def splits_digest(splits: Splits) -> str:
    """Returns a text that stands for data at hand: sizes, and the first batch of every split."""
    total = hashlib.sha256()
    for name, split in splits.parts.items():
        total.update(f"{name} {len(split)}".encode())
        x, y = next(iter(split.batches(min(64, len(split)))))
        total.update(x.contiguous().numpy().tobytes() + y.contiguous().numpy().tobytes())
    return total.hexdigest()[:16]
