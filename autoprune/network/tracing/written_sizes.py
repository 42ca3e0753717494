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
from autoprune.network.graph.rules.table import Operator, Sizing


def inferred_axis(node: torch.fx.Node, known: Operator, rank: int) -> int | None:
    """Returns the axis of the result whose size a call of `view` or `unflatten` leaves open, if there is one."""
    if known.sizing is not Sizing.RESULT or known.sizes is None or len(node.args) <= known.sizes:
        return None
    sizes: Any = node.args[known.sizes]
    if not isinstance(sizes, (list, tuple)) or -1 not in sizes:
        return None
    # `unflatten(x, dim, sizes)`: `dim` is one of the rank - len(sizes) + 1 dimensions that x has.
    start = 0 if known.start is None else int(str(node.args[known.start])) % (rank - len(sizes) + 1)
    return start + list(sizes).index(-1)


def written_sizes(node: torch.fx.Node, known: Operator, module: str, result: Any) -> list[Size]:
    """Returns the sizes of labelled dimensions that a call writes down, in the order of the dimensions."""
    if known.sizing in (Sizing.LAST, Sizing.CHANNELS):
        return _norm_sizes(node, known, module, result)
    if known.sizing not in (Sizing.RESULT, Sizing.PARTS):
        return []
    found: list[Size] = []
    parts = result if isinstance(result, tuple) else (result,)
    shapes = tuple(part.shape for part in parts if isinstance(part, Value))
    if known.sizing is Sizing.PARTS:
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
        open_axis = inferred_axis(node, known, len(value.shape))
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


def _norm_sizes(node: torch.fx.Node, known: Operator, module: str, result: Any) -> list[Size]:
    """Returns the widths that a norm is told, or that its module repeats beside parameters that it may not have.

    For these `axis` is the place among what the call is told.
    """
    if not isinstance(result, Value):
        return []
    if known.sizing is Sizing.CHANNELS:
        labels = result.dims[1]
        # as many groups as channels
        told = known.sizes is not None and node.args[known.sizes] == result.shape[1]
        shapes = (result.shape,) if told else ()
        size = None if labels is None else Size(module, len(labels), labels, node.name, shapes, 0)
        return [] if size is None else [replace(size, apart=True, made=True, implied=not told)]
    sizes: Any = node.args[known.sizes or 0]
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
