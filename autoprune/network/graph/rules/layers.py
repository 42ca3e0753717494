"""What layers with weights do to channel labels: convolutions, linear layers, normalisations, embeddings.

Decides which of a weight's dimensions are inputs and outputs, and what a layer multiplies. Knows nothing of modules
or groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from autoprune.network.graph.labels import Labels, Value
from autoprune.network.graph.record import Layer, Product
from autoprune.network.graph.recorder import Tape, extent


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
    axis = len(x.shape) - rank - 1
    for kernel in weight.dims[2:]:
        tape.labels.freeze(kernel, "kernel size")
    if groups == 1:
        x = tape.met(x, axis, weight.dims[0 if transposed else 1])
    join = _join_transposed if transposed else _join_channels
    kind, inputs, outputs, per_group = join(tape, x.dims[axis], weight, (x.shape[axis], tape.shape[axis], groups))
    made = np.tile(outputs, groups) if kind == "transposed" else outputs
    if bias is not None and bias.dims[0] is not None and len(bias.dims[0]) == len(made):
        tape.labels.join(bias.dims[0], made)
    space = [_along_space(tape, x, k) for k in range(axis + 1, len(x.shape))]
    volume = x.shape if transposed else tape.shape
    sizes = [extent(labels, volume[axis + 1 + k]) for k, labels in enumerate(space)]
    factor = math.prod(weight.shape[2:]) * math.prod(volume[:axis])
    tape.products.append(Product(factor, (*sizes, made if kind != "transposed" else outputs, per_group)))
    in_dim = None if inputs is None or kind == "depthwise" else (0 if transposed else 1)
    _layer(
        tape,
        kind,
        weight,
        bias,
        (None if kind == "depthwise" else inputs, outputs),
        (in_dim, 1 if kind == "transposed" else 0),
        groups,
    )
    return Value(tape.shape, (*x.dims[:axis], made, *space))


def _along_space(tape: Tape, x: Value, axis: int) -> Labels | None:
    """Labels of a spatial dimension. Channels may lie there (ECA): a convolution over them mixes neighbours."""
    labels = x.dims[axis]
    if labels is not None and tape.shape[axis] == x.shape[axis]:
        tape.labels.approximate(labels, f"{tape.where} convolves over these channels as over space")
        return labels
    tape.labels.freeze(labels, f"{tape.where} convolves over these channels as over space and changes their number")
    return None


_Joined = tuple[str, "Labels | None", Labels, "Labels | int"]
"""Kind of the layer, its inputs and outputs as the weight has them, and its inputs a group as costs count them."""


def _join_channels(tape: Tape, channels: Labels | None, weight: Value, sizes: tuple[int, int, int]) -> _Joined:
    """Joins the channels of an input with a weight `(Cout, Cin/groups, k...)`.

    Dimensions of size 1 carry no labels: a one-channel input, a depthwise weight, a single output channel.
    """
    width, out_size, groups = sizes
    w_out, w_in = weight.dims[0], weight.dims[1]
    fixed = f"{tape.where} reads the model's input or a tensor of fixed width"
    if groups == width and groups > 1:
        spread = None if channels is None else np.repeat(channels, out_size // groups)
        if w_out is None:
            # The weight is a constant, such as a blur: the number of its groups is written into the model.
            tape.labels.freeze(channels, f"{tape.where} filters them by a constant of fixed width")
        else:
            tape.align(w_out, spread, f"{tape.where} filters a tensor of fixed width")
        return "depthwise", None, _outputs(tape, w_out, out_size), 1
    if groups == 1:
        if w_in is not None:
            tape.align(w_in, channels, fixed)
        else:
            tape.labels.freeze(channels, fixed)
    elif channels is None:
        tape.labels.freeze(w_in, fixed)
    else:
        first = tape.positions(channels, groups)
        if w_in is not None:
            tape.labels.join(first, w_in)
        else:
            tape.labels.freeze(first, f"each group of {tape.where} reads a single channel")
    if w_out is not None:
        tape.positions(w_out, groups)
    return "conv", w_in, _outputs(tape, w_out, out_size), extent(w_in, width // groups)


def _join_transposed(tape: Tape, channels: Labels | None, weight: Value, sizes: tuple[int, int, int]) -> _Joined:
    """Joins the channels of an input with a weight `(Cin, Cout/groups, k...)`; each group makes its own outputs."""
    width, out_size, groups = sizes
    w_in, w_out = weight.dims[0], weight.dims[1]
    if w_in is not None:
        tape.align(w_in, channels, f"{tape.where} reads the model's input or a tensor of fixed width")
    if groups == width == out_size and groups > 1:
        return "depthwise", None, _outputs(tape, w_in, out_size), 1
    if groups > 1 and w_in is not None:
        first = tape.positions(w_in, groups)
        if len(first) == 1:
            tape.labels.freeze(first, f"each group of {tape.where} reads a single channel")
    return "transposed", w_in, _outputs(tape, w_out, out_size // groups), extent(w_in, width)


def _outputs(tape: Tape, labels: Labels | None, size: int) -> Labels:
    return labels if labels is not None else tape.fixed(size, "a single channel")


def _layer(
    tape: Tape,
    kind: str,
    weight: Value,
    bias: Value | None,
    ends: tuple[Labels | None, Labels],
    dims: tuple[int | None, int],
    groups: int = 1,
) -> None:
    name = weight.name
    if name is None:
        # Known by the labels that it still carries: a weight that is standardised on the way, for example.
        name = _computed_from(tape, weight)
        if name is None or kind == "depthwise":
            reason = f"the weight of {tape.where} is computed, not stored"
            for labels in ends:
                tape.labels.freeze(labels, reason)
            tape.computed.append((tape.where, len(ends[1]), reason))
            return
        kind = "computed"
    tape.layers.append(
        Layer(
            kind=kind,
            weight=name,
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
            start=weight.start,
            bias_start=bias.start if bias is not None else 0,
            norm=tape.norm,
            where=tape.where,
        )
    )


def _computed_from(tape: Tape, weight: Value) -> str | None:
    """Returns the parameter whose channels a computed weight has, in the same dimensions."""
    if all(labels is None for labels in weight.dims[:2]):
        return None
    for name, dims in tape.stored.items():
        if len(dims) == len(weight.dims) and all(map(_same, weight.dims[:2], dims[:2])):
            return name
    return None


def _same(own: Labels | None, other: Labels | None) -> bool:
    """Whether two dimensions have the same labels; a single channel has none."""
    if own is None or other is None:
        return own is other
    return own.shape == other.shape and bool((own == other).all())


def linear(tape: Tape, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """`(..., K) * (N, K) -> (..., N)`."""
    w_out, w_in = weight.dims[0], weight.dims[1]
    x = tape.met(x, -1, w_in)
    if w_in is not None:
        tape.align(w_in, x.dims[-1], f"{tape.where} reads the model's input or a tensor of fixed width")
    outputs = w_out if w_out is not None else tape.fixed(weight.shape[0], "a single output")
    if bias is not None and bias.dims[0] is not None:
        tape.labels.join(bias.dims[0], outputs)
    rows = tuple(extent(d, n) for d, n in zip(x.dims[:-1], x.shape[:-1], strict=True))
    tape.products.append(Product(1, (*rows, outputs, extent(w_in, weight.shape[1]))))
    _layer(tape, "linear", weight, bias, (w_in, outputs), (1 if w_in is not None else None, 0))
    return Value(tape.shape, (*x.dims[:-1], outputs))


def batch_norm(tape: Tape, x: Value, *params: Any, **_: Any) -> Value:
    """Weight, bias and running statistics have one entry a channel.

    Where statistics are taken from the input, channels that lie along another dimension share them.
    """
    channels = x.dims[1]
    for param in params[:4]:
        if isinstance(param, Value) and param.dims[0] is not None:
            tape.align(param.dims[0], channels, f"normalised at {tape.where} with a fixed width")
            channels = channels if channels is not None else param.dims[0]
    if len(params) > 4 and params[4]:
        for labels in x.dims[2:]:
            tape.labels.approximate(labels, f"the norm {tape.where} averages over these channels")
    _norm_layer(tape, params[:2], channels)
    return Value(x.shape, x.dims)


def _norm_layer(tape: Tape, params: Sequence[Any], channels: Labels | None) -> None:
    weight, bias = [*params, None, None][:2]
    if isinstance(weight, Value) and weight.name is not None and channels is not None and len(weight.shape) == 1:
        _layer(tape, "norm", weight, bias if isinstance(bias, Value) else None, (None, channels), (None, 0))


def layer_norm(
    tape: Tape,
    x: Value,
    shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    *_: Any,
    kind: str = "LayerNorm",
) -> Value:
    """Normalises over the last dimensions: removing a channel shifts the mean and the variance of the others."""
    rank = len(shape)
    for param in (weight, bias):
        if isinstance(param, Value):
            for own, theirs in zip(param.dims, x.dims[-rank:], strict=True):
                if own is not None or theirs is not None:
                    tape.align(own, theirs, f"normalised at {tape.where} with a fixed width")
    for labels in x.dims[-rank:]:
        tape.labels.approximate(labels, f"the {kind} {tape.where} averages over these channels")
    if rank == 1:
        _norm_layer(tape, (weight, bias), x.dims[-1])
    return Value(x.shape, x.dims)


def group_norm(
    tape: Tape, x: Value, groups: int, weight: Value | None = None, bias: Value | None = None, *_: Any
) -> Value:
    """Groups stay equal; within a group removal shifts the statistics of the others.

    With a channel a group nothing is shared: channels go together with their groups.
    """
    channels = x.dims[1]
    for param in (weight, bias):
        if isinstance(param, Value) and param.dims[0] is not None:
            tape.align(param.dims[0], channels, f"normalised at {tape.where} with a fixed width")
    if channels is not None and groups < x.shape[1]:
        if groups > 1:
            tape.positions(channels, groups)
        tape.labels.approximate(channels, f"the GroupNorm {tape.where} averages over these channels")
    for labels in x.dims[2:]:
        tape.labels.approximate(labels, f"the GroupNorm {tape.where} averages over these channels")
    _norm_layer(tape, (weight, bias), channels)
    return Value(x.shape, x.dims)


def weight_norm(tape: Tape, direction: Value, length: Value, dim: int = 0) -> Value:
    """A weight that is told its rows' lengths: `(N, ...)` and `(N, 1, ...)` give `(N, ...)`.

    Source: Salimans & Kingma, Weight Normalization, NIPS 2016.
    """
    axis = dim % len(direction.shape)
    if length.dims[axis] is not None:
        tape.align(length.dims[axis], direction.dims[axis], f"normalised at {tape.where} with a fixed width")
    return Value(tape.shape, direction.dims)


def embedding(tape: Tape, weight: Value, indices: Value, *_: Any, **__: Any) -> Value:
    """`(V, D)[indices] -> (..., D)`; the vocabulary stays."""
    tape.labels.freeze(weight.dims[0], f"{tape.where} looks its rows up by index")
    outputs = weight.dims[1] if weight.dims[1] is not None else tape.fixed(weight.shape[1], "a single channel")
    _layer(tape, "embedding", weight, None, (None, outputs), (None, 1))
    return Value(tape.shape, (*([None] * len(indices.shape)), outputs))


def embedding_bag(tape: Tape, weight: Value, *_: Any, **__: Any) -> tuple[Value, ...]:
    """`(V, D)` summed or averaged over bags of indices `-> (B, D)`; the vocabulary stays."""
    tape.labels.freeze(weight.dims[0], f"{tape.where} looks its rows up by index")
    outputs = weight.dims[1] if weight.dims[1] is not None else tape.fixed(weight.shape[1], "a single channel")
    _layer(tape, "embedding", weight, None, (None, outputs), (None, 1))
    rest = tuple(Value(shape, (None,) * len(shape)) for shape in tape.shapes[1:])
    return (Value(tape.shape, (None, outputs)), *rest)
