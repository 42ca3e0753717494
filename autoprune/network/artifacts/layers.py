"""What a traced network looks like to a person: groups, shares of the cost, frozen layers, layers before and after.

Decides what is told about a network, as plain values. Knows nothing of how it is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from autoprune.cost import MACS, PARAMS
from autoprune.network.graph.groups import stays
from autoprune.network.graph.labels import Labels
from autoprune.network.graph.network import Network
from autoprune.network.surgery.selection import Selection, unit_mask
from autoprune.policy import Group


def describe(network: Network, groups: Sequence[Group]) -> dict[str, Any]:
    """Returns groups, frozen layers, notes and dense costs as plain JSON values.

    `narrowest` are the costs with every one of `groups` at its smallest width: no budget below them can be met.
    A group's `macs_share` and `params_share` are the parts of the dense cost in which it takes part; several groups
    share a layer, so they add up to more than one.
    """
    dense = network.cost_model.dense()
    searched = {group.name: group for group in groups}
    rows = []
    for group in network.groups:
        shares = {
            f"{name}_share": network.cost_model.share(name, group.name).cost(name, {}) / dense[name]
            for name in (MACS, PARAMS)
        }
        own = searched.get(group.name)
        rows.append(
            {
                "name": group.name,
                "size": group.size,
                "stage": group.stage,
                "scope": own.scope if own else None,
                "widths": [own.widths[0], own.widths[-1]] if own else None,
                **shares,
                "producers": list(group.producers),
                "consumers": list(group.consumers),
                "approximate": group.approximate,
            }
        )
    narrowest = {group.name: group.widths[0] for group in groups}
    return {
        "schema": 1,
        "pruning": network.pruning,
        "dense": dense,
        "narrowest": network.cost_model.costs(narrowest),
        "input_shape": [int(n) for n in network.example_inputs[0].shape[1:]],
        "groups": rows,
        "frozen": [{"name": f.name, "size": f.size, "reason": f.reason} for f in network.frozen],
        "notes": list(network.notes),
    }


def layer_table(network: Network, selection: Selection) -> list[dict[str, Any]]:
    """Returns for every layer with weights its width, MACs and parameters before and after, in the order of the
    graph.
    """
    kept = unit_mask(network, selection)
    parameters = {parameter.name: parameter for parameter in network.record.parameters}
    rows: dict[str, dict[str, Any]] = {}
    counted: set[str] = set()
    for links in network.links:
        layer = links.layer
        if layer.kind == "norm":
            continue
        macs = [0, 0]
        if layer.product is not None:
            product = network.record.products[layer.product]
            for place, mask in enumerate((np.ones_like(kept), kept)):
                macs[place] = _product(product.factor, [_size(network, dim, mask) for dim in product.dims])
        params = [0, 0]
        for name in filter(None, (layer.weight, layer.bias)):
            parameter = parameters[name]
            dims = [n if d is None else d for n, d in zip(parameter.shape, parameter.dims, strict=True)]
            for place, mask in enumerate((np.ones_like(kept), kept)):
                params[place] += _product(1, [_size(network, dim, mask) for dim in dims])
        # The gates of a recurrent layer repeat its hidden units: each counts once.
        _, first = np.unique(layer.outputs, return_index=True)
        units = links.outputs[first]
        row = {
            "module": links.module,
            "kind": layer.kind,
            "width_before": len(units),
            "width_after": int(stays(units, kept).sum()),
            "macs_before": macs[0] // network.record.batch,
            "macs_after": macs[1] // network.record.batch,
            "params_before": params[0],
            "params_after": params[1],
        }
        # A module that is called twice: its products add up, its parameters do not.
        known = rows.setdefault(
            links.module, {**row, "macs_before": 0, "macs_after": 0, "params_before": 0, "params_after": 0}
        )
        costs = ["macs_before", "macs_after"] + ([] if layer.weight in counted else ["params_before", "params_after"])
        counted.add(layer.weight)
        for cost in costs:
            known[cost] += row[cost]
    return list(rows.values())


def _size(network: Network, dim: Labels | int, kept: np.ndarray) -> int:
    if isinstance(dim, int):
        return dim
    return int(stays(network.units_of(dim), kept).sum())


def _product(factor: int, sizes: Sequence[int]) -> int:
    for size in sizes:
        factor *= size
    return factor
