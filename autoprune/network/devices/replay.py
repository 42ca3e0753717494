"""Training steps that are captured once as a CUDA graph and then replayed: small networks are bound by kernel launches.

Decides when a step is captured, what it reads from (buffers that every batch is copied to), and what happens where it
cannot be captured: the steps run one by one, and `Stepper.notes` says why. Must not know what a step computes. The
graph is a `Protocol`, so that the rules are tested where there is no GPU. Nothing here was run on one yet.

A capture runs nothing: it records the kernels, with the addresses that they read and write. So the steps before it are
steps of the training as any other, and numbers that change from step to step (the learning rate) must lie in tensors.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.network.data.staging import Device, stream_for

WARM_UP = 3
"""Steps before the capture: optimizers make their state and libraries their workspaces in the first ones."""
LEAST_STEPS = 32
"""Steps of a training from which one is captured; a guess, not measured: a capture waits for the device once."""
_WAITS = "called a synchronizing CUDA operation"
"""What torch warns of, where it is asked to, when the host waits for the device."""
_refused: dict[tuple[type[nn.Module], ...], str] = {}
"""Networks, by the kinds of their modules, whose capture failed in this process: each failure costs device memory."""
_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed: where torch has not ended it, its allocator of pinned memory still looks at them."""


class Graph(Protocol):
    """Work of a device that is recorded once and done again and again."""

    def running(self) -> AbstractContextManager[None]:
        """Returns the context in which all steps run, recorded or not."""
        ...

    def rehearse(self, call: Callable[[], None]) -> str | None:
        """Does what `call` asks of the device; returns why that could not be recorded, where it shows."""
        ...

    def capture(self, call: Callable[[], None]) -> None:
        """Records what `call` asks of the device, without doing it.

        Raises:
            RuntimeError: It cannot be recorded, such as work that waits for the device, or memory runs out.
        """
        ...

    def replay(self) -> None:
        """Does what was recorded, on what now lies in the same memory."""
        ...

    def release(self) -> None:
        """Gives back the memory of the recording."""
        ...


