"""Rules of operators that work element by element or over space: activations, sums, pooling, resizing.

Decides how aligned dimensions live and die together. Knows nothing of modules, groups or costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from autoprune.network.graph.labels import Labels, Value
from autoprune.network.graph.record import Made
from autoprune.network.graph.recorder import Rule, Tape


def _plain(tape: Tape, dims: Sequence[Labels | None]) -> Value:
    """The result at hand with `dims`; a dimension whose size changed is frozen and loses its labels."""
    kept: list[Labels | None] = []
    for labels, size in zip(dims, tape.shape, strict=True):
        fits = labels is not None and len(labels) == size
        if not fits:
            tape.labels.freeze(labels, f"resized at {tape.where}")
        kept.append(labels if fits else None)
    return Value(tape.shape, tuple(kept))


def elementwise(tape: Tape, *args: Any, **_: Any) -> Value:
    """Aligned dimensions live and die together; a dimension of size 1 is broadcast and joins nothing."""
    # A weight that is masked is known by its parameter's labels, not by those of the mask.
    tensors = sorted((a for a in args if isinstance(a, Value)), key=lambda a: a.name not in tape.trainable)
    rank = len(tape.shape)
    dims: list[Labels | None] = [None] * rank
    for axis in range(rank):
        size = tape.shape[axis]
        if size == 1:
            continue
        seen: list[Labels | None] = []
        made: list[tuple[Value, int]] = []
        for tensor in tensors:
            own = axis - (rank - len(tensor.shape))
            if own < 0 or tensor.shape[own] != size:
                continue
            if tensor.maker and tensor.dims[own] is None:
                made.append((tensor, own))
            else:
                seen.append(tensor.dims[own])
        merged = seen[0] if seen else None
        for other in seen[1:]:
            if merged is not None or other is not None:
                merged = tape.align(merged, other, f"combined at {tape.where} with a tensor of fixed width")
        if merged is not None:
            for tensor, own in made:
                tape.fill(tensor, own, merged)
        dims[axis] = merged
    alone = tensors[0] if len(tensors) == 1 and tensors[0].shape == tape.shape else None
    return Value(tape.shape, tuple(dims), maker=alone.maker if alone else "", axes=alone.axes if alone else ())


def same(tape: Tape, x: Value, *_: Any, **__: Any) -> Value:
    """Keeps the labels of every dimension that keeps its size (activations, copies, pooling over space)."""
    if len(x.shape) != len(tape.shape):
        raise NotImplementedError
    value = _plain(tape, x.dims)
    return replace(value, maker=x.maker, axes=x.axes) if x.maker and x.shape == tape.shape else value


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


def copy(tape: Tape, x: Value, source: Any = None, *_: Any, **__: Any) -> Value:
    """Writes `source` into `x`, which may be a view of a larger tensor: the channels of both are the same."""
    return elementwise(tape, x, source) if isinstance(source, Value) else same(tape, x)


def shape_only(tape: Tape, *_: Any, **__: Any) -> Value:
    """Makes a tensor out of nothing but a shape."""
    return Value(tape.shape, (None,) * len(tape.shape))


def uniform(tape: Tape, *_: Any, **__: Any) -> Value:
    """Makes a tensor that holds one number everywhere: it can be as wide as what it meets."""
    rank = len(tape.shape)
    tape.made[tape.node] = Made(tape.module, tape.shape, [None] * rank)
    return Value(tape.shape, (None,) * rank, maker=tape.node, axes=tuple(range(rank)))


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
    "cos",
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
    "_to_copy",
    "type_as",
    "bitwise_not",
    "erfc",
    "erfinv",
    "exp2",
    "log2",
    "log10",
    "sinh",
    "cosh",
    "asinh",
    "acosh",
    "atanh",
    "frac",
    "trunc",
    "sinc",
    "digamma",
    "lgamma",
    "fill",
    "zero",
    "isnan",
    "isinf",
    "isfinite",
    "signbit",
    "deg2rad",
    "rad2deg",
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
    "true_divide",
    "divide",
    "multiply",
    "subtract",
    "greater",
    "less",
    "logaddexp",
    "logaddexp2",
    "xlogy",
    "hypot",
    "copysign",
    "heaviside",
    "fmax",
    "fmin",
    "float_power",
    "masked_fill",
]

LIKE = ["zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"]
