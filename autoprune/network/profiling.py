"""Where the time of a trial goes, and the least that it could take.

Decides what counts as the floor: the forward and backward passes of the very same pruned network on the very same
images, in bare loops over batches that are prepared beforehand. Trial and floor are run in turn and medians are
compared, in processor time on a CPU, so that what else the machine does falls on both. Knows nothing of how policies
are proposed or results are stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Generator, Tensor, nn

from autoprune.network.data.tasks import cross_entropy, widened
from autoprune.network.devices.convolutions import differentiate, safe_convolutions
from autoprune.network.devices.device import ieee, synchronise
from autoprune.network.devices.precision import Precision, autocast
from autoprune.network.graph.copies import deep_copy
from autoprune.network.graph.modules import evaluating, mode
from autoprune.network.graph.network import Network
from autoprune.network.surgery.activations import replace_activations
from autoprune.network.training.recipe import optimizer_of, taught_at_once
from autoprune.network.workbench import Workbench
from autoprune.policy import Policy
from autoprune.results import Fidelity

Clock = Callable[[], float]
_RECALIBRATION = 128
_TRACED_STEPS = 3


@dataclass(frozen=True, slots=True)
class StageTime:
    """Seconds of one stage, and of its forward and backward passes alone (`floor`)."""

    name: str
    seconds: float
    floor: float


@dataclass(frozen=True, slots=True)
class TrialTime:
    """A trial at one fidelity, stage by stage. Training was measured over `steps` steps and scaled to `whole_steps`."""

    rung: str
    stages: tuple[StageTime, ...]
    steps: int
    whole_steps: int

    @property
    def seconds(self) -> float:
        """Seconds of the trial."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def floor(self) -> float:
        """Seconds of its passes alone."""
        return sum(stage.floor for stage in self.stages)

    @property
    def ratio(self) -> float:
        """How many times the floor the trial takes."""
        return self.seconds / self.floor


def clock_of(device: str) -> Clock:
    """Returns the clock for work on a device: processor time on a CPU; elsewhere elapsed time, once work is done."""
    if torch.device(device).type == "cpu":
        return time.process_time

    def waited() -> float:
        synchronise(device)
        return time.perf_counter()

    return waited


def profile_trial(
    bench: Workbench, policy: Policy, fidelity: Fidelity, *, repeats: int = 3, steps: int = 20
) -> TrialTime:
    """Times a trial and its bare passes in turn.

    One seed is trained and no test set is scored. A recipe in stages is timed as one cut. Latency is measured by passes
    alone, so that stage is its own floor.

    Args:
        bench: The prepared workbench.
        policy: What is evaluated.
        fidelity: At which fidelity; training is cut to `steps` steps and its time scaled up.
        repeats: Trials and floors; the medians count.
        steps: Training steps that are really run, at most.

    Raises:
        ValueError: `repeats` or `steps` is below 1.
        TrialError: The policy cannot be evaluated.
    """
    if repeats < 1 or steps < 1:
        raise ValueError(f"repeats and steps must be at least 1, got {repeats} and {steps}")
    clock = clock_of(bench.device)
    recipe = replace(bench.recipe, schedule=None, regularisation=None)
    bench = replace(bench, recipe=recipe, models=None, clock=clock)
    short, done, whole = shortened(bench, fidelity, steps)
    floors = _floors(bench, policy, short, done)
    found: list[dict[str, float]] = []
    bare: dict[str, list[float]] = {name: [] for name in floors}
    bench.evaluate(policy, short)  # prepares kernels
    for _ in range(repeats):
        for name, run in floors.items():
            bare[name].append(_timed(run, clock))
        start = clock()
        stages = dict(bench.evaluate(policy, short).seconds)
        stages["other"] = max(0.0, clock() - start - sum(stages.values()))
        found.append(stages)
    times = []
    for name in found[0]:
        seconds = median(stages[name] for stages in found)
        floor = median(bare[name]) if name in bare else seconds if name == "measurement" else 0.0
        scale = whole / done if name == "fine_tuning" else 1.0
        times.append(StageTime(name, scale * seconds, scale * floor))
    return TrialTime(fidelity.rung, tuple(times), done, whole)


