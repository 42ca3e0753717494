"""Rules of operators that trade channels for space or move them in blocks: pixel shuffle, unfold, GLU, grid sampling.

Decides which entries of a channel dimension are the same channel afterwards. Knows nothing of modules, groups or costs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from autoprune.network.graph.labels import Labels, Value
from autoprune.network.graph.recorder import Tape


def _no_channels_in_space(tape: Tape, x: Value, axes: range) -> None:
    for axis in axes:
        tape.labels.freeze(x.dims[axis], f"pooled or resized at {tape.where}")


def _first_of_each(tape: Tape, labels: Labels | None, block: int) -> Labels | None:
    """Joins every run of `block` neighbours, which are one channel afterwards; returns one label a run."""
    if labels is None:
        return None
    table = labels.reshape(-1, block)
    for column in table.T[1:]:
        tape.labels.join(table[:, 0], column)
    first: Labels = table[:, 0]
    return first


def _unless_single(tape: Tape, labels: Labels | None) -> Labels | None:
    """A single channel that comes out of several cannot go."""
    if labels is None or len(labels) > 1:
        return labels
    tape.labels.freeze(labels, f"it makes a single channel at {tape.where}")
    return None


def pixel_shuffle(tape: Tape, x: Value, factor: int) -> Value:
    """`(..., C r r, H, W) -> (..., C, H r, W r)`: the r r channels that make one live and die together."""
    rank = len(x.shape)
    _no_channels_in_space(tape, x, range(rank - 2, rank))
    channels = _first_of_each(tape, x.dims[-3], factor * factor)
    return Value(tape.shape, (*x.dims[:-3], _unless_single(tape, channels), None, None))


def pixel_unshuffle(tape: Tape, x: Value, factor: int) -> Value:
    """`(..., C, H r, W r) -> (..., C r r, H, W)`."""
    rank = len(x.shape)
    _no_channels_in_space(tape, x, range(rank - 2, rank))
    channels = None if x.dims[-3] is None else np.repeat(x.dims[-3], factor * factor)
    return Value(tape.shape, (*x.dims[:-3], channels, None, None))


def channel_shuffle(tape: Tape, x: Value, groups: int) -> Value:
    """`(B, g c, ...)` to `(B, c g, ...)`: the same position of every group is one channel, so that they stay equal."""
    labels = x.dims[1]
    channels = None if labels is None else np.repeat(tape.positions(labels, groups), groups)
    return Value(tape.shape, (x.dims[0], channels, *x.dims[2:]))


def glu(tape: Tape, x: Value, dim: int = -1) -> Value:
    """The first half of a dimension, gated by the second: the same positions of both are one channel."""
    axis = dim % len(x.shape)
    labels = x.dims[axis]
    half = None if labels is None else tape.positions(labels, 2)
    return Value(tape.shape, (*x.dims[:axis], _unless_single(tape, half), *x.dims[axis + 1 :]))


def unfold(tape: Tape, x: Value, kernel: Any, *_: Any, **__: Any) -> Value:
    """`im2col`, `(B, C, H, W) -> (B, C k k, L)`: a channel gives all entries of its patch."""
    _no_channels_in_space(tape, x, range(2, len(x.shape)))
    size = math.prod(kernel if isinstance(kernel, (list, tuple)) else [kernel] * 2)
    channels = None if x.dims[-3] is None else np.repeat(x.dims[-3], size)
    return Value(tape.shape, (*x.dims[:-3], channels, None))


def fold(tape: Tape, x: Value, output: Any, kernel: Any, *_: Any, **__: Any) -> Value:
    """`col2im`, `(B, C k k, L) -> (B, C, H, W)`: all entries of a patch live and die with their channel."""
    _no_channels_in_space(tape, x, range(len(x.shape) - 1, len(x.shape)))
    size = math.prod(kernel if isinstance(kernel, (list, tuple)) else [kernel] * 2)
    channels = _first_of_each(tape, x.dims[-2], size)
    return Value(tape.shape, (*x.dims[:-2], _unless_single(tape, channels), None, None))


def windows(tape: Tape, x: Value, dim: int, *_: Any) -> Value:
    """`Tensor.unfold`: windows of one dimension, their entries in a new last one."""
    axis = dim % len(x.shape)
    tape.labels.freeze(x.dims[axis], f"cut into windows at {tape.where}")
    return Value(tape.shape, (*x.dims[:axis], None, *x.dims[axis + 1 :], None))


def grid_sample(tape: Tape, x: Value, grid: Value, *_: Any, **__: Any) -> Value:
    """Reads `(B, C, ...)` at the places that `grid` names."""
    _no_channels_in_space(tape, x, range(2, len(x.shape)))
    tape.freeze_all(grid, f"they are the places that {tape.where} samples")
    return Value(tape.shape, (*x.dims[:2], *([None] * (len(tape.shape) - 2))))
