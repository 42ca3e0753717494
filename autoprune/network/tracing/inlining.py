"""Regions of an exported graph that are graphs of their own: put back where they are called.

`with torch.autocast(...)`, `torch.no_grad()` and `torch.set_grad_enabled(...)` inside a forward pass become one call
each, of a graph that is kept aside. What such a region computes has the same shapes and the same channels without it.
Decides which calls are put back. Knows nothing of labels or rules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_REGIONS = frozenset(["wrap_with_autocast", "wrap_with_set_grad_enabled"])


def inline_regions(graph: fx.Graph, owner: torch.nn.Module) -> None:
    """Replaces every call of a region in `graph` by the operators of the region, in place; regions may hold others.

    `owner` is the module that keeps the graphs aside.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or getattr(node.target, "__name__", "") not in _REGIONS:
            continue
        place = next(k for k, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
        kept = node.args[place]
        assert isinstance(kept, fx.Node)
        region = owner.get_submodule(str(kept.target))
        assert isinstance(region, fx.GraphModule)
        inline_regions(region.graph, region)
        results = _copied(graph, node, region, node.args[place + 1 :])
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])  # a region gives a tuple, of which each user takes one
            graph.erase_node(user)
        graph.erase_node(node)
        if not kept.users:
            graph.erase_node(kept)


def _copied(graph: fx.Graph, call: fx.Node, region: fx.GraphModule, inputs: tuple[Any, ...]) -> Any:
    """Writes the operators of `region` before its `call`; returns what it gives, as nodes of `graph`."""
    known: dict[fx.Node, Any] = {}
    given = iter(inputs)
    with graph.inserting_before(call):
        for node in region.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(given)
            elif node.op == "output":
                return fx.map_arg(node.args[0], lambda n: known[n])
            else:
                known[node] = graph.node_copy(node, lambda n: known[n])
    raise AssertionError("a graph ends with its output")
