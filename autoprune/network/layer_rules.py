"""What layers with weights do to channel labels: convolutions, linear layers, normalisations, embeddings.

Decides which of a weight's dimensions are inputs and outputs, and what a layer multiplies. Knows nothing of modules
or groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from autoprune.network.labels import Labels, Value
from autoprune.network.tape import Layer, Product, Tape, extent


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
            first = tape.positions(channels, groups)
            if w_in is not None:
                tape.labels.join(first, w_in)
            else:
                tape.labels.freeze(first, f"each group of {tape.where} reads a single channel")
        else:
            tape.labels.freeze(w_in, f"{tape.where} reads the model's input or a tensor of fixed width")
        inputs, outputs = w_in, w_out
        if w_out is not None:
            tape.positions(w_out, groups)
    if outputs is None:
        outputs = tape.fixed(out_size, "a single channel")
    if bias is not None and bias.dims[0] is not None and len(bias.dims[0]) == len(outputs):
        tape.labels.join(bias.dims[0], outputs)
    volume = x.shape if transposed else tape.shape
    space = math.prod(volume[channel_axis + 1 :]) * math.prod(volume[:channel_axis])
    kernel_size = math.prod(weight.shape[2:])
    per_group = extent(w_in if groups == 1 or kind == "conv" else None, in_per_group)
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
            start=weight.start,
            bias_start=bias.start if bias is not None else 0,
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
    rows = tuple(extent(d, n) for d, n in zip(x.dims[:-1], x.shape[:-1], strict=True))
    tape.products.append(Product(1, (*rows, outputs, extent(w_in, weight.shape[1]))))
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
            tape.positions(channels, groups)
        tape.labels.approximate(channels, f"the GroupNorm {tape.where} averages over these channels")
    _norm_layer(tape, (weight, bias), channels)
    return Value(x.shape, x.dims)


def embedding(tape: Tape, weight: Value, indices: Value, *_: Any, **__: Any) -> Value:
    """`(V, D)[indices] -> (..., D)`; the vocabulary stays."""
    tape.labels.freeze(weight.dims[0], f"{tape.where} looks its rows up by index")
    outputs = weight.dims[1] if weight.dims[1] is not None else tape.fixed(weight.shape[1], "a single channel")
    _layer(tape, "embedding", weight, None, (None, outputs), (None, 1))
    return Value(tape.shape, (*([None] * len(indices.shape)), outputs))
