"""How long a pass of a network takes in each number format and memory format of images.

Decides what is timed, by which clock, on how many samples, and which variant wins. Must not know of what is remembered.

On a CPU a pass is timed by the clock of the one thread that runs it, which other processes do not move, and the
variants take turns: what disturbs one disturbs all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.network.data.staging import Device
from autoprune.network.data.tasks import first_tensor
from autoprune.network.devices.convolutions import differentiate, safe_convolutions
from autoprune.network.devices.device import ieee, synchronise, threads
from autoprune.network.devices.failures import described, free_memory, out_of_memory
from autoprune.network.devices.precision import Precision, autocast
from autoprune.network.devices.processor import without_bfloat16
from autoprune.network.devices.replay import graph_for, recorded
from autoprune.network.graph.copies import deep_copy
from autoprune.network.graph.modules import mode

MARGIN = 0.1
"""Part of the time that bfloat16 must save: it keeps three digits, and a smaller gain is not worth them."""
BASE = Precision(None, channels_last=False)
"""What every network must run in."""
_LEAST, _MOST = 5, 25
"""Readings of each variant: where a pass is short, and where more would tell nothing."""
_PASS = 0.5
"""Seconds that a pass of a probe on a GPU may take: with few samples a format's overhead counts for more than its
arithmetic."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a probe found: the choice, the milliseconds of a pass of `samples` in each variant, and what was left out.

    `left_out` are the variants that the network does not run in, with the error; `refused` says why bfloat16 was not
    tried. On a CPU the times are medians of `readings` or more, of processor time; on a GPU the least.
    """

    precision: Precision
    milliseconds: Mapping[Precision, float]
    left_out: Mapping[Precision, str]
    refused: str | None = None
    readings: int = 0
    samples: int = 0

    @property
    def rival(self) -> Precision | None:
        """The variant that the choice beat: for bfloat16 the fastest one in float32, else the fastest of the others."""
        half = self.precision.autocast_dtype is not None
        others = [p for p in self.milliseconds if p != self.precision and not (half and p.autocast_dtype is not None)]
        return min(others, key=self.milliseconds.__getitem__, default=None)


def probe_precision(
    model: nn.Module,
    example: Tensor,
    *,
    device: Device = "cpu",
    training: bool = False,
    seconds: float = 1.0,
    keep: Precision | None = None,
) -> Probe:
    """Times float32 against bfloat16 autocast, and contiguous against channels-last images, and chooses.

    The model is not changed: a copy is timed, with `training` forward and backward. A variant in which the network
    cannot run (an operator without bfloat16, a `view` of channels-last images) is left out, and so is bfloat16 where
    the device only emulates it; float32 on contiguous images must run. bfloat16 must save `MARGIN` of the time.

    On a CPU about `seconds` are spent, twice that at most but for one round of passes; of `example` as many samples are
    used as let each variant run `_LEAST` times, and two at least. On a GPU a training pass is replayed from a capture,
    as training steps are: run one by one, passes of a small network would tell of launches alone. Where memory runs
    out, half of the samples are used.

    Args:
        model: The network.
        example: Samples.
        device: Where it runs.
        training: Whether passes go backward too.
        seconds: See above.
        keep: A variant that stays chosen unless another is faster by `MARGIN`.

    Raises:
        RuntimeError: The network does not run in float32 on contiguous images.
    """
    refused = without_bfloat16(device)
    variants = _variants(example, half=refused is None)
    twin = deep_copy(model).to(device)
    count = _fitting(twin, example, len(variants), device=device, training=training, seconds=seconds)
    while True:
        try:
            times, left_out = times_of(
                twin, example[:count].to(device), variants, device=device, training=training, seconds=seconds
            )
            break
        except RuntimeError as error:
            if not out_of_memory(error) or count <= 2:
                raise
        free_memory(str(device))
        count //= 2
    median = {precision: 1000 * statistics.median(taken) for precision, taken in times.items()}
    readings = min(map(len, times.values()))
    return Probe(_chosen(median, keep), median, left_out, refused, readings, count)


def _variants(example: Tensor, *, half: bool) -> list[Precision]:
    """Returns what to time, in an order that rarely rearranges the weights; the first one must run."""
    dtypes = (None, torch.bfloat16) if half else (None,)
    layouts = (False, True) if is_image(example) else (False,)
    return [Precision(dtype, channels_last=last) for last in layouts for dtype in dtypes]


def is_image(example: Tensor) -> bool:
    """Whether these samples have a memory format to choose: whole numbers (indices) are left as they come."""
    return example.dim() == 4 and example.is_floating_point()


def _chosen(milliseconds: Mapping[Precision, float], keep: Precision | None) -> Precision:
    singles = [p for p in milliseconds if p.autocast_dtype is None]
    halves = [p for p in milliseconds if p.autocast_dtype is not None]
    best = min(singles, key=milliseconds.__getitem__)
    half = min(halves, key=milliseconds.__getitem__, default=best)
    if milliseconds[half] < (1 - MARGIN) * milliseconds[best]:
        best = half
    if keep is not None and keep in milliseconds and milliseconds[best] >= (1 - MARGIN) * milliseconds[keep]:
        return keep
    return best


def _fitting(
    model: nn.Module, example: Tensor, variants: int, *, device: Device, training: bool, seconds: float
) -> int:
    """Returns how many samples to time a pass of. By the wall clock: a network may wait for what no processor does.

    ResNet-50 at 224 px: eight passes of 64 samples, and eight more with training, took more than three minutes.
    """
    pair = example[:2].to(device)
    if torch.device(device).type == "cpu":
        longest = seconds / (variants * (_LEAST + 1))
        with _ready(model, training=training):
            _processor_seconds(model, pair, BASE, training=training)
            start = time.perf_counter()
            _processor_seconds(model, pair, BASE, training=training)
            took = time.perf_counter() - start
    else:
        longest = _PASS
        with ieee(device):
            took = _captured_seconds(model, pair, BASE, training=training, seconds=0.0)
    return max(2, min(len(example), int(2 * longest / max(took, 1e-9))))


Times = dict[Precision, list[float]]


def times_of(
    model: nn.Module,
    example: Tensor,
    variants: Sequence[Precision],
    *,
    device: Device,
    training: bool,
    seconds: float,
) -> tuple[Times, dict[Precision, str]]:
    """Returns the seconds of passes in each variant that the network runs in, and the errors of the others.

    Raises:
        RuntimeError: It does not run in `BASE`, or memory runs out.
    """
    times: Times = {precision: [] for precision in variants}
    left_out: dict[Precision, str] = {}

    def read(measure: Callable[[Precision], float], *, counts: bool = True) -> None:
        for precision in list(times):
            try:
                took = measure(precision)
            except RuntimeError as error:
                if precision == BASE or out_of_memory(error):
                    raise
                del times[precision]
                left_out[precision] = described(error)
                continue
            if counts:
                times[precision].append(took)

    if torch.device(device).type != "cpu":
        share = seconds / len(variants)
        with ieee(device):
            read(lambda p: _captured_seconds(model, example, p, training=training, seconds=share))
        return times, left_out
    begun = time.perf_counter()
    with _ready(model, training=training):
        for number in range(_MOST + 1):
            # The first pass prepares kernels.
            read(lambda p: _processor_seconds(model, example, p, training=training), counts=number > 0)
            spent = time.perf_counter() - begun
            if number > 0 and spent > (seconds if number >= _LEAST else 2 * seconds):
                break
    return times, left_out


@contextmanager
def _ready(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Lets `model` run on one thread in the mode of `training`."""
    with mode(model, training=training), torch.set_grad_enabled(training), threads(1):
        yield


