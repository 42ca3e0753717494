"""Time and memory of a forward pass, measured on the device at hand.

Decides how a measurement is taken: in which number format, on how many threads, after how much warm-up, and that only
one process measures at a time. Must not know of policies or tables.

While other processes compute, the wall clock also counts what the system gives to them: on a machine of two cores with
five busy processes a pass of 3 ms took 7 ms, with a spread of 8. So a pass on one CPU thread is timed by that thread's
own clock, which is the wall clock where nothing else runs. What is left is shared caches and memory bandwidth: a lock
file keeps two measurements apart, though not a measurement and a training; so what a search decides on is the latency
table, which is built before any worker starts, and the front is measured once more when all of them have ended.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.network.data.staging import Device
from autoprune.network.devices.device import device_name, ieee, synchronise, threads
from autoprune.network.graph.copies import deep_copy
from autoprune.network.graph.modules import evaluating

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ROUND_MS = 1000.0
_POLL = 0.02
"""Seconds between two tries to get the lock."""
_SAMPLE_SECONDS = 2e-4
"""Calls that are shorter are repeated within a sample: the clock and one synchronisation cost microseconds."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """Under which conditions latency is measured: samples of a pass, number format, threads (on the CPU), device."""

    batch: int = 1
    dtype: str = "float32"
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.batch < 1 or self.threads < 1:
            raise ValueError(f"batch and threads must be at least 1, got {self.batch} and {self.threads}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number format as torch knows it."""
        return DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class Latency:
    """Time of one forward pass of a batch: median, interquartile range and least in milliseconds, and how it was taken.

    `device` is the name of the GPU, or the kind of any other device.
    """

    median_ms: float
    spread_ms: float
    least_ms: float
    batch: int
    threads: int
    device: str
    dtype: str

    @property
    def metrics(self) -> dict[str, float]:
        """The measurement under the names that a trial's metrics have."""
        return {
            "latency_ms": self.median_ms,
            "latency_spread_ms": self.spread_ms,
            "latency_least_ms": self.least_ms,
        }

    def to_json(self) -> dict[str, Any]:
        """Returns the measurement as plain JSON values."""
        return asdict(self)


def measure_latency(
    model: nn.Module,
    inputs: Sequence[Tensor],
    conditions: Conditions,
    *,
    repeats: int = 30,
    rounds: int = 3,
    beat: Callable[[], None] | None = None,
) -> Latency:
    """Times forward passes of a copy of `model` in evaluation mode; the model stays as it is.

    Several rounds are timed, each after a warm-up, and the one with the lowest median is returned: what disturbs a
    measurement only adds to it. A slow network gets fewer passes, at least five a round.

    Args:
        model: The network, on any device.
        inputs: Positional inputs, one sample or more each; their first samples are repeated up to the batch.
        conditions: Batch, number format, threads and device.
        repeats: Passes that are timed in a round.
        rounds: Rounds.
        beat: Called before each round, so that who waits sees progress.

    Raises:
        ValueError: `repeats` or `rounds` is below 1.
    """
    if repeats < 1 or rounds < 1:
        raise ValueError(f"repeats and rounds must be at least 1, got {repeats} and {rounds}")
    twin = _prepared(model, conditions)
    batch = batch_of(inputs, conditions)
    found: list[list[float]] = []
    with torch.inference_mode(), evaluating(twin), threads(conditions.threads), ieee(conditions.device):
        clock = _clock(conditions.device)

        def passes(count: int) -> list[float]:
            times = []
            for _ in range(count):
                synchronise(conditions.device)
                start = clock()
                twin(*batch)
                synchronise(conditions.device)
                times.append(1000 * (clock() - start))
            return times

        for _ in range(rounds):
            if beat is not None:
                beat()
            once = passes(2)[-1]  # prepares kernels
            count = min(repeats, max(5, int(_ROUND_MS / max(once, 1e-6))))
            passes(min(3, count))
            found.append(passes(count))
    times = min(found, key=statistics.median)
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return Latency(
        median_ms=statistics.median(times),
        spread_ms=quartiles[2] - quartiles[0],
        least_ms=min(map(min, found)),
        batch=conditions.batch,
        threads=conditions.threads,
        device=device_name(conditions.device),
        dtype=conditions.dtype,
    )


