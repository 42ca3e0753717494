"""What it costs to remove a branch whole: the error of the sum that it is added to, found on calibration images.

A layer that loses all of its inputs loses all of its output, so that error tables alone call every branch equally dear.
What counts is how much of what is behind it the branch carries: a block that adds a tenth to a residual stream can lose
a tenth, at whatever width. Decides where that is measured, and how the error curves follow. Knows nothing of searches.

Curves that follow it are better for widths alone too: on ResNet-20 / CIFAR-10 (JPEG copy, 2,000 images of the test
half, no fine-tuning) the additive solution gives 80.7 instead of 77.4 % at 0.50 of the MACs and 70.1 instead of 66.2 %
at 0.35 by `obs`, 80.3 instead of 77.9 % and 71.1 instead of 69.6 % by `l1`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.network.calibration.moments import Statistics
from autoprune.network.criteria.tables import Tables
from autoprune.network.graph.copies import deep_copy
from autoprune.network.graph.groups import Links, PruningGroup, is_whole
from autoprune.network.graph.modules import evaluating
from autoprune.network.graph.network import Network
from autoprune.network.surgery.cut import uniform_norms
from autoprune.network.surgery.selection import unit_mask
from autoprune.network.surgery.sizes import uncounted
from autoprune.network.surgery.twin import ignoring

IMAGES, FEW = 64, 16
"""Images that a removal is measured on at most, and large ones at least: every block runs once more for each group that
is removed in it."""
ELEMENTS = 3 * 128 * 128 * 16
"""Elements of all these images from which on fewer are used."""
_ALIVE = 1e-6
"""A module whose output varies less than this part of what it did has lost its input."""
_NONE = np.empty(0, dtype=np.int64)


def with_depth(tables: Tables, removal: Mapping[str, float]) -> Tables:
    """Returns the tables with the curves of the groups in `removal` scaled, so that width 0 has the error given there.

    The whole curve is scaled: a part of a branch can lose no more of the sum than all of it.
    """
    return {
        group: {name: _scaled(curve, removal[group]) for name, curve in curves.items()} if group in removal else curves
        for group, curves in tables.items()
    }


def _scaled(curve: Any, error: float) -> tuple[float, ...]:
    values = tuple(curve)
    return tuple(error * value / values[0] for value in values) if values[0] > 0 else values


def removal_errors(network: Network, images: Tensor, statistics: Statistics) -> dict[str, float]:
    """Returns, by group, how much of what is behind it would go with it, where a path around it is left: 0 to about 1.

    The group's consumers then give a constant, their mean. The error is taken at the output of the smallest module
    around the group that still depends on its input: mean square of the difference over the variance. Groups whose
    consumers read other channels too are left out, as the tables know of the refit, and groups that all runs through.

    Args:
        network: The traced network.
        images: Calibration images `(B, ...)`, of which the first `IMAGES` are used, of large ones `FEW`.
        statistics: Moments of what the consumers read.
    """
    network = replace(network, removable=frozenset(group.name for group in network.groups))  # to be tried, no more
    around = {group.name: _container(group) for group in network.groups if _alone(network, group)}
    twin = deep_copy(network.model)
    # The first pass finds for each group how far out the path around it joins again, from two images.
    places: dict[str, str] = {}

    def join(path: str, run: _Run) -> None:
        for name in [n for n, within in around.items() if n not in places and _encloses(path, within)]:
            with _without(network, twin, name, statistics):
                if run(True) is not None:
                    places[name] = path

    _visit(network, twin, images[:2], join)
    found: dict[str, float] = {}

    def measure(path: str, run: _Run) -> None:
        for name in [n for n, place in places.items() if place == path and n not in found]:
            with _without(network, twin, name, statistics):
                found[name] = run(False) or 1.0

    enough = max(FEW, min(IMAGES, ELEMENTS // max(1, images[0].numel())))
    _visit(network, twin, images[:enough], measure)
    return found


_Run = Callable[[bool], float | None]
"""Runs a module of the twin on the input that the dense one just had; returns its output's error. See `_error` for what
it is told.
"""


def _visit(network: Network, twin: nn.Module, images: Tensor, visit: Callable[[str, _Run], None]) -> None:
    """Runs the dense network; calls `visit` behind every call of a module that holds others, the inner ones first."""
    inside = dict(twin.named_modules())

    def hook(path: str) -> Callable[..., None]:
        def called(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            power = cache(partial(_variance, output))  # once for all that is tried at this call

            def run(alive: bool) -> float | None:
                with uncounted():
                    return _error(inside[path](*args, **kwargs), output, power(), alive=alive)

            visit(path, run)

        return called

    outer = [(path, module) for path, module in network.model.named_modules() if any(True for _ in module.children())]
    handles = [module.register_forward_hook(hook(path), with_kwargs=True) for path, module in outer]
    try:
        with evaluating(network.model), evaluating(twin), torch.no_grad():
            network.model(images)
    finally:
        for handle in handles:
            handle.remove()


def _alone(network: Network, group: PruningGroup) -> bool:
    """Whether the layers that read a group read nothing else, and there is one."""
    kept = unit_mask(network, {group.name: _NONE})
    readers = [links for links in network.links if links.inputs is not None and _reads(links, group)]
    return bool(readers) and all(is_whole(links.inputs, kept) for links in readers if links.inputs is not None)


def _reads(links: Links, group: PruningGroup) -> bool:
    units = links.inputs
    return units is not None and bool(((units >= group.offset) & (units < group.offset + group.size)).any())


def _container(group: PruningGroup) -> str:
    """Returns the path of the smallest module that holds the group's producers and consumers."""
    parts = [path.split(".")[:-1] for path in (*group.producers, *group.consumers)]
    common = parts[0]
    for other in parts[1:]:
        same = [a == b for a, b in zip(common, other, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    return ".".join(common)


def _encloses(path: str, within: str) -> bool:
    return not path or within == path or within.startswith(f"{path}.")


@contextmanager
def _without(network: Network, twin: nn.Module, name: str, statistics: Statistics) -> Iterator[None]:
    """Makes the twin do without a group: what read it alone gives its mean, as a refit leaves it."""
    kept = unit_mask(network, {name: _NONE})
    state = dict(twin.named_parameters(remove_duplicate=False))
    norms = uniform_norms(network, kept)
    before: list[tuple[Tensor, Tensor]] = []

    def put(tensor: Tensor, value: Tensor) -> None:
        before.append((tensor, tensor.clone()))
        tensor.copy_(value)

    with torch.no_grad():
        for links in network.links:
            moments = statistics.get(links.site)
            if links.inputs is None or moments is None or not is_whole(links.inputs, kept):
                continue
            norm = twin.get_submodule(norms[links.module]) if links.module in norms else None
            bias = None if links.layer.bias is None else state[links.layer.bias]
            if norm is not None and isinstance(norm.running_mean, Tensor):
                put(norm.running_mean, torch.zeros_like(norm.running_mean) if bias is None else bias)
            elif bias is not None:
                rows = slice(links.layer.start, links.layer.start + len(links.outputs))
                weight = state[links.layer.weight][rows].flatten(1)
                groups = moments.mean.shape[0]
                mean = (weight.reshape(groups, -1, weight.shape[1]) @ moments.mean.to(weight).unsqueeze(2)).reshape(-1)
                own = bias[links.layer.bias_start : links.layer.bias_start + len(mean)]
                put(own, own + mean)
        try:
            with ignoring(network, twin, {name: _NONE}):
                yield
        finally:
            for tensor, value in reversed(before):
                tensor.copy_(value)


def _error(removed: Any, dense: Any, power: float, *, alive: bool) -> float | None:
    """Returns the error of a module's output relative to the `power` of the dense one; None where that is 0, or where
    the output must be `alive` and does not depend on its input any more.
    """
    if power <= 0.0 or (alive and _variance(removed) <= _ALIVE * power):
        return None
    return sum(_power(a, b) for a, b in zip(_tensors(removed), _tensors(dense), strict=True)) / power


def _tensors(output: Any) -> Sequence[Tensor]:
    return [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point() and x.ndim]


def _variance(output: Any) -> float:
    """Returns the variance over the batch, summed over everything else."""
    return sum(_power(x, x.float().mean(0)) for x in _tensors(output))


def _power(x: Tensor, other: Tensor) -> float:
    """Returns the squared difference, summed over everything but the batch; its mean over that."""
    return float((x.float() - other).square_().sum(dtype=torch.float64)) / len(x)
