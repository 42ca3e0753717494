"""Surgery: builds the smaller network.

Decides how a selection of kept channels becomes new parameters and new module attributes. The dense model is never
changed. Knows nothing of how channels are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.network.graph.attributes import Numbers, set_attributes
from autoprune.network.graph.copies import deep_copy
from autoprune.network.graph.groups import module_of, stays
from autoprune.network.graph.modules import named_tensors
from autoprune.network.graph.network import Network
from autoprune.network.surgery.refresh import refresh_attributes
from autoprune.network.surgery.selection import Selection, kept_indices, unit_mask
from autoprune.network.surgery.sizes import tell, told_numbers
from autoprune.network.surgery.stand_ins import settle


def cut(network: Network, selection: Selection) -> nn.Module:
    """Returns a copy of the dense model without the channels that `selection` leaves out.

    Raises:
        PolicyError: See `unit_mask`.
    """
    kept = unit_mask(network, selection)
    smaller: dict[str, Tensor] = {}
    state = named_tensors(network.model)
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
    state = named_tensors(network.model)
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
    state = named_tensors(network.model)
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


def uniform_norms(network: Network, kept: np.ndarray) -> dict[str, str]:
    """Returns layers of which no input stays → the batch norms behind them, which read a constant; both by path."""
    return {
        links.module: module_of(links.layer.norm)
        for links in network.links
        if links.layer.norm is not None and links.inputs is not None and not len(kept_indices(links.inputs, kept))
    }
