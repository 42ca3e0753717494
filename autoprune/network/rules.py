"""What each ATen operator does to channel labels.

One function an operator family, held in the literal table `RULES`. A rule gets the tape (labels, layers, products)
and the operator's arguments, with tensors replaced by `Value`s, and returns the labels of the result. An operator
that is not in the table freezes what it reads. Knows nothing of modules, groups or costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from autoprune.network.labels import Labels, Value
from autoprune.network.layer_rules import (
    batch_norm,
    convolution,
    embedding,
    group_norm,
    layer_norm,
    linear,
    transposed_convolution,
)
from autoprune.network.recurrent import RECURRENT_RULES
from autoprune.network.tape import Product, Rule, Tape, extent


def _plain(tape: Tape, dims: Sequence[Labels | None]) -> Value:
    """The result at hand with `dims`; a dimension whose size changed loses its labels."""
    return Value(
        tape.shape,
        tuple(d if d is not None and len(d) == n else None for d, n in zip(dims, tape.shape, strict=True)),
    )


# --- element by element -------------------------------------------------------------------------------------------


def elementwise(tape: Tape, *args: Any, **_: Any) -> Value:
    """Aligned dimensions live and die together; a dimension of size 1 is broadcast and joins nothing."""
    tensors = [a for a in args if isinstance(a, Value)]
    rank = len(tape.shape)
    dims: list[Labels | None] = [None] * rank
    for axis in range(rank):
        size = tape.shape[axis]
        if size == 1:
            continue
        seen: list[Labels | None] = []
        for tensor in tensors:
            own = axis - (rank - len(tensor.shape))
            if own >= 0 and tensor.shape[own] == size:
                seen.append(tensor.dims[own])
        merged = seen[0] if seen else None
        for other in seen[1:]:
            if merged is not None or other is not None:
                merged = tape.align(merged, other, f"combined at {tape.where} with a tensor of fixed width")
        dims[axis] = merged
    return Value(tape.shape, tuple(dims))


def same(tape: Tape, x: Value, *_: Any, **__: Any) -> Value:
    """Keeps the labels of every dimension that keeps its size (activations, copies, pooling over space)."""
    if len(x.shape) != len(tape.shape):
        raise NotImplementedError
    return _plain(tape, x.dims)


def spatial(rank: int) -> Rule:
    """Pooling and resizing: the last `rank` dimensions are space, the others keep their labels."""

    def rule(tape: Tape, x: Value, *_: Any, **__: Any) -> Value | tuple[Value, ...]:
        for labels in x.dims[-rank:]:
            tape.labels.freeze(labels, f"pooled or resized at {tape.where}")
        dims = x.dims[:-rank] + (None,) * rank
        if len(tape.shapes) > 1:
            return tuple(Value(shape, dims) for shape in tape.shapes)
        return _plain(tape, dims)

    return rule


def prelu(tape: Tape, x: Value, weight: Value) -> Value:
    """One slope a channel, or one for all."""
    if weight.shape[0] > 1:
        tape.align(x.dims[1], weight.dims[0], f"combined at {tape.where} with a tensor of fixed width")
    return Value(x.shape, x.dims)


# --- moving data --------------------------------------------------------------------------------------------------


def reshape(tape: Tape, x: Value, *_: Any, **__: Any) -> Value:
    """Follows labels through view, reshape, flatten, unflatten, squeeze and unsqueeze by shape arithmetic."""
    dims: list[Labels | None] = [None] * len(tape.shape)
    i = j = 0
    while i < len(x.shape) or j < len(tape.shape):
        i0, j0 = i, j
        a = x.shape[i] if i < len(x.shape) else 1
        b = tape.shape[j] if j < len(tape.shape) else 1
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a *= x.shape[i]
                i += 1
            else:
                b *= tape.shape[j]
                j += 1
        _segment(tape, x, (i0, min(i, len(x.shape))), (j0, min(j, len(tape.shape))), dims)
    return Value(tape.shape, tuple(dims))


def _segment(tape: Tape, x: Value, src: tuple[int, int], dst: tuple[int, int], dims: list[Labels | None]) -> None:
    sources = [k for k in range(*src) if x.shape[k] > 1]
    targets = [k for k in range(*dst) if tape.shape[k] > 1]
    labelled = [k for k in sources if x.dims[k] is not None]
    if not labelled or not targets:
        return
    if len(targets) == 1 and len(labelled) == 1:
        k = labelled[0]
        labels = x.dims[k]
        assert labels is not None
        inner = math.prod(x.shape[m] for m in sources if m > k)
        outer = math.prod(x.shape[m] for m in sources if m < k)
        dims[targets[0]] = np.tile(np.repeat(labels, inner), outer)
    elif len(sources) == 1:
        # A split (B, g*c) -> (B, g, c): the innermost part shrinks, so the same position of every part is one channel.
        labels = x.dims[sources[0]]
        assert labels is not None
        dims[targets[-1]] = tape.positions(labels, math.prod(tape.shape[k] for k in targets[:-1]))
    elif len(sources) == len(targets) and all(
        x.shape[a] == tape.shape[b] for a, b in zip(sources, targets, strict=True)
    ):
        for a, b in zip(sources, targets, strict=True):
            dims[b] = x.dims[a]
    else:
        for k in labelled:
            tape.labels.freeze(x.dims[k], f"{tape.where} reshapes channels together with another dimension")


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
    return tuple(
        Value(shape, (*x.dims[:axis], part, *x.dims[axis + 1 :]))
        for shape, part in zip(tape.shapes, parts, strict=True)
    )


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
    """Broadcasts dimensions of size 1; leading dimensions are new."""
    lead = len(tape.shape) - len(x.shape)
    dims = [None] * lead + [d if x.shape[k] == tape.shape[lead + k] else None for k, d in enumerate(x.dims)]
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


def reduce(tape: Tape, x: Value, axes: Any = None, keepdim: bool = False, *_: Any, **__: Any) -> Value:
    """Mean, sum, maximum over some dimensions; a reduction over channels mixes them without a weight."""
    if axes is None or axes == []:
        axes = list(range(len(x.shape)))
    gone = {a % len(x.shape) for a in ([axes] if isinstance(axes, int) else axes)}
    for axis in gone:
        tape.labels.freeze(x.dims[axis], f"reduced over channels at {tape.where}")
    if len(tape.shape) == len(x.shape):
        return Value(tape.shape, tuple(None if k in gone else d for k, d in enumerate(x.dims)))
    return Value(tape.shape, tuple(d for k, d in enumerate(x.dims) if k not in gone))


def normalise_over(tape: Tape, x: Value, dim: int = -1, *_: Any, **__: Any) -> Value:
    """Softmax and its kin: channels that are normalised together must all stay."""
    tape.labels.freeze(x.dims[dim], f"normalised over channels at {tape.where}")
    return Value(x.shape, x.dims)


def shape_only(tape: Tape, *_: Any, **__: Any) -> Value:
    """Makes a tensor out of nothing but a shape."""
    return Value(tape.shape, (None,) * len(tape.shape), constant=True)


# --- products of activations --------------------------------------------------------------------------------------


def matmul(tape: Tape, a: Value, b: Value) -> Value:
    """`(..., M, K) @ (..., K, N) -> (..., M, N)`; the contracted dimensions live and die together."""
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise NotImplementedError
    reason = f"multiplied at {tape.where} with a tensor of fixed width"
    contracted = None
    if a.dims[-1] is not None or b.dims[-2] is not None:
        contracted = tape.align(a.dims[-1], b.dims[-2], reason)
    batch: list[Labels | None] = []
    rank = len(tape.shape) - 2
    for k in range(rank):
        found = [t.dims[k - rank - 2] for t in (a, b) if len(t.shape) - 2 >= rank - k and t.shape[k - rank - 2] > 1]
        merged = found[0] if found else None
        if len(found) == 2 and (merged is not None or found[1] is not None):
            merged = tape.align(merged, found[1], reason)
        batch.append(merged)
    dims = (*batch, a.dims[-2], b.dims[-1])
    sizes = tuple(extent(d, n) for d, n in zip(dims, tape.shape, strict=True))
    tape.products.append(Product(1, (*sizes, extent(contracted, a.shape[-1]))))
    return Value(tape.shape, dims)


def attention(tape: Tape, q: Value, k: Value, v: Value, *_: Any, **__: Any) -> Value:
    """`(..., L, E), (..., S, E), (..., S, V) -> (..., L, V)`.

    The default scale is one over the root of E, so removing query and key channels would change the others' attention.
    """
    for value in (q, k):
        tape.labels.freeze(value.dims[-1], f"the scale of the attention at {tape.where} depends on their number")
    batch: list[Labels | None] = []
    for axis in range(len(q.shape) - 2):
        merged = q.dims[axis]
        for other in (k.dims[axis], v.dims[axis]):
            if merged is not None or other is not None:
                merged = tape.align(merged, other, f"attended at {tape.where} with a tensor of fixed width")
        batch.append(merged)
    sizes = tuple(extent(d, n) for d, n in zip(batch, q.shape[:-2], strict=True))
    for value in (k, v):
        channels = extent(value.dims[-1], value.shape[-1])
        tape.products.append(Product(q.shape[-2] * k.shape[-2], (*sizes, channels)))
    return Value(tape.shape, (*batch, q.dims[-2], v.dims[-1]))


def roll(tape: Tape, x: Value, shifts: Any, axes: Any = None) -> Value:
    """Shifts some dimensions; channels that are shifted by a constant number of places must all stay."""
    moved = range(len(x.shape)) if not axes else [a % len(x.shape) for a in axes]
    for axis in moved:
        tape.labels.freeze(x.dims[axis], f"rolled along channels at {tape.where}")
    return Value(x.shape, x.dims)


def masked_fill(tape: Tape, x: Value, *_: Any, **__: Any) -> Value:
    """Puts a constant where a mask says; the mask's channels, if it has any, are fixed."""
    return Value(x.shape, x.dims) if tape.shape == x.shape else _plain(tape, x.dims)


