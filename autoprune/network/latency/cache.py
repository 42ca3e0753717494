"""Under which conditions a space's latency is measured, and its latency table in the cache.

Decides what a table is kept by: the network, the conditions, the machine. Must not know how anything is timed.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from autoprune.network.devices.device import device_name, ieee, resolve_device
from autoprune.network.graph.network import Network
from autoprune.network.latency.table import LatencyTable, read_or_build
from autoprune.network.latency.timing import Conditions
from autoprune.policy import digest
from autoprune.space import Space

Note = Callable[[str], None]
LOCK = "measuring.lock"
LATENCY_VERSION = 2
"""Version of how tables are measured; a change makes cached files stale."""


def conditions_of(space: Space) -> Conditions:
    """Returns the conditions under which the space wants latency measured.

    Raises:
        InputError: A GPU was asked for and there is none.
    """
    section = space.latency
    return Conditions(section.batch, section.dtype, section.threads, resolve_device(space.device))


def latency_table(network: Network, space: Space, *, cache: Path, note: Note) -> LatencyTable:
    """Returns the latency table of a network under the space's conditions; it is measured once and kept in `cache`.

    Raises:
        InputError: The table cannot be read, or the network cannot be timed under these conditions.
    """
    conditions = conditions_of(space)
    shapes = [[name, list(p.shape)] for name, p in network.model.state_dict().items()]
    inputs = [[list(x.shape[1:]), str(x.dtype)] for x in network.example_inputs]
    groups = [[group.name, group.size] for group in network.groups]
    key = digest(
        [
            [type(network.model).__qualname__, shapes, inputs, groups, space.groups.round_to],
            [asdict(conditions), device_name(conditions.device), _processor(), torch.__version__, LATENCY_VERSION],
        ]
    )
    with ieee(conditions.device):
        return read_or_build(
            cache / f"latency-{key}.json",
            network,
            conditions,
            round_to=space.groups.round_to,
            seed=space.seed,
            lock=cache / LOCK,
            note=note,
        )


def _processor() -> str:
    """Returns the name of the CPU, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
