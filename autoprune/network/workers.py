"""A workbench on its way to where it evaluates: this process, others of this machine, or those of a cluster.

Decides what these share, their threads, and which GPU each one sees. Must not know how processes are started.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from autoprune.memory import keep_freed
from autoprune.network.artifacts.saved import replace_folder
from autoprune.network.data.progress import watched
from autoprune.network.data.samples import Split, StreamSplit
from autoprune.network.latency.cache import LOCK
from autoprune.network.sharing import Packed, SharedFile, mapped, pack
from autoprune.network.workbench import Workbench
from autoprune.policy import Policy
from autoprune.results import Fidelity, TrialResult

_MOST = 4
"""Workers on a CPU by default: every one holds a torch of its own."""
_MOST_READERS = 8
_CUDA = "CUDA_VISIBLE_DEVICES"
_OURS = 0.9
"""Fraction of a GPU's memory that the processes on it divide; the rest is for their contexts and for the one that
prepared the search."""


def threads_per_worker(workers: int) -> int:
    """Returns each worker's share of the cores, at least one: processes that each use all of them are far slower."""
    return max(1, _cores() // workers)


def threads_of(workers: int) -> int:
    """Returns the threads with which each evaluation runs; sums, and so results, can depend on them."""
    return torch.get_num_threads() if workers == 1 else threads_per_worker(workers)


def default_workers(device: str) -> int:
    """Returns how many workers suit a device: one a core, at most four; of GPUs as many as may be used."""
    if torch.device(device).type != "cuda":
        return min(_cores(), _MOST)
    return max(1, len(environments(device)))


def environments(device: str) -> tuple[dict[str, str], ...]:
    """Returns what one worker a GPU has to see of the machine, so that the GPU is its own; on a CPU nothing.

    `cuda` means every GPU that this process sees, `cuda:1` one of them.
    """
    chosen = torch.device(device)
    if chosen.type != "cuda":
        return ()
    seen = os.environ.get(_CUDA)
    names = [str(i) for i in range(torch.cuda.device_count())] if seen is None else seen.split(",")
    wanted = range(torch.cuda.device_count()) if chosen.index is None else [chosen.index]
    return tuple({_CUDA: names[i].strip()} for i in wanted)


def gpu_share(device: str, workers: int) -> float:
    """Returns which part of a GPU each of `workers` processes has, where they are dealt out over the GPUs in turn."""
    gpus = len(environments(device))
    return 1.0 if not gpus else 1 / math.ceil(workers / gpus)


def settle(bench: Workbench, threads: int, gpu_share: float) -> Workbench:
    """Sets what this process may use, and returns the workbench with as many readers of streamed data as suit that.

    Operators get `threads` threads; on a CPU, freed memory stays for the next ones. On a GPU that is shared the
    allocator gets its part, so that one process cannot keep what another needs: who needs more runs out of memory and
    tries smaller batches. Of the threads one trains; on a GPU, where it mostly waits, another process reads anyway.
    """
    torch.set_num_threads(threads)
    on_gpu = torch.device(bench.device).type == "cuda"
    if not on_gpu:
        keep_freed()
    if on_gpu and gpu_share < 1:
        torch.cuda.set_per_process_memory_fraction(_OURS * gpu_share)
    readers = min(_MOST_READERS, max(int(on_gpu), threads - 1))

    def read_by(split: Split) -> Split:
        if isinstance(split, StreamSplit) and split.workers is None:
            return replace(split, workers=readers)
        return split

    return replace(bench, splits=bench.splits.changed(read_by))


@dataclass(frozen=True)
class WorkerFactory:
    """Builds the evaluation function in this process."""

    workbench: Workbench

    def __call__(self, beat: Callable[[], None]) -> Callable[..., Any]:
        """Returns `Workbench.evaluate`, which calls `beat` with every batch and between its steps."""
        return _watched(self.workbench, beat).evaluate


@dataclass(frozen=True)
class MappedFactory:
    """Builds the evaluation function in another process of this machine, which maps what is large from a file."""

    path: Path
    spans: tuple[tuple[int, int], ...]
    rest: bytes
    threads: int
    gpu_share: float = 1.0

    def __call__(self, beat: Callable[[], None]) -> Callable[..., Any]:
        """Returns `Workbench.evaluate`; see `WorkerFactory`."""
        bench = mapped(self.path, self.spans, self.rest)
        return _watched(settle(bench, self.threads, self.gpu_share), beat).evaluate


def mapped_factory(shared: SharedFile, threads: int, gpu_share: float = 1.0) -> MappedFactory:
    """Returns the factory of a workbench that `packed` took apart and a file holds; see `settle`."""
    return MappedFactory(shared.path, tuple(shared.spans), shared.rest, threads, gpu_share)


def packed(bench: Workbench) -> Packed:
    """Takes a workbench apart for other processes, in each of which the first GPU that it sees is its own."""
    if torch.device(bench.device).type == "cuda":
        bench = replace(bench, device="cuda", conditions=replace(bench.conditions, device="cuda"))
    model = bench.network.model
    return pack(bench, own=[*model.parameters(), *model.buffers()])


@dataclass(frozen=True)
class Parcel:
    """A result from a machine whose disk may be another one: `files` holds those of the finished model by name."""

    result: TrialResult
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class RemoteFactory:
    """Builds a function that evaluates on any machine: what is large is read where the cluster keeps it."""

    packed: Packed
    threads: int
    gpu_share: float = 1.0

    def __call__(self, beat: Callable[[], None]) -> Callable[[Policy, Fidelity], Parcel]:
        """Returns a function that evaluates and brings the finished model along."""
        lock = Path(tempfile.gettempdir()) / f"autoprune-{LOCK}"
        bench = settle(replace(self.packed.value(), lock=lock), self.threads, self.gpu_share)
        bench = _watched(bench, beat)

        def evaluate(policy: Policy, fidelity: Fidelity) -> Parcel:
            with tempfile.TemporaryDirectory(prefix="autoprune-") as folder:
                here = replace(bench, models=None if bench.models is None else Path(folder))
                result = here.evaluate(policy, fidelity)
                files = sorted(Path(result.model_path).iterdir()) if result.model_path else []
                return Parcel(result, {path.name: path.read_bytes() for path in files})

        return evaluate


def received(parcel: Parcel, models: Path | None) -> TrialResult:
    """Returns the result of a parcel; its model then lies in the folder `models`, whole or not at all."""
    if not parcel.files or models is None or parcel.result.model_path is None:
        return parcel.result
    folder = models / Path(parcel.result.model_path).name
    with replace_folder(folder) as work:
        for name, data in parcel.files.items():
            (work / name).write_bytes(data)
    return replace(parcel.result, model_path=str(folder))


def _watched(bench: Workbench, beat: Callable[[], None]) -> Workbench:
    return replace(bench, splits=watched(bench.splits, beat), beat=beat)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
