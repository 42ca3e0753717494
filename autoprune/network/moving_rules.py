"""Rules of operators that move data without changing it: permute, concatenate, split, slice, pad, repeat, index.

Decides how label arrays are moved as the data is. Knows nothing of modules, groups or costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from autoprune.network.labels import Labels, Value
from autoprune.network.tape import TAKEN_APART, Tape


def permute(tape: Tape, x: Value, order: Sequence[int]) -> Value:
    """Reorders the dimensions."""
    return Value(tape.shape, tuple(x.dims[k] for k in order))


def transpose(tape: Tape, x: Value, a: int = 0, b: int = 1) -> Value:
    """Swaps two dimensions."""
    dims = list(x.dims)
    dims[a], dims[b] = dims[b], dims[a]
    return Value(tape.shape, tuple(dims))


def concatenate(tape: Tape, tensors: Sequence[Value], dim: int = 0) -> Value:
    """Lines the label arrays up as it lines the data up."""
    rank = len(tape.shape)
    axis = dim % rank
    tensors = [t for t in tensors if len(t.shape) == rank]
    dims: list[Labels | None] = []
    for k in range(rank):
        parts = [t.dims[k] for t in tensors]
        if k != axis:
            merged = parts[0]
            for other in parts[1:]:
                if merged is not None or other is not None:
                    merged = tape.align(merged, other, f"concatenated at {tape.where} beside a tensor of fixed width")
            dims.append(merged)
        elif all(p is None for p in parts):
            dims.append(None)
        else:
            filled = [
                p if p is not None else tape.fixed(t.shape[k], f"a fixed part of the concatenation at {tape.where}")
                for p, t in zip(parts, tensors, strict=True)
            ]
            dims.append(np.concatenate(filled))
    return Value(tape.shape, tuple(dims))


def chunk(tape: Tape, x: Value, size: Any = None, dim: int = 0) -> tuple[Value, ...]:
    """Chunk, split, split_with_sizes, unbind of a kept dimension: the same positions of equal parts are one channel.

    A chunk or split by count moves its boundary when the parts shrink unequally, so the parts must shrink alike.
    """
    axis = dim % len(x.shape)
    labels = x.dims[axis]
    sizes = [shape[axis] for shape in tape.shapes]
    if labels is None:
        return tuple(Value(shape, x.dims) for shape in tape.shapes)
    bounds = np.cumsum([0, *sizes])
    parts = [labels[a:b] for a, b in pairwise(bounds)]
    if len(set(sizes)) == 1:
        for part in parts[1:]:
            tape.labels.join(parts[0], part)
    else:
        tape.labels.freeze(labels, f"split at {tape.where} into parts of fixed, unequal width")
    name = x.name if axis == 0 else None
    return tuple(
        Value(shape, (*x.dims[:axis], part, *x.dims[axis + 1 :]), name, x.start + int(start))
        for shape, part, start in zip(tape.shapes, parts, bounds, strict=False)
    )


def unbind(tape: Tape, x: Value, dim: int = 0) -> tuple[Value, ...]:
    """Takes a dimension apart into its single indices."""
    axis = dim % len(x.shape)
    tape.labels.freeze(x.dims[axis], f"{TAKEN_APART} at {tape.where}")
    return tuple(Value(shape, x.dims[:axis] + x.dims[axis + 1 :]) for shape in tape.shapes)


def slice_(tape: Tape, x: Value, dim: int = 0, *_: Any, **__: Any) -> Value:
    """Cuts a dimension by constant bounds, which stay where they are when channels go."""
    axis = dim % len(x.shape)
    dims = list(x.dims)
    if tape.shape[axis] != x.shape[axis]:
        tape.labels.freeze(dims[axis], f"sliced by constant bounds at {tape.where}")
        dims[axis] = None
    return Value(tape.shape, tuple(dims))


def select(tape: Tape, x: Value, dim: int, *_: Any) -> Value:
    """Takes one index of a dimension."""
    axis = dim % len(x.shape)
    tape.labels.freeze(x.dims[axis], f"a single channel is picked by its number at {tape.where}")
    return Value(tape.shape, x.dims[:axis] + x.dims[axis + 1 :])


def pad(tape: Tape, x: Value, padding: Sequence[int], *_: Any, **__: Any) -> Value:
    """Padding of space leaves channels alone; a literal pad along channels fixes their number."""
    dims = list(x.dims)
    for k, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
        axis = len(dims) - 1 - k
        if before or after:
            reason = f"padded along channels by a constant at {tape.where}"
            labelled = dims[axis] is not None
            tape.labels.freeze(dims[axis], reason)
            dims[axis] = tape.fixed(tape.shape[axis], reason) if labelled else None
    return Value(tape.shape, tuple(dims))


def expand(tape: Tape, x: Value, *_: Any, **__: Any) -> Value:
    """Broadcasts dimensions of size 1, each to channels of its own; leading dimensions are new."""
    lead = len(tape.shape) - len(x.shape)
    dims: list[Labels | None] = [None] * lead
    for k, labels in enumerate(x.dims):
        size = tape.shape[lead + k]
        # Its indices are all alike, so it is as wide as what it meets.
        dims.append(labels if x.shape[k] == size else tape.labels.fresh(size) if lead + k else None)
    return Value(tape.shape, tuple(dims))


def repeat(tape: Tape, x: Value, times: Sequence[int]) -> Value:
    """Tiles label arrays as it tiles the data."""
    lead = len(times) - len(x.shape)
    dims = [None] * lead + [
        None if labels is None else np.tile(labels, n) for labels, n in zip(x.dims, times[lead:], strict=True)
    ]
    return Value(tape.shape, tuple(dims))


def flip(tape: Tape, x: Value, axes: Sequence[int]) -> Value:
    """Reverses label arrays as it reverses the data."""
    dims = list(x.dims)
    for axis in axes:
        labels = dims[axis]
        dims[axis] = None if labels is None else labels[::-1]
    return Value(tape.shape, tuple(dims))


def roll(tape: Tape, x: Value, shifts: Any, axes: Any = None) -> Value:
    """Shifts some dimensions; channels that are shifted by a constant number of places must all stay."""
    moved = range(len(x.shape)) if not axes else [a % len(x.shape) for a in axes]
    for axis in moved:
        tape.labels.freeze(x.dims[axis], f"rolled along channels at {tape.where}")
    return Value(x.shape, x.dims)


def index(tape: Tape, x: Value, indices: Sequence[Value | None]) -> Value:
    """Looks rows up by number in the first dimension; the others keep their labels."""
    if len(indices) != 1 or not isinstance(indices[0], Value):
        raise NotImplementedError
    tape.labels.freeze(x.dims[0], f"looked up by number at {tape.where}")
    return Value(tape.shape, (*([None] * len(indices[0].shape)), *x.dims[1:]))
