"""Where the evaluations of a search run: in this process, in processes of this machine, or on a Ray cluster.

Decides which executor serves, what it is handed, and its limits. Must not know what a search does with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from autoprune.errors import InputError
from autoprune.executors import Executor, InlineExecutor, Limits, ProcessExecutor, RayExecutor, Share
from autoprune.memory import give_back
from autoprune.network.data.samples import TensorSplit
from autoprune.network.devices.failures import free_memory
from autoprune.network.sharing import SharedFile
from autoprune.network.workbench import Workbench
from autoprune.network.workers import (
    RemoteFactory,
    WorkerFactory,
    default_workers,
    environments,
    gpu_share,
    mapped_factory,
    packed,
    received,
    threads_of,
)


@dataclass(frozen=True, slots=True)
class OnRay:
    """A Ray cluster: its address (`local`, `auto`, or as Ray knows it), tasks at a time, and what each one takes.

    `workers` None means as many as there is room for; `gpus` None one whole GPU where the search's device is one.

    Raises:
        InputError: The processors or GPUs that an evaluation takes make no sense.
    """

    address: str
    workers: int | None = None
    cpus: float = 1.0
    gpus: float | None = None

    def __post_init__(self) -> None:
        Share(self.cpus, self.gpus or 0.0)  # refused before anything is prepared


@dataclass(frozen=True, slots=True)
class Here:
    """In this process, one evaluation after another: what ends its process ends the search. See `InlineExecutor`."""


Workers = int | Here | OnRay | None
"""How many processes of this machine evaluate (None: as many as suit it), this process, or the cluster that does."""


@contextmanager
def executor_of(bench: Workbench, workers: Workers, *, limits: Limits, cache: Path) -> Iterator[Executor]:
    """Gives the executor that evaluates with `bench`; it ends with the context.

    Args:
        bench: What evaluates.
        workers: Where, and how many at a time.
        limits: How long an evaluation may take, and be silent.
        cache: Folder for the file that processes of this machine share.

    Raises:
        InputError: The cluster cannot be reached, has no room, or takes GPUs for a search on a CPU.
    """
    if isinstance(workers, OnRay):
        _stand_back(bench)
        with _on_ray(bench, workers, limits) as executor:
            yield executor
        return
    if isinstance(workers, Here):
        with InlineExecutor(WorkerFactory(bench), limits) as executor:
            yield executor
        return
    count = workers or default_workers(bench.device)
    with SharedFile(packed(bench), cache) as shared:
        _stand_back(bench)
        factory = mapped_factory(shared, threads_of(count), gpu_share(bench.device, count))
        with ProcessExecutor(factory, count, limits=limits, environments=environments(bench.device)) as executor:
            yield executor


def _stand_back(bench: Workbench) -> None:
    """Gives back what preparing took, copies of the data on a GPU too: from here on other processes compute."""
    for split in bench.splits.parts.values():
        if isinstance(split, TensorSplit):
            split.pool.leave()
    free_memory(bench.device)
    give_back()


def threads(workers: Workers, count: int) -> int:
    """Returns the threads of each of `count` evaluations at a time."""
    return max(1, int(workers.cpus)) if isinstance(workers, OnRay) else threads_of(count)


def _on_ray(bench: Workbench, place: OnRay, limits: Limits) -> RayExecutor:
    on_gpu = bench.device.startswith("cuda")
    gpus = float(on_gpu) if place.gpus is None else place.gpus
    if bool(gpus) != on_gpu:
        raise InputError(
            f"the search's device is {bench.device} and an evaluation takes {gpus:g} GPUs: the machine that prepares a"
            " search must have a GPU exactly where those that evaluate use one; set `device`, or --gpus-per-trial"
        )
    return RayExecutor(
        RemoteFactory(packed(bench), threads(place, 1), min(1.0, gpus) or 1.0),
        place.address,
        workers=place.workers,
        share=Share(place.cpus, gpus),
        limits=limits,
        receive=partial(received, models=bench.models),
    )
