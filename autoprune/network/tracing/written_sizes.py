"""Sizes that a forward pass writes down: which arguments of `view`, `split` and their kin are dimensions with labels.

Decides what a call says about the sizes of its results. Knows nothing of what they become when channels go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from autoprune.network.graph.labels import Value
from autoprune.network.graph.record import Made, Size
from autoprune.network.graph.rules.table import SIZED, SPLITS

_TOLD_NORMS = frozenset(["layer_norm", "rms_norm"])
"""Norms that are told the sizes of the last dimensions."""
_CHANNEL_NORMS = frozenset(["group_norm", "batch_norm", "instance_norm"])
"""Norms over dimension 1, of which PyTorch's modules write down the width, and one is told how many groups it has."""


def inferred_axis(node: torch.fx.Node, name: str, rank: int) -> int | None:
    """Returns the axis of the result whose size a call of `view` or `unflatten` leaves open, if there is one."""
    start = 0
    sizes: Any = node.args[-1]
    if name == "unflatten":
        start = int(str(node.args[1])) % (rank - len(sizes) + 1)
    if name not in SIZED or not isinstance(sizes, (list, tuple)) or -1 not in sizes:
        return None
    return start + list(sizes).index(-1)


def written_sizes(node: torch.fx.Node, name: str, module: str, result: Any) -> list[Size]:
    """Returns the sizes of labelled dimensions that a call writes down, in the order of the dimensions."""
    if name in _TOLD_NORMS or name in _CHANNEL_NORMS:
        return _norm_sizes(node, name, module, result)
    if name not in SIZED:
        return []
    found: list[Size] = []
    parts = result if isinstance(result, tuple) else (result,)
    shapes = tuple(part.shape for part in parts if isinstance(part, Value))
    if name in SPLITS:
        along = split_axis(node, len(shapes[0]))
        sizes = tuple(shape[along] for shape in shapes)
        return [
            Size(module, sizes[place], labels, node.name, shapes, place, sizes)
            for place, part in enumerate(parts)
            if (labels := part.dims[along]) is not None
        ]
    for value in parts:
        if not isinstance(value, Value):
            continue
        open_axis = inferred_axis(node, name, len(value.shape))
        before = node.args[0].meta["val"].shape if isinstance(node.args[0], torch.fx.Node) else ()
        kept = value.dims[0] is None and tuple(before[:1]) == value.shape[:1]
        for axis, labels in enumerate(value.dims):
            if labels is not None and axis != open_axis:
                found.append(Size(module, value.shape[axis], labels, node.name, shapes, axis, apart=kept and axis > 0))
    return found


def made_sizes(made: Mapping[str, Made]) -> list[Size]:
    """Returns the sizes of tensors that modules make (zeros), where they met channels."""
    return [
        Size(own.module, own.shape[axis], labels, node, (own.shape,), axis, apart=axis > 0, made=True)
        for node, own in made.items()
        for axis, labels in enumerate(own.labels)
        if labels is not None and not own.parts
    ]


def _norm_sizes(node: torch.fx.Node, name: str, module: str, result: Any) -> list[Size]:
    """Returns the widths that a norm is told, or that its module repeats beside parameters that it may not have.

    For these `axis` is the place among what the call is told.
    """
    if not isinstance(result, Value):
        return []
    if name in _CHANNEL_NORMS:
        labels = result.dims[1]
        told = name == "group_norm" and node.args[1] == result.shape[1]  # as many groups as channels
        shapes = (result.shape,) if told else ()
        size = None if labels is None else Size(module, len(labels), labels, node.name, shapes, 0)
        return [] if size is None else [replace(size, apart=True, made=True, implied=not told)]
    sizes: Any = node.args[1]
    parts = tuple(int(n) for n in sizes)
    dims = result.dims[len(result.dims) - len(parts) :]
    return [
        Size(module, parts[place], labels, node.name, (result.shape,), place, parts, apart=True, made=True)
        for place, labels in enumerate(dims)
        if labels is not None
    ]


def split_axis(node: torch.fx.Node, rank: int) -> int:
    """Returns the axis along which a call of split cuts."""
    axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    return int(str(axis)) % rank
