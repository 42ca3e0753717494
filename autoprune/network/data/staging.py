"""Batches on their way from the host to a device that has memory of its own.

Decides how far ahead of the device's work batches are sent. They are copied on a lane of their own, from memory that
the loader has pinned, while the device works on the batch before. Must not know where batches come from. The lane is a
`Protocol`, so that the order is tested where there is no GPU. Nothing here was run on one yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

Device = str | torch.device
Batch = tuple[Tensor, Tensor]
AHEAD = 2
"""Batches that are sent before the work on the first of them is done. A host that runs ahead further gains nothing, and
each batch takes device memory."""


def stream_for(purpose: str, device: Device) -> torch.cuda.Stream:
    """Returns this process's stream for a purpose on a GPU, the same one each time.

    torch keeps what a stream has used for that stream alone: freed memory, and 32 MiB of workspace for matrix products
    on a large GPU. With a stream for every training they would add up.
    """
    index = torch.device(device).index
    return _stream(purpose, torch.cuda.current_device() if index is None else index)


@cache
def _stream(purpose: str, index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


class Lane(Protocol):
    """A way to a device, beside the work that the device does."""

    def send(self, batch: Batch) -> Batch:
        """Returns the batch on the device; what the device is given from now on waits for it, the host does not."""
        ...

    def mark(self) -> Callable[[], None]:
        """Returns a function that waits until the device has done what it was given up to now."""
        ...


class CudaLane:
    """Copies on a stream of its own, from pinned memory: what is not pinned yet is copied there first."""

    def __init__(self, device: Device) -> None:
        self._device = torch.device(device)
        self._stream = stream_for("copies", self._device)

    def send(self, batch: Batch) -> Batch:
        """Starts the copy; see `Lane.send`."""
        with torch.cuda.stream(self._stream):
            x, y = (value.pin_memory().to(self._device, non_blocking=True) for value in batch)
        work = torch.cuda.current_stream(self._device)
        work.wait_stream(self._stream)
        for value in (x, y):
            value.record_stream(work)  # its memory is the lane's, and must not be used anew while work reads it
        return x, y

    def mark(self) -> Callable[[], None]:
        """Records an event; see `Lane.mark`."""
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize


def lane_to(device: Device) -> Lane | None:
    """Returns the way to `device`; None: it shares the host's memory."""
    return CudaLane(device) if torch.device(device).type == "cuda" else None


def staged(batches: Iterable[Batch], lane: Lane | None) -> Iterator[Batch]:
    """Yields `batches` on the device, at most `AHEAD` of them before the device has worked on the first.

    A copy begins when the loader has the batch, and runs beside the work that the caller has asked for since.
    """
    marks: deque[Callable[[], None]] = deque()
    for batch in batches:
        if lane is None:
            yield batch
            continue
        if len(marks) == AHEAD:
            marks.popleft()()
        yield lane.send(batch)
        marks.append(lane.mark())
