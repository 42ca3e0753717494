"""Networks that were cut once and can be cut again: the same groups with the channels that are left.

Decides how what a trace wrote down is renumbered for a smaller model. Knows nothing of when networks are cut, or why.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import nn

from autoprune.network.graph.groups import GONE, Assembly, IndexMap, Links, stays
from autoprune.network.graph.labels import Labels
from autoprune.network.graph.network import Network
from autoprune.network.graph.record import Layer, Query
from autoprune.network.surgery.selection import Selection, kept_indices, unit_mask


def shifted(network: Network, name: str, index: int, kept: np.ndarray) -> int:
    """Returns where the entry `index` along a parameter's first dimension, or the next one that stays, is found."""
    units = network.index_map.get(name, {}).get(0)
    return index if units is None else int(np.searchsorted(kept_indices(units, kept), index))


def starts(network: Network, layer: Layer, kept: np.ndarray) -> tuple[int, int]:
    """Returns where the rows that a layer uses begin in the smaller weight, and their entries in the smaller bias."""
    bias_start = 0 if layer.bias is None else shifted(network, layer.bias, layer.bias_start, kept)
    return shifted(network, layer.weight, layer.start, kept), bias_start


def narrowed(network: Network, selection: Selection, model: nn.Module) -> Network:
    """Returns `network` as it is after `cut`: groups, index map, links and costs of the smaller `model`.

    The labels of the trace stay those of the dense network, so groups cannot be frozen any more.
    """
    kept = unit_mask(network, selection)
    new = np.where(kept, np.cumsum(kept) - 1, -1)

    def shrunk(units: Labels) -> Labels:
        stay = units[kept_indices(units, kept)]
        return np.where(stay < 0, -1, new[np.maximum(stay, 0)])

    groups, offset = [], 0
    for group in network.groups:
        size = int(kept[group.offset : group.offset + group.size].sum())
        groups.append(replace(group, size=size, offset=offset))
        offset += size
    index_map: IndexMap = {
        name: {dim: shrunk(units) for dim, units in dims.items()} for name, dims in network.index_map.items()
    }

    def narrower(links: Links) -> Links:
        start, bias_start = starts(network, links.layer, kept)
        return replace(
            links,
            layer=replace(links.layer, start=start, bias_start=bias_start),
            inputs=None if links.inputs is None else shrunk(links.inputs),
            outputs=shrunk(links.outputs),
        )

    links = tuple(narrower(links) for links in network.links)
    costs = replace(network.cost_model, sizes=tuple(group.size for group in groups))
    unit = network.assembly.unit
    left = np.append(np.where(kept, new, GONE), [GONE, -1])  # the last two are for -2 and for -1
    assembly = Assembly(tuple(groups), network.frozen, index_map, links, costs, left[unit])
    followers = tuple(replace(attribute, units=shrunk(attribute.units)) for attribute in network.attributes)
    queries = tuple(replace(query, rows=_renumbered_rows(network, query, kept)) for query in network.record.queries)
    record = replace(network.record, queries=queries)
    return replace(network, model=model, assembly=assembly, record=record, followers=followers)


def _renumbered_rows(network: Network, query: Query, kept: np.ndarray) -> Labels:
    """Returns where the rows that make queries lie in the smaller parameter."""
    units = network.index_map.get(query.weight, {}).get(0)
    if units is None:
        return query.rows
    stay = stays(units, kept)
    rows: Labels = (np.cumsum(stay) - 1)[query.rows[stay[query.rows]]]
    return rows