def _processor_seconds(model: nn.Module, example: Tensor, precision: Precision, *, training: bool) -> float:
    """Returns the seconds of this thread's processor time that a pass of `example` takes on the CPU."""
    call = _pass(model, example, precision, training=training)
    start = time.thread_time()
    call()
    return time.thread_time() - start


def _captured_seconds(
    model: nn.Module, example: Tensor, precision: Precision, *, training: bool, seconds: float
) -> float:
    """Returns the least time in seconds of a pass of `example`, captured where it trains, out of what fits into
    `seconds`.
    """
    call = _pass(model, example, precision, training=training)
    best = float("inf")
    graph = graph_for(example.device) if training else None
    with mode(model, training=training), torch.set_grad_enabled(training), recorded(call, graph) as run:
        end = time.perf_counter() + seconds
        for number in range(1000):
            synchronise(example.device)
            start = time.perf_counter()
            run()
            synchronise(example.device)
            now = time.perf_counter()
            if number > 0:  # the first pass prepares kernels
                best = min(best, now - start)
            if number > 0 and now > end:
                break
    return best


def _pass(model: nn.Module, example: Tensor, precision: Precision, *, training: bool) -> Callable[[], None]:
    """Arranges `model`, in place, and returns a call that runs `example` through it."""
    model.zero_grad(set_to_none=True)  # those of a pass before, in another format or in the memory of its capture
    precision.arrange_model(model)
    x = precision.arrange(example)
    safe = safe_convolutions(model, x.device)

    def call() -> None:
        with safe:
            with autocast(x.device, precision.autocast_dtype):
                output = first_tensor(model(x))
            if training:
                model.zero_grad(set_to_none=True)  # a gradient in another memory format would be added to slowly
                differentiate(output.float().square().mean())

    return call


def why_not(model: nn.Module, example: Tensor, precision: Precision, *, training: bool) -> str | None:
    """Returns why `model` does not run in a format, or None where it does."""
    try:
        with _ready(model, training=training):
            _processor_seconds(model, example, precision, training=training)
    except RuntimeError as error:
        return described(error)
    return None
