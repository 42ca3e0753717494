"""Rules of operators that work element by element or over space: activations, sums, pooling, reductions.

Decides how aligned dimensions live and die together. Knows nothing of modules, groups or costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoprune.network.labels import Labels, Value
from autoprune.network.tape import Rule, Tape


def _plain(tape: Tape, dims: Sequence[Labels | None]) -> Value:
    """The result at hand with `dims`; a dimension whose size changed loses its labels."""
    return Value(
        tape.shape,
        tuple(d if d is not None and len(d) == n else None for d, n in zip(dims, tape.shape, strict=True)),
    )


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


def masked_fill(tape: Tape, x: Value, *_: Any, **__: Any) -> Value:
    """Puts a constant where a mask says; the mask's channels, if it has any, are fixed."""
    return Value(x.shape, x.dims) if tape.shape == x.shape else _plain(tape, x.dims)


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
