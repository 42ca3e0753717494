"""Rules of operators that move data without changing it: permute, concatenate, split, slice, pad, repeat, index.

Decides how label arrays are moved as the data is. Knows nothing of modules, groups or costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from autoprune.network.graph.labels import Labels, Value
from autoprune.network.graph.record import TAKEN_APART, Made
from autoprune.network.graph.recorder import Tape


def permute(tape: Tape, x: Value, order: Sequence[int]) -> Value:
    """Reorders the dimensions."""
    return Value(tape.shape, tuple(x.dims[k] for k in order))


def transpose(tape: Tape, x: Value, a: int = 0, b: int = 1) -> Value:
    """Swaps two dimensions."""
    dims = list(x.dims)
    dims[a], dims[b] = dims[b], dims[a]
    return Value(tape.shape, tuple(dims))


def last_two(tape: Tape, x: Value) -> Value:
    """Transposes matrices, batched or not."""
    return transpose(tape, x, -2, -1)


def reverse(tape: Tape, x: Value) -> Value:
    """`Tensor.T`: all dimensions in the opposite order."""
    return Value(tape.shape, x.dims[::-1])


def concatenate(tape: Tape, tensors: Sequence[Value], dim: int = 0) -> Value:
    """Lines the label arrays up as it lines the data up."""
    rank = len(tape.shape)
    axis = dim % rank
    tensors = [t for t in tensors if len(t.shape) == rank]
    dims: list[Labels | None] = []
    for k in range(rank):
        parts = [t.dims[k] for t in tensors]
        if k != axis:
            dims.append(_beside(tape, tensors, k, "concatenated"))
        elif all(p is None for p in parts):
            dims.append(None)
        else:
            dims.append(np.concatenate([_part(tape, t, k) for t in tensors]))
    if any(t.maker for t in tensors) and all(d is None for t in tensors for d in t.dims):
        # Zeros beside an input, such as a first state: what reads them tells them apart.
        tape.made[tape.node] = Made(tape.module, tape.shape, [None] * rank, tuple(tensors), axis)
        return Value(tape.shape, tuple(dims), maker=tape.node, axes=tuple(range(rank)))
    return Value(tape.shape, tuple(dims))


def _part(tape: Tape, tensor: Value, axis: int) -> Labels:
    """Returns the labels of one part of a concatenation; zeros may be as wide as they are needed behind it."""
    known = tensor.dims[axis]
    if known is not None:
        return known
    if tensor.maker and tensor.shape[axis] > 1:
        labels = tape.labels.fresh(tensor.shape[axis])
        tape.fill(tensor, axis, labels)
        return labels
    return tape.fixed(tensor.shape[axis], f"a fixed part of the concatenation at {tape.where}")


def _beside(tape: Tape, tensors: Sequence[Value], axis: int, what: str) -> Labels | None:
    """Joins one dimension of tensors that lie beside each other in another one."""
    own = [t.dims[axis] for t in tensors if t.dims[axis] is not None or not t.maker]
    merged = own[0] if own else None
    for other in own[1:]:
        if merged is not None or other is not None:
            merged = tape.align(merged, other, f"{what} at {tape.where} beside a tensor of fixed width")
    if merged is not None:
        for tensor in tensors:
            if tensor.maker and tensor.dims[axis] is None:
                tape.fill(tensor, axis, merged)
    return merged


def chunk(tape: Tape, x: Value, size: Any = None, dim: int = 0) -> tuple[Value, ...]:
    """Chunk, split, split_with_sizes: the same positions of equal parts are one channel.

    A chunk or split by count moves its boundary when the parts shrink unequally, so the parts must shrink alike. Parts
    whose sizes are told one by one follow: each by itself where the module keeps a list of them, else as its number.
    """
    axis = dim % len(x.shape)
    labels = x.dims[axis]
    sizes = [shape[axis] for shape in tape.shapes]
    if labels is None:
        return tuple(Value(shape, x.dims) for shape in tape.shapes)
    bounds = np.cumsum([0, *sizes])
    parts = [labels[a:b] for a, b in pairwise(bounds)]
    if tape.told and tuple(sizes) in tape.sizes:
        pass
    elif len(set(sizes)) == 1 or tape.told:
        for size in set(sizes):
            first, *others = [part for part in parts if len(part) == size]
            for other in others:
                tape.labels.join(first, other)
    else:
        tape.labels.freeze(labels, f"split at {tape.where} into parts of fixed, unequal width")
    name = x.name if axis == 0 else None
    return tuple(
        Value(shape, (*x.dims[:axis], part, *x.dims[axis + 1 :]), name, x.start + int(start))
        for shape, part, start in zip(tape.shapes, parts, bounds, strict=False)
    )


def slice_(
    tape: Tape, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1, **_: Any
) -> Value:
    """Cuts a dimension by constant bounds, which stay where they are when channels go.

    What lies before a bound must stay, or the bound would point at other channels; what lies behind the last one may
    go. Bounds that count from the end do so from the other side.
    """
    axis = dim % len(x.shape)
    size = x.shape[axis]
    dims = list(x.dims)
    labels = dims[axis]
    if labels is None or tape.shape[axis] == size:
        dims[axis] = labels if tape.shape[axis] == size else None
        return Value(tape.shape, tuple(dims))
    low = 0 if start is None else int(start)
    high = size if end is None else int(end)
    fixed = np.zeros(size, dtype=bool)
    for bound in (low, high):
        if -size < bound < 0:
            fixed[size + bound :] = True
        elif 0 < bound < size:
            fixed[:bound] = True
    if step != 1:
        fixed[:] = True
    single = tape.shape[axis] == 1
    tape.labels.freeze(labels if single else labels[fixed], f"sliced by constant bounds at {tape.where}")
    dims[axis] = None if single else labels[low:high:step]
    return Value(tape.shape, tuple(dims))


def narrow(tape: Tape, x: Value, dim: int, start: Any, length: int) -> Value:
    """A slice by its start and its length."""
    if not isinstance(start, int):
        raise NotImplementedError
    axis = dim % len(x.shape)
    first = start % x.shape[axis] if start < 0 else start
    return slice_(tape, x, axis, first, first + length)


def select(tape: Tape, x: Value, dim: int, *_: Any) -> Value:
    """Takes one index of a dimension."""
    axis = dim % len(x.shape)
    tape.labels.freeze(x.dims[axis], f"a single channel is picked by its number at {tape.where}")
    return _without(x, axis, tape.shape)


def _without(x: Value, axis: int, shape: tuple[int, ...]) -> Value:
    """Returns what is left of a tensor where one index of a dimension is taken."""
    axes = x.axes[:axis] + x.axes[axis + 1 :]
    return Value(shape, x.dims[:axis] + x.dims[axis + 1 :], maker=x.maker, axes=axes)


def unbind(tape: Tape, x: Value, dim: int = 0) -> tuple[Value, ...]:
    """Takes every index of a dimension: their number is written into the model."""
    axis = dim % len(x.shape)
    tape.labels.freeze(x.dims[axis], f"{TAKEN_APART} at {tape.where}")
    return tuple(_without(x, axis, shape) for shape in tape.shapes)


def stack(tape: Tape, tensors: Sequence[Value], dim: int = 0) -> Value:
    """Lays tensors of one shape side by side along a new dimension."""
    axis = dim % len(tape.shape)
    dims = [_beside(tape, tensors, k, "stacked") for k in range(len(tape.shape) - 1)]
    return Value(tape.shape, (*dims[:axis], None, *dims[axis:]))


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


def expand(tape: Tape, x: Value, other: Any = None, *_: Any, **__: Any) -> Value:
    """Broadcasts dimensions of size 1, each to channels of its own; leading dimensions are new.

    `expand_as` makes them as wide as another tensor.
    """
    lead = len(tape.shape) - len(x.shape)
    dims: list[Labels | None] = [None] * lead
    for k, labels in enumerate(x.dims):
        size = tape.shape[lead + k]
        # Its indices are all alike, so it is as wide as what it meets.
        dims.append(labels if x.shape[k] == size else tape.labels.fresh(size) if lead + k else None)
    if isinstance(other, Value):
        wide = [k for k in range(len(dims)) if k < lead or x.shape[k - lead] != tape.shape[k]]
        dims = [other.dims[k] if k in wide else d for k, d in enumerate(dims)]
    return Value(tape.shape, tuple(dims))


def repeat(tape: Tape, x: Value, times: Sequence[int]) -> Value:
    """Tiles label arrays as it tiles the data (repeat, tile)."""
    times = [1] * (len(x.shape) - len(times)) + list(times)
    lead = len(times) - len(x.shape)
    dims = [None] * lead + [
        None if labels is None else np.tile(labels, n) for labels, n in zip(x.dims, times[lead:], strict=True)
    ]
    return Value(tape.shape, tuple(dims))


def repeat_interleave(tape: Tape, x: Value, times: Any = None, dim: int | None = None, **_: Any) -> Value:
    """Repeats each index a constant number of times."""
    if not isinstance(times, int) or dim is None:
        raise NotImplementedError
    axis = dim % len(x.shape)
    labels = x.dims[axis]
    dims = list(x.dims)
    dims[axis] = None if labels is None else np.repeat(labels, times)
    return Value(tape.shape, tuple(dims))


def move_dimensions(tape: Tape, x: Value, source: Any, target: Any) -> Value:
    """`movedim`: the named dimensions go to new places, the others keep their order."""
    rank = len(x.shape)
    sources = [a % rank for a in ([source] if isinstance(source, int) else source)]
    targets = [a % rank for a in ([target] if isinstance(target, int) else target)]
    order = [k for k in range(rank) if k not in sources]
    for place, k in sorted(zip(targets, sources, strict=True)):
        order.insert(place, k)
    return Value(tape.shape, tuple(x.dims[k] for k in order))


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
    """Looks entries up by number in some dimensions, which must stay; the others keep their labels."""
    padded = [*indices, *[None] * (len(x.shape) - len(indices))]
    used = [k for k, own in enumerate(padded) if isinstance(own, Value)]
    if not used or used != list(range(used[0], used[-1] + 1)):
        raise NotImplementedError  # indices that are not neighbours move to the front
    shapes = [own.shape for own in padded if isinstance(own, Value)]
    if len(set(shapes)) > 1:
        raise NotImplementedError
    tape.freeze_all([padded[k] for k in used], f"numbers to look up at {tape.where}")
    for k in used:
        tape.labels.freeze(x.dims[k], f"looked up by number at {tape.where}")
    dims = (*x.dims[: used[0]], *([None] * len(shapes[0])), *x.dims[used[-1] + 1 :])
    if len(dims) != len(tape.shape):
        raise NotImplementedError  # a mask
    return Value(tape.shape, dims)


def index_select(tape: Tape, x: Value, dim: int, *_: Any) -> Value:
    """Picks entries of one dimension by number, which must stay."""
    axis = dim % len(x.shape)
    tape.labels.freeze(x.dims[axis], f"looked up by number at {tape.where}")
    return Value(tape.shape, (*x.dims[:axis], None, *x.dims[axis + 1 :]))
