"""Which rows of a parameter make the queries of an attention.

`scaled_dot_product_attention` divides by the root of a head's width unless it is told a scale. When dimensions of the
heads go, the queries take the change: their rows are multiplied by the root of new over old width. Decides which rows
these are, by sending row numbers through the operators between the layer and the attention. Knows nothing of labels.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoprune.network.graph.labels import Labels
from autoprune.network.graph.rules.table import operator_name, operator_of


def query_rows(node: torch.fx.Node, names: dict[str, str]) -> tuple[str, str | None, Labels] | None:
    """Returns weight, bias and rows that make the queries of an attention, or None where that cannot be told.

    Args:
        node: The call of `scaled_dot_product_attention`.
        names: Placeholder → qualified name of the parameter.
    """
    query, *others = [_source(arg) for arg in node.args[:3]]
    if query is None:
        return None
    for other in others:
        if other is not None and other[0] == query[0] and np.intersect1d(other[2], query[2]).size:
            return None  # the same rows make keys too
    weight, bias, rows = query
    if weight not in names or (bias is not None and bias not in names):
        return None
    return names[weight], None if bias is None else names[bias], rows


def _source(node: Any) -> tuple[str, str | None, Labels] | None:
    chain: list[torch.fx.Node] = []
    while isinstance(node, torch.fx.Node) and node.op == "call_function" and _moves(node):
        chain.append(node)
        node = node.args[0]
    if not isinstance(node, torch.fx.Node) or node.op != "call_function":
        return None
    name = operator_name(node.target)
    place = {"linear": 1, "layer_norm": 2, "rms_norm": 2}.get(name)
    if place is None or len(node.args) <= place or not isinstance(node.args[place], torch.fx.Node):
        return None
    weight, bias = node.args[place], (*node.args, None)[place + 1]
    if name == "rms_norm" or not isinstance(bias, torch.fx.Node):
        bias = None
    shape = node.meta["val"].shape
    value: Any = torch.arange(shape[-1]).expand(tuple(int(n) for n in shape))
    for step in reversed(chain):
        value = value[step.args[1]] if step.target is operator.getitem else _apply(step, value)
    assert isinstance(value, Tensor)
    assert isinstance(weight, torch.fx.Node)
    used = torch.zeros(int(shape[-1]), dtype=torch.bool)
    used[value] = True
    return weight.name, None if bias is None else bias.name, np.flatnonzero(used.numpy())


def _moves(node: torch.fx.Node) -> bool:
    return node.target is operator.getitem or operator_of(node.target).moves


def _apply(node: torch.fx.Node, value: Any) -> Any:
    if operator_of(node.target).unchanged:
        return value
    assert callable(node.target)
    return node.target(value, *node.args[1:], **node.kwargs)
