"""Which sizes a forward pass computes from a width that is not theirs, so that it has to be told them (`sizes`).

Decides which calls of which modules write down the size of a group that broke the pruned network, and keeps the sizes
that are told where more groups can be pruned with them. Knows nothing of how a module is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from autoprune.network.graph.assembly import assemble
from autoprune.network.graph.copies import deep_copy
from autoprune.network.graph.modules import evaluating
from autoprune.network.graph.network import Network, Told
from autoprune.network.graph.record import Size
from autoprune.network.surgery.sizes import Sizes, tell, told_numbers
from autoprune.network.tracing.checked_widths import with_checked_widths
from autoprune.network.tracing.verify import BREAKS, verified


def with_told_sizes(network: Network) -> Network:
    """Returns the network with sizes told where that frees groups that broke, else the network itself."""
    if not any(reason.startswith(BREAKS) for reason in network.broken.values()):
        return network
    whole = replace(network, assembly=assemble(network.record, {}), broken={})
    told = _calls(whole, set(network.broken))
    if not told:
        return network
    whole = replace(whole, told=told)
    dense = told_numbers(whole, np.ones(sum(group.size for group in whole.groups), dtype=bool))
    again = verified(replace(whole, model=tell(deep_copy(network.model), dense)), heal=with_checked_widths)
    return again if len(again.groups) > len(network.groups) else network


def _calls(network: Network, broken: set[str]) -> tuple[Told, ...]:
    """Returns the calls of the modules that write down a size of a broken group."""
    inside = np.zeros(sum(group.size for group in network.groups), dtype=bool)
    for group in network.groups:
        if group.name in broken:
            inside[group.offset : group.offset + group.size] = True
    by_module: dict[str, list[Size]] = {}
    # PyTorch's own norms and recurrent modules know what they make by themselves.
    known = {p for p, m in network.model.named_modules() if type(m).__module__.startswith("torch.nn.")}
    for size in network.record.literals:
        if not size.shapes or (size.made and size.module in known):
            continue
        by_module.setdefault(size.module, []).append(size)
    wanted = {
        path: sizes for path, sizes in by_module.items() if any(_touches(network, size, inside) for size in sizes)
    }
    found: list[Told] = []
    for path, seen in _watched(network, wanted).items():
        for made in (False, True):
            found += _matched(path, seen[made], [size for size in wanted[path] if size.made == made])
    return tuple(found)


def _touches(network: Network, size: Size, inside: np.ndarray) -> bool:
    units = network.units_of(size.labels).ravel()
    return bool(inside[units[units >= 0]].any())


_Shapes = list[tuple[tuple[int, ...], ...]]
_Seen = tuple[_Shapes, _Shapes]
"""Shapes of the results of `view` and its kin, and of calls that are counted apart (`Size.made`)."""


def _watched(network: Network, paths: Iterable[str]) -> dict[str, _Seen]:
    """Returns what the calls that are told sizes give in the first forward pass of each module, in their order.

    A module whose second forward pass makes other calls, for it keeps something of the first, is left out: its calls
    cannot be told apart by their number.
    """
    model = deep_copy(network.model)
    modules = dict(model.named_modules(remove_duplicate=False))
    seen: dict[str, _Seen] = {}
    for path in paths:
        module: Any = modules[path]
        forward = module.forward

        def watching(*args: Any, _path: str = path, _forward: Any = forward, **kwargs: Any) -> Any:
            shapes: _Seen = ([], [])
            with Sizes({}, shapes):
                result = _forward(*args, **kwargs)
            seen.setdefault(_path, shapes)
            return result

        module.forward = watching
    with evaluating(model), torch.no_grad():
        model(*network.example_inputs)
        first = dict(seen)
        seen.clear()
        model(*network.example_inputs)
    return {path: shapes for path, shapes in first.items() if seen.get(path) == shapes}


def _matched(path: str, seen: _Shapes, sizes: Sequence[Size]) -> list[Told]:
    """Finds the call that each size was written down in: both are in the order of the forward pass."""
    found: list[Told] = []
    nodes: dict[str, list[Size]] = {}
    for size in sizes:
        nodes.setdefault(size.node, []).append(size)
    after = 0
    for own in nodes.values():
        call = next((k for k in range(after, len(seen)) if seen[k] == own[0].shapes), None)
        if call is None:
            continue
        after = call + 1
        # A dimension in which channels repeat for every image of a batch has no number of its own; one in which they
        # repeat for every pixel (a map that is flattened to a number that is written down) has.
        found += [
            Told(path, -1 - call if size.made else call, size.axis, size.labels)
            for size in own
            if size.apart or len(np.unique(size.labels)) == len(size.labels)
        ]
    return found
