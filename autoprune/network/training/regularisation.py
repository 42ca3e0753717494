"""Regularisation: what makes channels small while the dense network trains, so that cutting them costs less.

Decides the kinds, what a strength means, and where they act: on all coupled places of a channel (every index of every
parameter that goes with it), never on one layer of several. Knows nothing of losses, optimizers or how channels are
ranked.

The papers add a penalty to the loss. Here the penalty acts after each optimizer step, as its proximal operator: a
strength then means the same for SGD and AdamW, and lasso gives exact zeros. Strengths are relative, and are spent
evenly over the stage however long it is, so that they suit the short and the long rungs of one ladder:

- `bn_l1` takes `strength` times the layer's mean absolute scale off every normalisation scale (soft threshold).
- `group_lasso` takes `strength` times the group's mean channel norm off the norm of every channel.
- `growing_l2` multiplies the channels that will go by `exp(-strength)` in all, ever faster.
- `targeted_dropout` drops each channel that will go with probability `strength` at every step.

The first two act on every channel of a pruning group and let the training choose; the last two on the channels that the
policy removes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from autoprune.errors import InputError, nearest
from autoprune.network.graph.labels import Labels
from autoprune.network.graph.network import Network
from autoprune.network.surgery.selection import Selection, unit_mask

STRENGTHS = {"bn_l1": 0.25, "group_lasso": 0.1, "growing_l2": 5.0, "targeted_dropout": 0.5}
"""Kinds of regularisation and their default strengths."""


@dataclass(frozen=True, slots=True)
class Regularisation:
    """A stage on the dense network before it is cut: its kind, its strength (None: the kind's default), and the
    `share` of a rung's epochs that is spent on it.
    """

    kind: str
    strength: float | None = None
    share: float = 0.3

    def __post_init__(self) -> None:
        if self.kind not in STRENGTHS:
            raise InputError(f"unknown regularisation {self.kind!r}{nearest(self.kind, STRENGTHS)}")
        if self.strength is not None and not 0 <= self.strength < math.inf:
            raise InputError(f"regularisation.strength must be at least 0, got {self.strength}")
        if self.kind == "targeted_dropout" and self.strength is not None and self.strength > 1:
            raise InputError(f"the strength of targeted_dropout is a probability, got {self.strength}")
        if not 0 < self.share < 1:
            raise InputError(f"regularisation.share must lie in (0, 1), got {self.share}")

    @property
    def force(self) -> float:
        """The strength that is applied."""
        return STRENGTHS[self.kind] if self.strength is None else self.strength


class Regulariser(Protocol):
    """What a stage of training does to the weights at every step, besides lowering the loss."""

    def hiding(self) -> AbstractContextManager[None]:
        """Returns the context in which the forward and the backward pass of a step run."""
        ...

    def shrink(self, progress: float, steps: int) -> None:
        """Shrinks weights after an optimizer step; `progress` in (0, 1] of a stage of `steps` steps."""
        ...


@dataclass(frozen=True, slots=True)
class _Place:
    """One dimension of one parameter: `units[i]` is the channel of index i; indices that stay point past the last."""

    parameter: Tensor
    dim: int
    units: Tensor

    def spread(self, factors: Tensor) -> Tensor:
        """Returns `factors` `(units + 1,)` by index, shaped to be multiplied with the parameter."""
        shape = [1] * self.parameter.dim()
        shape[self.dim] = -1
        return factors[self.units].view(shape)


def _places(network: Network, entries: Iterator[tuple[str, int, Labels]]) -> tuple[_Place, ...]:
    parameters = dict(network.model.named_parameters(remove_duplicate=False))
    count = sum(group.size for group in network.groups)
    found = []
    for name, dim, units in entries:
        # An index of an attention belongs to a head and to a dimension: it has a place in each.
        for own in units.reshape(len(units), -1).T:
            if name in parameters and (own >= 0).any():
                index = torch.from_numpy(np.where(own < 0, count, own)).to(parameters[name].device)
                found.append(_Place(parameters[name], dim, index))
    return tuple(found)


def coupled_places(network: Network) -> tuple[_Place, ...]:
    """Returns every place of every channel in the parameters of `network.model`."""
    entries = ((name, dim, units) for name, dims in network.index_map.items() for dim, units in dims.items())
    return _places(network, entries)


def channel_norms(network: Network, places: tuple[_Place, ...]) -> Tensor:
    """Returns the Euclidean norm of every channel over all of its places, `(units + 1,)`; the last one is no channel's.

    A weight between two channels counts for both.
    """
    count = sum(group.size for group in network.groups)
    total = torch.zeros(count + 1, device=places[0].parameter.device)
    for place in places:
        other = [dim for dim in range(place.parameter.dim()) if dim != place.dim]
        squares = place.parameter.detach().float().square()
        total.index_add_(0, place.units, squares.sum(other) if other else squares)
    return total.sqrt()


class _Shrinking:
    """A regulariser that hides nothing."""

    def hiding(self) -> AbstractContextManager[None]:
        return nullcontext()


class _BatchNormLasso(_Shrinking):
    def __init__(self, network: Network, selection: Selection, strength: float) -> None:
        scales = ((n.layer.weight, 0, n.outputs) for n in network.links if n.layer.kind == "norm")
        self.places = _places(network, scales)
        if not self.places:
            raise InputError(
                "regularisation bn_l1 acts on the scales of normalisations, and no pruning group of this network has "
                "any; group_lasso works for every network"
            )
        last = sum(group.size for group in network.groups)
        # What is no channel of a group is left alone.
        self.taken = [
            torch.where(place.units < last, strength * place.parameter.detach()[place.units < last].abs().mean(), 0.0)
            for place in self.places
        ]

    @torch.no_grad()
    def shrink(self, progress: float, steps: int) -> None:
        for place, taken in zip(self.places, self.taken, strict=True):
            scale = place.parameter
            scale.copy_(scale.sign() * (scale.abs() - taken / steps).clamp_min(0))


class _GroupLasso(_Shrinking):
    def __init__(self, network: Network, selection: Selection, strength: float) -> None:
        self.network, self.places = network, coupled_places(network)
        norms = channel_norms(network, self.places)
        self.taken = torch.zeros_like(norms)
        for group in network.groups:
            units = slice(group.offset, group.offset + group.size)
            self.taken[units] = strength * norms[units].mean()

    @torch.no_grad()
    def shrink(self, progress: float, steps: int) -> None:
        norms = channel_norms(self.network, self.places)
        factors = (1 - self.taken / steps / norms.clamp_min(1e-12)).clamp_min(0)
        for place in self.places:
            place.parameter.mul_(place.spread(factors).to(place.parameter.dtype))


class _GrowingDecay(_Shrinking):
    def __init__(self, network: Network, selection: Selection, strength: float) -> None:
        self.places, self.strength = coupled_places(network), strength
        self.going = _going(network, selection, self.places)

    @torch.no_grad()
    def shrink(self, progress: float, steps: int) -> None:
        # 2 * (k - 1/2) / steps, summed over the steps k, gives `steps`.
        exponent = self.strength * (2 * progress - 1 / steps) / steps
        factors = torch.where(self.going, math.exp(-exponent), 1.0)
        for place in self.places:
            place.parameter.mul_(place.spread(factors).to(place.parameter.dtype))


class _TargetedDropout:
    def __init__(self, network: Network, selection: Selection, strength: float) -> None:
        # A channel whose consumers ignore it is gone, whatever lies in between (see `twin.masked_twin`).
        entries = {
            (links.layer.weight, links.layer.in_dim): links.inputs
            for links in network.links
            if links.inputs is not None and links.layer.in_dim is not None
        }
        self.places = _places(
            network, ((name, dim, units) for (name, dim), units in entries.items() if dim is not None)
        )
        self.strength = strength
        self.going = _going(network, selection, self.places) if self.places else torch.zeros(0, dtype=torch.bool)

    @contextmanager
    def hiding(self) -> Iterator[None]:
        dropped = self.going & (torch.rand(len(self.going), device=self.going.device) < self.strength)
        hidden: list[tuple[_Place, Tensor, Tensor]] = []
        with torch.no_grad():
            for place in self.places:
                index = dropped[place.units].nonzero().squeeze(1)
                hidden.append((place, index, place.parameter.index_select(place.dim, index)))
                place.parameter.index_fill_(place.dim, index, 0.0)
        try:
            yield
        finally:
            with torch.no_grad():
                for place, index, values in reversed(hidden):
                    place.parameter.index_copy_(place.dim, index, values)
                    if place.parameter.grad is not None:
                        place.parameter.grad.index_fill_(place.dim, index, 0.0)

    def shrink(self, progress: float, steps: int) -> None:
        pass  # dropping is all


def _going(network: Network, selection: Selection, places: tuple[_Place, ...]) -> Tensor:
    """Returns which channels go, `(units + 1,)`; the last entry stands for what stays."""
    gone = np.append(~unit_mask(network, selection), False)
    return torch.from_numpy(gone).to(places[0].parameter.device)


REGULARISERS: dict[str, Callable[[Network, Selection, float], Regulariser]] = {
    "bn_l1": _BatchNormLasso,
    "group_lasso": _GroupLasso,
    "growing_l2": _GrowingDecay,
    "targeted_dropout": _TargetedDropout,
}
"""Kind → builder for a network whose model is about to be trained, in place.

Sources: `bn_l1`: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017.
`group_lasso`: Wen et al., Learning Structured Sparsity in Deep Neural Networks, NIPS 2016; over coupled places as in
Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023. `growing_l2`: Wang et al., Neural Pruning via Growing
Regularization (GReg-1), ICLR 2021. `targeted_dropout`: Gomez et al., Learning Sparse Networks Using Targeted Dropout,
2019, with whole channels as units.
"""


def regulariser_of(network: Network, selection: Selection, settings: Regularisation) -> Regulariser:
    """Returns the regulariser of `settings` for `network.model`, which it will change.

    Args:
        network: The network that is about to be trained.
        selection: The channels that the policy keeps.
        settings: Kind and strength.

    Raises:
        InputError: The kind cannot act on this network.
    """
    return REGULARISERS[settings.kind](network, selection, settings.force)
