"""What each ATen operator does to channel labels.

One function an operator family, held in the literal table `RULES`. A rule gets the tape (labels, layers, products)
and the operator's arguments, with tensors replaced by `Value`s, and returns the labels of the result. An operator
that is not in the table freezes what it reads. Knows nothing of modules, groups or costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from autoprune.network.labels import Labels, LabelStore, Value


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product or convolution: MACs are `factor` times the sizes of `dims`."""

    factor: int
    dims: tuple[Labels | int, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """A use of a weight that consumes the channels `inputs` and produces the channels `outputs`.

    `kind` is `conv`, `transposed`, `depthwise`, `linear`, `norm` or `embedding`. `in_dim` and `out_dim` are the
    weight's dimensions; `in_dim` is None where the layer mixes no channels.
    """

    kind: str
    weight: str
    bias: str | None
    inputs: Labels | None
    outputs: Labels
    in_dim: int | None
    out_dim: int
    groups: int = 1
    out_shape: tuple[int, ...] = ()
    node: str = ""
    product: int | None = None
    """Index of the layer's product on the tape; None for a layer that multiplies nothing."""
    normalised: bool = False
    """Whether a batch norm follows, which absorbs a constant shift once it is recalibrated."""


@dataclass(slots=True)
class Tape:
    """What the rules write to."""

    labels: LabelStore = field(default_factory=LabelStore)
    layers: list[Layer] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    node: str = ""
    """Name of the node at work."""
    where: str = ""
    """Module path of the node at work, for reasons that a person reads."""
    shape: tuple[int, ...] = ()
    """Shape of the result (of the first one where there are several)."""
    shapes: tuple[tuple[int, ...], ...] = ()
    normalised: bool = False
    """Whether a batch norm reads the result of the node at work."""

    def fixed(self, size: int, reason: str) -> Labels:
        """Returns labels that are frozen from the start."""
        labels = self.labels.fresh(size)
        self.labels.freeze(labels, reason)
        return labels

    def align(self, a: Labels | None, b: Labels | None, reason: str) -> Labels | None:
        """Joins two aligned dimensions; where one of them is fixed the other one is frozen for `reason`."""
        if a is None or b is None:
            self.labels.freeze(a if a is not None else b, reason)
            return a if a is not None else b
        self.labels.join(a, b)
        return a

    def freeze_all(self, values: Any, reason: str) -> None:
        """Freezes every label of every tensor in `values`."""
        if isinstance(values, Value):
            for labels in values.dims:
                self.labels.freeze(labels, reason)
        elif isinstance(values, (list, tuple)):
            for value in values:
                self.freeze_all(value, reason)


Rule = Callable[..., "Value | tuple[Value, ...]"]


def _size(labels: Labels | None, size: int) -> Labels | int:
    return size if labels is None else labels


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


# --- layers -------------------------------------------------------------------------------------------------------


def _positions(tape: Tape, labels: Labels, parts: int) -> Labels:
    """Joins the same position of each of `parts` equal parts; returns the first part."""
    table = labels.reshape(parts, -1)
    first: Labels = table[0]
    for row in table[1:]:
        tape.labels.join(first, row)
    return first


def convolution(tape: Tape, x: Value, weight: Value, bias: Value | None = None, *rest: Any, **kwargs: Any) -> Value:
    """`(B, Cin, ...) * (Cout, Cin/groups, k...) -> (B, Cout, ...)`."""
    groups = int(kwargs.get("groups", rest[3] if len(rest) > 3 else 1))
    return _conv(tape, x, weight, bias, groups=groups, transposed=False)


def transposed_convolution(
    tape: Tape, x: Value, weight: Value, bias: Value | None = None, *rest: Any, **kwargs: Any
) -> Value:
    """`(B, Cin, ...) * (Cin, Cout/groups, k...) -> (B, Cout, ...)`."""
    groups = int(kwargs.get("groups", rest[3] if len(rest) > 3 else 1))
    return _conv(tape, x, weight, bias, groups=groups, transposed=True)


def _conv(tape: Tape, x: Value, weight: Value, bias: Value | None, *, groups: int, transposed: bool) -> Value:
    rank = len(weight.shape) - 2
    channel_axis = len(x.shape) - rank - 1
    channels, w_in, w_out = x.dims[channel_axis], weight.dims[1], weight.dims[0]
    if transposed:
        w_in, w_out = w_out, w_in
    for kernel in weight.dims[2:]:
        tape.labels.freeze(kernel, "kernel size")
    out_size = tape.shape[channel_axis]
    in_per_group = x.shape[channel_axis] // groups
    # Dimensions of size 1 carry no labels: a one-channel input, a depthwise weight, a single output channel.
    inputs: Labels | None = None
    in_dim: int | None = 0 if transposed else 1
    kind = "transposed" if transposed else "conv"
    if groups == 1:
        if w_in is not None:
            tape.align(w_in, channels, f"{tape.where} reads the model's input or a tensor of fixed width")
            inputs = w_in
        outputs = w_out
    elif groups == x.shape[channel_axis] and not transposed:
        kind, in_dim, outputs = "depthwise", None, w_out
        multiplier = out_size // groups
        if w_out is not None and (channels is not None or multiplier >= 1):
            spread = None if channels is None else np.repeat(channels, multiplier)
            tape.align(w_out, spread, f"{tape.where} filters a tensor of fixed width")
    elif transposed:
        reason = f"{tape.where} is a grouped transposed convolution"
        tape.freeze_all([x, weight], reason)
        outputs = tape.fixed(out_size, reason)
    else:
        if channels is not None:
            first = _positions(tape, channels, groups)
            if w_in is not None:
                tape.labels.join(first, w_in)
            else:
                tape.labels.freeze(first, f"each group of {tape.where} reads a single channel")
        else:
            tape.labels.freeze(w_in, f"{tape.where} reads the model's input or a tensor of fixed width")
        inputs, outputs = w_in, w_out
        if w_out is not None:
            _positions(tape, w_out, groups)
    if outputs is None:
        outputs = tape.fixed(out_size, "a single channel")
    if bias is not None and bias.dims[0] is not None and len(bias.dims[0]) == len(outputs):
        tape.labels.join(bias.dims[0], outputs)
    volume = x.shape if transposed else tape.shape
    space = math.prod(volume[channel_axis + 1 :]) * math.prod(volume[:channel_axis])
    kernel_size = math.prod(weight.shape[2:])
    per_group = _size(w_in if groups == 1 or kind == "conv" else None, in_per_group)
    tape.products.append(Product(space * kernel_size, (outputs, per_group)))
    _layer(
        tape,
        kind,
        weight,
        bias,
        (inputs, outputs),
        (in_dim if inputs is not None else None, 1 if transposed else 0),
        groups,
    )
    dims = (*x.dims[:channel_axis], outputs, *([None] * rank))
    return Value(tape.shape, dims)


def _layer(
    tape: Tape,
    kind: str,
    weight: Value,
    bias: Value | None,
    ends: tuple[Labels | None, Labels],
    dims: tuple[int | None, int],
    groups: int = 1,
) -> None:
    if weight.name is None:
        tape.labels.freeze(ends[0], f"the weight of {tape.where} is computed, not stored")
        tape.labels.freeze(ends[1], f"the weight of {tape.where} is computed, not stored")
        return
    tape.layers.append(
        Layer(
            kind=kind,
            weight=weight.name,
            bias=bias.name if bias is not None else None,
            inputs=ends[0],
            outputs=ends[1],
            in_dim=dims[0],
            out_dim=dims[1],
            groups=groups,
            out_shape=tape.shape,
            node=tape.node,
            product=len(tape.products) - 1 if kind not in ("norm", "embedding") else None,
            normalised=tape.normalised,
        )
    )


def linear(tape: Tape, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """`(..., K) * (N, K) -> (..., N)`."""
    w_out, w_in = weight.dims[0], weight.dims[1]
    if w_in is not None:
        tape.align(w_in, x.dims[-1], f"{tape.where} reads the model's input or a tensor of fixed width")
    outputs = w_out if w_out is not None else tape.fixed(weight.shape[0], "a single output")
    if bias is not None and bias.dims[0] is not None:
        tape.labels.join(bias.dims[0], outputs)
    rows = tuple(_size(d, n) for d, n in zip(x.dims[:-1], x.shape[:-1], strict=True))
    tape.products.append(Product(1, (*rows, outputs, _size(w_in, weight.shape[1]))))
    _layer(tape, "linear", weight, bias, (w_in, outputs), (1 if w_in is not None else None, 0))
    return Value(tape.shape, (*x.dims[:-1], outputs))


def batch_norm(tape: Tape, x: Value, *params: Any, **_: Any) -> Value:
    """Weight, bias and running statistics have one entry a channel."""
    axis = 1
    channels = x.dims[axis]
    for param in params[:4]:
        if isinstance(param, Value) and param.dims[0] is not None:
            tape.align(param.dims[0], channels, f"normalised at {tape.where} with a fixed width")
            channels = channels if channels is not None else param.dims[0]
    _norm_layer(tape, params[:2], channels)
    return Value(x.shape, x.dims)


def _norm_layer(tape: Tape, params: Sequence[Any], channels: Labels | None) -> None:
    weight, bias = [*params, None, None][:2]
    if isinstance(weight, Value) and weight.name is not None and channels is not None and len(weight.shape) == 1:
        _layer(tape, "norm", weight, bias if isinstance(bias, Value) else None, (None, channels), (None, 0))


def layer_norm(
    tape: Tape, x: Value, shape: Sequence[int], weight: Value | None = None, bias: Value | None = None, *_: Any
) -> Value:
    """Normalises over the last dimensions: removing a channel shifts the mean and the variance of the others."""
    rank = len(shape)
    for param in (weight, bias):
        if isinstance(param, Value):
            for own, theirs in zip(param.dims, x.dims[-rank:], strict=True):
                if own is not None or theirs is not None:
                    tape.align(own, theirs, f"normalised at {tape.where} with a fixed width")
    for labels in x.dims[-rank:]:
        tape.labels.approximate(labels, f"the LayerNorm {tape.where} averages over these channels")
    if rank == 1:
        _norm_layer(tape, (weight, bias), x.dims[-1])
    return Value(x.shape, x.dims)


def group_norm(
    tape: Tape, x: Value, groups: int, weight: Value | None = None, bias: Value | None = None, *_: Any
) -> Value:
    """Groups stay equal; within a group removal shifts the statistics of the others."""
    channels = x.dims[1]
    for param in (weight, bias):
        if isinstance(param, Value) and param.dims[0] is not None:
            tape.align(param.dims[0], channels, f"normalised at {tape.where} with a fixed width")
    if channels is not None:
        if groups > 1:
            _positions(tape, channels, groups)
        tape.labels.approximate(channels, f"the GroupNorm {tape.where} averages over these channels")
    _norm_layer(tape, (weight, bias), channels)
    return Value(x.shape, x.dims)


def embedding(tape: Tape, weight: Value, indices: Value, *_: Any, **__: Any) -> Value:
    """`(V, D)[indices] -> (..., D)`; the vocabulary stays."""
    tape.labels.freeze(weight.dims[0], f"{tape.where} looks its rows up by index")
    outputs = weight.dims[1] if weight.dims[1] is not None else tape.fixed(weight.shape[1], "a single channel")
    _layer(tape, "embedding", weight, None, (None, outputs), (None, 1))
    return Value(tape.shape, (*([None] * len(indices.shape)), outputs))


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
        dims[targets[-1]] = _positions(tape, labels, math.prod(tape.shape[k] for k in targets[:-1]))
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
    sizes = tuple(_size(d, n) for d, n in zip(dims, tape.shape, strict=True))
    tape.products.append(Product(1, (*sizes, _size(contracted, a.shape[-1]))))
    return Value(tape.shape, dims)


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