def index(tape: Tape, x: Value, indices: Sequence[Value | None]) -> Value:
    """Looks rows up by number in the first dimension; the others keep their labels."""
    if len(indices) != 1 or not isinstance(indices[0], Value):
        raise NotImplementedError
    tape.labels.freeze(x.dims[0], f"looked up by number at {tape.where}")
    return Value(tape.shape, (*([None] * len(indices[0].shape)), *x.dims[1:]))


UNARY = [
    "abs",
    "acos",
    "asin",
    "atan",
    "bernoulli",
    "cast",
    "ceil",
    "celu",
    "clamp",
    "clamp_min",
    "clamp_max",
    "clone",
    "contiguous",
    "copy",
    "cos",
    "detach",
    "dropout",
    "elu",
    "erf",
    "exp",
    "expm1",
    "feature_dropout",
    "alpha_dropout",
    "floor",
    "gelu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "lift_fresh_copy",
    "log",
    "log1p",
    "log_sigmoid",
    "logical_not",
    "logit",
    "mish",
    "neg",
    "nan_to_num",
    "positive",
    "reciprocal",
    "relu",
    "relu6",
    "round",
    "rrelu",
    "rsqrt",
    "selu",
    "sigmoid",
    "sign",
    "silu",
    "sin",
    "softplus",
    "softshrink",
    "softsign",
    "sqrt",
    "square",
    "tan",
    "tanh",
    "threshold",
    "to",
    "_to_copy",
    "type_as",
    "alias",
    "bitwise_not",
    "zeros_like",
    "ones_like",
]
BINARY = [
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "pow",
    "maximum",
    "minimum",
    "fmod",
    "remainder",
    "atan2",
    "where",
    "lerp",
    "addcmul",
    "addcdiv",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "logical_and",
    "logical_or",
    "logical_xor",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "floor_divide",
]

RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY, same),
    **dict.fromkeys(BINARY, elementwise),
    "prelu": prelu,
    "conv1d": convolution,
    "conv2d": convolution,
    "conv3d": convolution,
    "conv_transpose1d": transposed_convolution,
    "conv_transpose2d": transposed_convolution,
    "conv_transpose3d": transposed_convolution,
    "linear": linear,
    "batch_norm": batch_norm,
    "instance_norm": batch_norm,
    "layer_norm": layer_norm,
    "group_norm": group_norm,
    "embedding": embedding,
    **RECURRENT_RULES,
    **{
        f"{name}{rank}d": spatial(rank)
        for rank in (1, 2, 3)
        for name in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
    },
    **{f"max_pool{rank}d_with_indices": spatial(rank) for rank in (2, 3)},
    "upsample_nearest1d": spatial(1),
    "upsample_nearest2d": spatial(2),
    "upsample_nearest3d": spatial(3),
    "_upsample_nearest_exact2d": spatial(2),
    "upsample_bilinear2d": spatial(2),
    "upsample_bicubic2d": spatial(2),
    "upsample_linear1d": spatial(1),
    "upsample_trilinear3d": spatial(3),
    "view": reshape,
    "_unsafe_view": reshape,
    "reshape": reshape,
    "flatten": reshape,
    "unflatten": reshape,
    "squeeze": reshape,
    "unsqueeze": reshape,
    "permute": permute,
    "transpose": transpose,
    "t": transpose,
    "cat": concatenate,
    "concat": concatenate,
    "chunk": chunk,
    "split": chunk,
    "split_with_sizes": chunk,
    "slice": slice_,
    "select": select,
    "pad": pad,
    "constant_pad_nd": pad,
    "expand": expand,
    "expand_as": expand,
    "repeat": repeat,
    "flip": flip,
    "mean": reduce,
    "sum": reduce,
    "amax": reduce,
    "amin": reduce,
    "softmax": normalise_over,
    "log_softmax": normalise_over,
    "scaled_dot_product_attention": attention,
    "roll": roll,
    "masked_fill": masked_fill,
    "index": index,
    "matmul": matmul,
    "bmm": matmul,
    **dict.fromkeys(("zeros", "ones", "full", "arange", "empty", "rand", "randn", "new_zeros", "new_ones"), shape_only),
}


def operator_name(target: Any) -> str:
    """Returns the name under which `RULES` knows an ATen overload: `aten.relu_.default` → `relu`."""
    name = str((getattr(target, "_schema", None) and target._schema.name) or getattr(target, "__name__", target))
    name = name.split("::")[-1].split(".")[0]
    if name.endswith("_") and not name.startswith("__"):
        name = name[:-1]
    return name
