"""Surgery: builds the smaller network, and its masked twin to check it against.

Decides how a selection of kept channels becomes new parameters and new module attributes. The dense model is never
changed. Knows nothing of how channels are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.errors import PolicyError, nearest
from autoprune.network.attention import refresh_multihead
from autoprune.network.copies import deep_copy
from autoprune.network.emptied import settle
from autoprune.network.groups import module_of, stays
from autoprune.network.hooked_weights import make_weights
from autoprune.network.labels import Labels
from autoprune.network.literals import Numbers, set_attributes
from autoprune.network.recurrent import refresh_recurrent
from autoprune.network.telling import tell, told_numbers
from autoprune.network.trace import Network

Selection = Mapping[str, Labels]
"""Group → ascending positions (0 .. size-1) of the channels that stay, none of them only in a group that is removable.
Groups that are left out stay whole.
"""


def unit_mask(network: Network, selection: Selection) -> np.ndarray:
    """Returns a `(units,)` boolean array: which channels of the whole network stay.

    Raises:
        PolicyError: There is no such group, or it keeps no channel and is not removable, or one that it does not have.
    """
    names = [group.name for group in network.groups]
    for name in selection:
        if name not in names:
            raise PolicyError(f"no pruning group {name!r}{nearest(name, names)}")
    kept = np.ones(sum(group.size for group in network.groups), dtype=bool)
    for group in network.groups:
        chosen = selection.get(group.name)
        if chosen is None:
            continue
        if len(chosen) == 0 and group.name not in network.removable:
            raise PolicyError(f"group {group.name!r} would keep no channel")
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= group.size):
            raise PolicyError(f"group {group.name!r} has channels 0 to {group.size - 1}")
        kept[group.offset : group.offset + group.size] = False
        kept[group.offset + np.asarray(chosen, dtype=np.int64)] = True
    return kept


def kept_indices(units: Labels, kept: np.ndarray) -> Labels:
    """Returns the indices of one parameter dimension that stay; `units` is its row of the index map."""
    if len(kept) == 0:
        return np.arange(len(units))  # every group went whole in an earlier cut
    return np.flatnonzero(stays(units, kept))


def cut(network: Network, selection: Selection) -> nn.Module:
    """Returns a copy of the dense model without the channels that `selection` leaves out.

    Raises:
        PolicyError: See `unit_mask`.
    """
    kept = unit_mask(network, selection)
    smaller: dict[str, Tensor] = {}
    state = _state(network.model)
    for name, dims in network.index_map.items():
        tensor = state[name].detach()
        for dim, units in dims.items():
            index = torch.from_numpy(kept_indices(units, kept)).to(tensor.device)
            if len(index) < tensor.shape[dim]:
                tensor = tensor.index_select(dim, index)
        smaller[name] = tensor
    for name, factors in row_factors(network, kept).items():
        tensor = smaller.get(name, state[name].detach())
        smaller[name] = tensor * factors.to(tensor).view(-1, *[1] * (tensor.ndim - 1))
    model = rebuild(network, smaller, own=True)
    set_attributes(model, attribute_values(network, kept))
    tell(model, told_numbers(network, kept))
    return settle(model, uniform_norms(network, kept))


def row_factors(network: Network, kept: np.ndarray) -> dict[str, Tensor]:
    """Returns the factors of the rows that stay in parameters that make queries: parameter → `(rows,)`.

    An attention that divides by the root of a head's width divides by less when dimensions go; the factors make up for
    it.
    """
    factors: dict[str, Tensor] = {}
    state = _state(network.model)
    for query in network.record.queries:
        stay = stays(network.units_of(query.width), kept)
        if stay.all():
            continue
        ratio = math.sqrt(stay.sum() / len(stay))
        for name in filter(None, (query.weight, query.bias)):
            whole = factors.setdefault(name, torch.ones(state[name].shape[0], dtype=torch.float64))
            whole[torch.from_numpy(query.rows)] = ratio
    for name, whole in factors.items():
        units = network.index_map.get(name, {}).get(0)
        if units is not None:
            factors[name] = whole[torch.from_numpy(kept_indices(units, kept))]
    return factors


def attribute_values(network: Network, kept: np.ndarray) -> Numbers:
    """Returns the integer attributes that change, as `set_attributes` takes them."""
    values: dict[str, dict[str, int | dict[str, int]]] = {}
    for attribute in network.attributes:
        stay = stays(attribute.units, kept)
        if stay.all():
            continue
        own = values.setdefault(attribute.module, {})
        if attribute.place is None:
            own[attribute.name] = int(stay.sum())
        else:
            parts = own.setdefault(attribute.name, {})
            assert isinstance(parts, dict)
            parts[str(attribute.place)] = int(stay.sum())
    return values


def rebuild(network: Network, tensors: Mapping[str, Tensor], *, own: bool = False) -> nn.Module:
    """Returns a copy of the dense model in which `tensors` replace parameters and buffers, module attributes following.

    Tied parameters are replaced wherever they appear. Gradients are not copied. With `own` the copy keeps the very
    tensors, but for those that are the dense model's.
    """
    state = _state(network.model)
    memo: dict[int, Any] = {}
    for name, tensor in tensors.items():
        old = state[name]
        shared = not own or tensor.untyped_storage().data_ptr() == old.untyped_storage().data_ptr()
        tensor = (tensor.clone() if shared else tensor).contiguous()
        memo[id(old)] = (
            nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        )
    for parameter in network.model.parameters():
        if id(parameter) not in memo:
            memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    model = deep_copy(network.model, memo)
    depthwise = {links.module for links in network.links if links.layer.kind == "depthwise"}
    for path, module in model.named_modules():
        refresh_attributes(module, depthwise=path in depthwise)
    return model


def refresh_attributes(module: nn.Module, *, depthwise: bool = False) -> None:
    """Makes a module's attributes that repeat a width say what its parameters say."""
    make_weights(module)
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd):
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        if depthwise:
            module.groups = module.weight.shape[0] // (module.out_channels // module.groups)
        first, second = module.weight.shape[0], module.weight.shape[1] * module.groups
        module.in_channels, module.out_channels = (first, second) if transposed else (second, first)
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        refresh_recurrent(module)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.modules.batchnorm._NormBase,)):
        size = module.weight if module.weight is not None else module.running_mean
        if size is not None:
            module.num_features = size.shape[0]
    elif isinstance(module, nn.LayerNorm):
        if isinstance(weight, Tensor):
            module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        if isinstance(weight, Tensor):
            module.num_channels = weight.shape[0]
    elif isinstance(module, nn.MultiheadAttention):
        refresh_multihead(module)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]


def uniform_norms(network: Network, kept: np.ndarray) -> dict[str, str]:
    """Returns layers of which no input stays → the batch norms behind them, which read a constant; both by path."""
    return {
        links.module: module_of(links.layer.norm)
        for links in network.links
        if links.layer.norm is not None and links.inputs is not None and not len(kept_indices(links.inputs, kept))
    }


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
        state = _state(twin)
        with torch.no_grad():
            for name, weight in before.items():
                state[name].copy_(weight)


def _silence(network: Network, twin: nn.Module, selection: Selection, *, keep: bool = True) -> dict[str, Tensor]:
    """Zeroes the weights that consume what `selection` leaves out, in place; returns what they were, by name, where
    that is to `keep`.
    """
    kept = unit_mask(network, selection)
    state = _state(twin)
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


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