def measure_peak_memory(model: nn.Module, inputs: Sequence[Tensor], conditions: Conditions) -> int | None:
    """Returns the bytes of activations that one forward pass allocates at most, the inputs included.

    Only CUDA's allocator tells; on any other device it is None, and the cost model's `activation_bytes` stands alone.
    """
    if torch.device(conditions.device).type != "cuda":
        return None
    twin = _prepared(model, conditions)
    batch = batch_of(inputs, conditions)
    with torch.inference_mode(), evaluating(twin), ieee(conditions.device):
        twin(*batch)  # the first pass allocates workspaces that stay
        torch.cuda.synchronize(conditions.device)
        before = torch.cuda.memory_allocated(conditions.device)
        torch.cuda.reset_peak_memory_stats(conditions.device)
        twin(*batch)
        torch.cuda.synchronize(conditions.device)
        peak = torch.cuda.max_memory_allocated(conditions.device) - before
    return int(peak) + sum(x.numel() * x.element_size() for x in batch)


def time_call(call: Callable[[], Any], device: Device, *, samples: int = 5, seconds: float = 0.25) -> float:
    """Returns the seconds that a call takes: the least of some samples, as a disturbance only ever adds.

    Short calls are repeated within a sample, without waiting for the device in between, as a network issues them.
    About `seconds` are spent, and at least one sample is taken.
    """
    clock = _clock(device)
    call()  # prepares kernels
    synchronise(device)
    first = start = clock()
    call()
    synchronise(device)
    once = max(clock() - start, 1e-7)
    loops = max(1, round(_SAMPLE_SECONDS / once))
    best = once if loops == 1 else float("inf")
    for _ in range(samples):
        start = clock()
        for _ in range(loops):
            call()
        synchronise(device)
        now = clock()
        best = min(best, (now - start) / loops)
        if now > first + seconds:
            break
    return best


def _clock(device: Device) -> Callable[[], float]:
    """Returns the clock to time with: this thread's own one where the work is done by this thread alone."""
    alone = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


@contextmanager
def one_at_a_time(lock: Path | None, beat: Callable[[], None] | None = None) -> Iterator[None]:
    """Waits until no other process measures; None: does not wait. The lock goes with its process, however it ends.

    While it waits it calls `beat`.
    """
    with nullcontext() if lock is None else _locked(lock, beat):
        yield


@contextmanager
def _locked(lock: Path, beat: Callable[[], None] | None) -> Iterator[None]:
    import fcntl

    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as stream:
        if beat is None:
            fcntl.flock(stream, fcntl.LOCK_EX)
        else:
            while True:
                beat()
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(_POLL)
        yield  # closing the file releases it


def batch_of(inputs: Sequence[Tensor], conditions: Conditions) -> tuple[Tensor, ...]:
    """Returns `inputs` with the conditions' batch, number format and device; whole numbers stay what they are.

    An input whose first dimension is not the batch, as the first input has it, keeps its shape.
    """
    arranged = []
    for x in inputs:
        if x.ndim and x.shape[0] == inputs[0].shape[0]:
            x = x[:1].expand(conditions.batch, *x.shape[1:]).contiguous()
        arranged.append(x.to(conditions.device, conditions.torch_dtype if x.is_floating_point() else x.dtype))
    return tuple(arranged)


def _prepared(model: nn.Module, conditions: Conditions) -> nn.Module:
    """Returns a copy in the conditions' number format, its weights laid out plainly whatever training made of them."""
    twin = deep_copy(model).to(conditions.device, conditions.torch_dtype)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.data = parameter.data.contiguous()
    return twin