class CudaGraph:
    """A CUDA graph on a stream of its own: the default stream cannot be captured.

    All steps run on that stream, those before the capture too, so that gradients and optimizer state belong to it.
    """

    def __init__(self, device: Device) -> None:
        self._device = torch.device(device)
        self._stream = stream_for("captures", self._device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Runs what is within on the graph's stream, after what the device was given before and before what follows."""
        outer = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outer.wait_stream(self._stream)

    def rehearse(self, call: Callable[[], None]) -> str | None:
        """Does `call` and listens whether the host waits for the device, which ends a capture with an error.

        A capture that fails leaves traces in torch: memory of its own that only the end of the process gives back, and
        in torch 2.11 an allocator and a generator that take it to be still under way.
        """
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waits = [warning for warning in heard if _WAITS in str(warning.message)]
        return f"it waits for the device ({waits[0].filename}:{waits[0].lineno})" if waits else None

    def capture(self, call: Callable[[], None]) -> None:
        """Records `call`; see `Graph.capture`.

        We chose this over `torch.cuda.graph` because that one leaves its stream current where the capture fails.
        """
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # a graph's memory is its own: it cannot use what the allocator keeps for others
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # threads that load data may go on
            call()
            graph.capture_end()
        except BaseException:
            self._abandon(graph, pool)
            raise
        self._graph = graph

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
        """Ends a capture that failed, which torch 2.11 does by halves: the allocator still serves the graph's pool, and
        the generator is between the steps of a capture until one succeeds.
        """
        with suppress(RuntimeError):  # a capture that failed also ends with an error
            graph.capture_end()
        with suppress(RuntimeError):  # later versions have ended it by now
            torch._C._cuda_endAllocateToPool(self._stream.device_index, pool)
        with suppress(RuntimeError):
            graph.reset()
        _failed.append(graph)
        with suppress(RuntimeError):
            empty, number = torch.cuda.CUDAGraph(), torch.zeros(1, device=self._device)
            empty.capture_begin(capture_error_mode="thread_local")
            try:
                number.zero_()  # torch warns of a graph without a kernel
            finally:
                empty.capture_end()
            empty.reset()

    def replay(self) -> None:
        """Launches the recorded kernels."""
        assert self._graph is not None  # it is replayed after it was captured
        self._graph.replay()

    def release(self) -> None:
        """Gives back the graph's memory; tensors that lie in it keep theirs until they go."""
        if self._graph is not None:
            torch.cuda.synchronize(self._device)
            self._graph.reset()
            self._graph = None


def graph_for(device: Device) -> Graph | None:
    """Returns what captures steps on `device`; None: nothing does, steps run one by one."""
    return CudaGraph(device) if torch.device(device).type == "cuda" else None


class Stepper:
    """Runs the steps of a training, from the fourth on by replaying a capture of it where there is a graph.

    Args:
        step: What is done with a batch: forward pass, loss, backward pass, optimizer. It returns nothing, keeps what it
            finds in tensors that stay the same, and reads numbers that change from such tensors.
        graph: What captures; None: every step is run.
        models: The networks that a step calls; a module with hooks is not captured, as a replay calls no Python.
        arm: Called with True before a capture and with False where it failed.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], None],
        graph: Graph | None,
        *,
        models: Sequence[nn.Module] = (),
        arm: Callable[[bool], None] = lambda on: None,
    ) -> None:
        self.notes: tuple[str, ...] = ()
        self.replayed = 0
        self._step = step
        self._graph = graph
        self._arm = arm
        self._done = 0
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._running = nullcontext() if graph is None else graph.running()
        self._kinds = tuple(type(module) for model in models for module in model.modules())
        hooked = None if graph is None else _hooked(models)
        if hooked is not None:
            self._give_up(f"{hooked} has hooks, which a replay would not call")
        elif graph is not None and self._kinds in _refused:
            self._give_up(_refused[self._kinds])

    def __enter__(self) -> Stepper:
        self._running.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if self._graph is not None:
                self._graph.release()
        finally:
            self._buffers = None
            self._running.__exit__(None, None, None)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Runs a step on the batch `x` `(n, ...)` with targets `y` `(n, ...)`."""
        if self._graph is None:
            self._step(x, y)
            return
        if self._buffers is None and self._done < WARM_UP:
            self._warm_up(x, y)
            return
        if self._buffers is not None and not _fits(self._buffers, (x, y)):
            self._step(x, y)
            return
        if self._buffers is None and not self._captured(x, y):
            self._step(x, y)
            return
        assert self._buffers is not None
        for buffer, value in zip(self._buffers, (x, y), strict=True):
            buffer.copy_(value, non_blocking=True)
        self._graph.replay()
        self.replayed += 1

    def _warm_up(self, x: Tensor, y: Tensor) -> None:
        assert self._graph is not None
        before, reason = _host_randomness(), None
        self._done += 1
        if self._done < WARM_UP:
            self._step(x, y)
        else:  # what is made once has been made
            reason = self._graph.rehearse(lambda: self._step(x, y))
        if _host_randomness() != before:
            reason = "it draws random numbers on the host, which a replay would repeat"
        if reason is not None:
            self._give_up(reason)

    def _captured(self, x: Tensor, y: Tensor) -> bool:
        """Captures a step that reads from buffers; False where that fails, and then never again."""
        assert self._graph is not None
        buffers = x.clone(), y.clone()
        self._arm(True)
        try:
            self._graph.capture(lambda: self._step(*buffers))
        except RuntimeError as error:
            self._arm(False)
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            if not isinstance(error, torch.OutOfMemoryError):
                _refused[self._kinds] = reason
            self._give_up(reason)
            return False
        self._buffers = buffers
        return True

    def _give_up(self, reason: str) -> None:
        self._graph = None
        self.notes = (f"training steps are not replayed as a CUDA graph but run one by one: {reason}",)


@contextmanager
def recorded(call: Callable[[], None], graph: Graph | None) -> Iterator[Callable[[], None]]:
    """Gives what does `call` again: a replay where there is a graph and it can be captured, else `call` itself.

    With a graph `call` is done some times before.
    """
    if graph is None:
        yield call
        return
    with graph.running():
        try:
            for _ in range(WARM_UP - 1):
                call()
            yield graph.replay if graph.rehearse(call) is None and _captures(graph, call) else call
        finally:
            graph.release()


def _captures(graph: Graph, call: Callable[[], None]) -> bool:
    with suppress(RuntimeError):
        graph.capture(call)
        return True
    return False


def _fits(buffers: tuple[Tensor, Tensor], batch: tuple[Tensor, Tensor]) -> bool:
    return all(b.shape == v.shape and b.dtype == v.dtype for b, v in zip(buffers, batch, strict=True))


def _hooked(models: Sequence[nn.Module]) -> str | None:
    """Returns the kind of a module whose hooks are called in a pass; None: there is none."""
    for model in models:
        for module in model.modules():
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            ):
                return type(module).__name__
    return None


def _host_randomness() -> tuple[object, ...]:
    """Returns what tells whether a generator of the host was drawn from: those of Python, numpy and torch."""
    kind, keys, *place = np.random.get_state()
    return random.getstate(), str(kind), np.asarray(keys).tobytes(), tuple(place), bytes(torch.get_rng_state().numpy())