def trace_trial(bench: Workbench, policy: Policy, fidelity: Fidelity, path: Path) -> None:
    """Writes a trace of one trial to `path` (`.json` or `.json.gz`), for chrome://tracing or Perfetto."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.device(bench.device).type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    short, _, _ = shortened(bench, fidelity, _TRACED_STEPS)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(activities=kinds) as recorded:
        replace(bench, models=None).evaluate(policy, short)
    recorded.export_chrome_trace(str(path))


def export_seconds(network: Network, clock: Clock) -> float:
    """Returns the time of `torch.export` alone, what tracing is compared with; the second of two runs."""

    def run() -> None:
        with evaluating(network.model), torch.no_grad():
            torch.export.export(network.model, network.example_inputs, strict=False)

    run()
    return _timed(run, clock)


def calibration_seconds(bench: Workbench) -> float:
    """Returns the time of one pass of the calibration images through the dense network, the floor of learning."""
    batches = [x for x, _ in bench.splits.calibration.batches(64, device=bench.device)]
    run = _forward(bench.network.model, batches, Precision(), bench.device, collecting=False)
    return _timed(run, clock_of(bench.device))


def _timed(run: Callable[[], None], clock: Clock) -> float:
    start = clock()
    run()
    return clock() - start


def shortened(bench: Workbench, fidelity: Fidelity, steps: int) -> tuple[Fidelity, int, int]:
    """Returns the fidelity with at most `steps` steps, how many these are, and how many the whole has."""
    plain = replace(fidelity, seeds=1, test=False)
    if fidelity.epochs <= 0:
        return plain, 1, 1
    batch = min(bench.recipe.batch_size, len(bench.splits.train))
    an_epoch = len(bench.splits.train) // batch
    whole = max(1, round(fidelity.epochs * an_epoch))
    done = min(whole, steps, 2 * an_epoch - 1)  # from two epochs on, every epoch would be scored
    return replace(plain, epochs=done / an_epoch), done, whole


def _floors(bench: Workbench, policy: Policy, fidelity: Fidelity, steps: int) -> dict[str, Callable[[], None]]:
    """Returns stage → a bare loop of its passes."""
    with ieee(bench.device):
        model = bench.repair(bench.selection(policy))
    replace_activations(model, bench.replaced(policy))
    device, precision, recipe = bench.device, bench.precision, bench.recipe
    scored = [x for x, _ in bench.splits.val.batches(bench.at_once, limit=fidelity.images, device=device)]
    scorings = 3 if fidelity.epochs > 0 else 1  # after the cut, after the repair, after the training
    floors = {"evaluation": _forward(model, scored * scorings, precision, device, collecting=False)}
    targets = bench.knowledge.targets if recipe.recalibration_batches > 0 else None
    if targets is not None:
        seen = [precision.arrange(targets.images)]
    else:
        count, calibration = recipe.recalibration_batches, bench.splits.calibration
        seen = [x for x, _ in calibration.batches(min(_RECALIBRATION, len(calibration)), device=device)][:count]
    floors["compensation"] = _forward(deep_copy(model), seen, precision, device, collecting=True)
    if fidelity.epochs > 0:
        floors["fine_tuning"] = _training(bench, model, steps)
    return floors


def _forward(
    model: nn.Module, batches: Sequence[Tensor], precision: Precision, device: str, *, collecting: bool
) -> Callable[[], None]:
    """Returns a loop of forward passes; `collecting` puts batch norms into training mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if collecting else []

    def run() -> None:
        with torch.inference_mode(), mode(model, training=False), ieee(device):
            for norm in norms:
                norm.training = True
            for x in batches:
                with autocast(device, precision.autocast_dtype):
                    model(x)

    return run


def _training(bench: Workbench, start: nn.Module, steps: int) -> Callable[[], None]:
    """Returns a loop of training steps: the teacher's and the student's passes, the loss, and the optimizer."""
    recipe, precision, device = bench.recipe, bench.training_precision, bench.device
    model = deep_copy(start)
    precision.arrange_model(model)
    optimizer = optimizer_of(model, recipe, recipe.lr * 1e-3)
    batch = min(recipe.batch_size, len(bench.splits.train))
    order = Generator().manual_seed(0)
    batches: list[tuple[Tensor, Tensor]] = []
    while len(batches) < steps:
        passed = bench.splits.train.batches(batch, shuffle=order, augment=True, device=device, limit=steps * batch)
        batches += [(precision.arrange(x), y) for x, y in passed if len(x) == batch]
    at_once = taught_at_once(recipe, device, bench.loss, bench.sample_bytes)
    safe = safe_convolutions(model, device)
    teacher = bench.network.model.to(device) if recipe.distillation is not None else None

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with safe, autocast(device, precision.autocast_dtype):
            output = model(x)
        if teacher is not None:
            with torch.no_grad(), autocast(device, precision.autocast_dtype):
                for piece in torch.split(x, at_once):
                    teacher(piece)
        own = bench.loss
        value = cross_entropy(output, y) if own is None else own(widened(output), y)
        with safe:
            differentiate(value)
        optimizer.step()

    def run() -> None:
        with mode(model, training=True), mode(teacher or nn.Identity(), training=False), ieee(device):
            for x, y in batches[:steps]:
                step(x, y)

    return run
