"""Which activations are alive together while a graph runs.

Decides what memory a point of the graph takes, in labels. Views share the memory of their base.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from autoprune.network.graph.labels import Value
from autoprune.network.graph.record import LiveTensor
from autoprune.network.graph.rules.table import operator_of


def live_tensors(graph: torch.fx.Graph, env: dict[torch.fx.Node, Any]) -> tuple[tuple[LiveTensor, ...], ...]:
    """Returns, for every call in the graph, the activations that are alive while it runs (views share their base)."""
    base: dict[torch.fx.Node, torch.fx.Node] = {}
    last: dict[torch.fx.Node, int] = {}
    made: dict[torch.fx.Node, int] = {}
    for step, node in enumerate(graph.nodes):
        value = env.get(node)
        if node.op == "call_function":
            raw = str(getattr(node.target, "__name__", node.target)).split(".")[0]
            inplace = raw.endswith("_") and not raw.startswith("__")
            alias = node.target is operator.getitem or inplace or operator_of(node.target).alias
            first = node.args[0] if node.args and isinstance(node.args[0], torch.fx.Node) else None
            base[node] = base.get(first, first) if alias and first is not None else node
            made.setdefault(base[node], step)
        elif node.op == "placeholder" and isinstance(value, Value) and value.name is None:
            base[node] = node
            made[node] = step
        for used in node.all_input_nodes:
            if used in base:
                last[base[used]] = step
    tensors: dict[torch.fx.Node, list[LiveTensor]] = {}
    for node in made:
        value = env.get(node)
        values = value if isinstance(value, tuple) else (value,)
        example = node.meta.get("val")
        examples = example if isinstance(example, (tuple, list)) else (example,)
        tensors[node] = [
            LiveTensor(e.element_size(), tuple(n if d is None else d for n, d in zip(v.shape, v.dims, strict=True)))
            for v, e in zip(values, examples, strict=False)
            if isinstance(v, Value) and isinstance(e, Tensor)
        ]
    points = []
    for step, node in enumerate(graph.nodes):
        if node.op == "call_function" and base.get(node) is node:
            alive = [n for n in made if made[n] <= step <= last.get(n, step)]
            points.append(tuple(t for n in alive for t in tensors[n]))
    return tuple(points)
