"""The masked twin: the dense network in which every layer ignores the removed channels, and how outputs are compared.

Decides what a surgically pruned network must equal, and within which tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.network.graph.copies import deep_copy
from autoprune.network.graph.groups import stays
from autoprune.network.graph.modules import named_tensors
from autoprune.network.graph.network import Network
from autoprune.network.surgery.selection import Selection, unit_mask


def masked_twin(network: Network, selection: Selection, *, own: bool = False) -> nn.Module:
    """Returns a copy of the dense model in which every layer ignores the channels that `selection` leaves out.

    The removed channels are still computed; the weights that consume them are zero. Channels that a product of
    activations sums over (dimensions of queries and keys) have no such weights: those that make them are zero. A
    surgically pruned network must give the same output. With `own` the dense model itself becomes the twin.
    """
    twin = network.model if own else deep_copy(network.model)
    _silence(network, twin, selection, keep=False)
    return twin


@contextmanager
def ignoring(network: Network, twin: nn.Module, selection: Selection) -> Iterator[None]:
    """Makes a copy of the dense model a masked twin, and what it was again afterwards: no copy for each of many
    selections.
    """
    before = _silence(network, twin, selection)
    try:
        yield
    finally:
        state = named_tensors(twin)
        with torch.no_grad():
            for name, weight in before.items():
                state[name].copy_(weight)


def _silence(network: Network, twin: nn.Module, selection: Selection, *, keep: bool = True) -> dict[str, Tensor]:
    """Zeroes the weights that consume what `selection` leaves out, in place; returns what they were, by name, where
    that is to `keep`.
    """
    kept = unit_mask(network, selection)
    state = named_tensors(twin)
    before: dict[str, Tensor] = {}

    def remember(name: str) -> None:
        if keep and name not in before:
            before[name] = state[name].detach().clone()

    def zero(name: str, dim: int, gone: np.ndarray, start: int = 0) -> None:
        if gone.any():
            remember(name)
            index = torch.from_numpy(start + np.flatnonzero(gone)).to(state[name].device)
            with torch.no_grad():
                state[name].index_fill_(dim, index, 0.0)

    summed = np.zeros(len(kept), dtype=bool)
    for labels in network.record.contracted:
        units = network.units_of(labels)
        summed[units[units >= 0]] = True
    for links in network.links:
        layer = links.layer
        if links.inputs is not None and layer.in_dim is not None:
            gone = ~stays(links.inputs, kept)
            if layer.out_dim == 0 and len(links.outputs) < len(state[layer.weight]):
                # One of several layers that share a packed weight: its rows alone.
                remember(layer.weight)
                _zero(state[layer.weight][layer.start : layer.start + len(links.outputs)], layer.in_dim, gone)
            else:
                zero(layer.weight, layer.in_dim, gone)
        gone = ~stays(links.outputs, kept | ~summed)
        zero(layer.weight, layer.out_dim, gone, layer.start if layer.out_dim == 0 else 0)
        if layer.bias is not None:
            zero(layer.bias, 0, gone, layer.bias_start)
    return before


def _zero(tensor: Tensor, dim: int, gone: np.ndarray) -> None:
    if gone.any():
        with torch.no_grad():
            tensor.index_fill_(dim, torch.from_numpy(np.flatnonzero(gone)).to(tensor.device), 0.0)


TOLERANCE = 1e-3
"""Largest difference from the masked twin, relative to the largest output: float32 rounding in deep networks, no
more."""


def informative(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns `inputs` with random numbers in place of constant ones: zeros would hide any fault of a network that has
    no biases.
    """
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(x.shape, generator=generator).to(x)
        if x.is_floating_point() and x.numel() and bool((x == x.flatten()[0]).all())
        else x
        for x in inputs
    )


def relative_error(output: object, expected: object) -> float:
    """Returns the largest absolute difference over all output tensors, relative to the largest expected value.

    Infinite where shapes differ, or where one of them is not finite and the other one is not the same.
    """
    pairs = list(zip(torch.utils._pytree.tree_leaves(output), torch.utils._pytree.tree_leaves(expected), strict=True))
    worst = 0.0
    for a, b in pairs:
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
            if a.shape != b.shape:
                return math.inf
            same = (a == b) | (a.isnan() & b.isnan())
            difference = float(torch.where(same, 0.0, (a - b).abs()).max())
            scale = float(torch.where(b.isfinite(), b.abs(), 0.0).max()) or 1.0
            worst = max(worst, difference / scale if math.isfinite(difference) else math.inf)
    return worst
