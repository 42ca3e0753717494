"""Surgery: builds the smaller network, and its masked twin to check it against.

Decides how a selection of kept channels becomes new parameters and new module attributes. The dense model is never
changed. Knows nothing of how channels are chosen.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.errors import PolicyError, nearest
from autoprune.network.attention import refresh_multihead
from autoprune.network.groups import stays
from autoprune.network.labels import Labels
from autoprune.network.literals import set_attributes
from autoprune.network.recurrent import refresh_recurrent
from autoprune.network.trace import Network

Selection = Mapping[str, Labels]
"""Group → ascending positions (0 .. size-1) of the channels that stay. Groups that are left out stay whole."""


def unit_mask(network: Network, selection: Selection) -> np.ndarray:
    """Returns a `(units,)` boolean array: which channels of the whole network stay.

    Raises:
        PolicyError: There is no such group, or it keeps no channel, or one that it does not have.
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
        if len(chosen) == 0:
            raise PolicyError(f"group {group.name!r} would keep no channel")
        if chosen.min() < 0 or chosen.max() >= group.size:
            raise PolicyError(f"group {group.name!r} has channels 0 to {group.size - 1}")
        kept[group.offset : group.offset + group.size] = False
        kept[group.offset + np.asarray(chosen)] = True
    return kept


def kept_indices(units: Labels, kept: np.ndarray) -> Labels:
    """Returns the indices of one parameter dimension that stay; `units` is its row of the index map."""
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
    model = rebuild(network, smaller)
    set_attributes(model, attribute_values(network, kept))
    return model


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


def attribute_values(network: Network, kept: np.ndarray) -> dict[str, dict[str, int]]:
    """Returns the integer attributes that change: module path → name → new value."""
    values: dict[str, dict[str, int]] = {}
    for attribute in network.attributes:
        stay = stays(attribute.units, kept)
        if not stay.all():
            values.setdefault(attribute.module, {})[attribute.name] = int(stay.sum())
    return values


def rebuild(network: Network, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Returns a copy of the dense model in which `tensors` replace parameters and buffers, module attributes following.

    Tied parameters are replaced wherever they appear. Gradients are not copied.
    """
    state = _state(network.model)
    memo: dict[int, object] = {}
    for name, tensor in tensors.items():
        old = state[name]
        if isinstance(old, nn.Parameter):
            memo[id(old)] = nn.Parameter(tensor.clone().contiguous(), requires_grad=old.requires_grad)
        else:
            memo[id(old)] = tensor.clone().contiguous()
    for parameter in network.model.parameters():
        if id(parameter) not in memo:
            memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    model = copy.deepcopy(network.model, memo)
    depthwise = {links.module for links in network.links if links.layer.kind == "depthwise"}
    for path, module in model.named_modules():
        refresh_attributes(module, depthwise=path in depthwise)
    return model


def refresh_attributes(module: nn.Module, *, depthwise: bool = False) -> None:
    """Makes a module's attributes that repeat a width say what its parameters say."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd):
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        if depthwise:
            module.groups = module.weight.shape[0] // (module.out_channels // module.groups)
        first, second = module.weight.shape[0], module.weight.shape[1] * module.groups
        module.in_channels, module.out_channels = (first, second) if transposed else (second, first)
    elif isinstance(module, nn.RNNBase):
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


def masked_twin(network: Network, selection: Selection) -> nn.Module:
    """Returns a copy of the dense model in which every layer ignores the channels that `selection` leaves out.

    The removed channels are still computed; the weights that consume them are zero. Channels that a product of
    activations sums over (dimensions of queries and keys) have no such weights: those that make them are zero. A
    surgically pruned network must give the same output.
    """
    kept = unit_mask(network, selection)
    twin = copy.deepcopy(network.model)
    state = _state(twin)
    summed = np.zeros(len(kept), dtype=bool)
    for labels in network.record.contracted:
        units = network.units_of(labels)
        summed[units[units >= 0]] = True
    for links in network.links:
        layer = links.layer
        weight = state[layer.weight]
        if layer.out_dim == 0:  # the rows that this layer uses
            weight = weight[layer.start : layer.start + len(links.outputs)]
        if links.inputs is not None and layer.in_dim is not None:
            _zero(weight, layer.in_dim, ~stays(links.inputs, kept))
        gone = ~stays(links.outputs, kept | ~summed)
        _zero(weight, layer.out_dim, gone)
        if layer.bias is not None:
            _zero(state[layer.bias][layer.bias_start : layer.bias_start + len(gone)], 0, gone)
    return twin


def _zero(tensor: Tensor, dim: int, gone: np.ndarray) -> None:
    if gone.any():
        with torch.no_grad():
            tensor.index_fill_(dim, torch.from_numpy(np.flatnonzero(gone)).to(tensor.device), 0.0)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
