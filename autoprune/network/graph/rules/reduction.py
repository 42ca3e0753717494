"""Rules of operators that reduce a dimension or normalise along it: mean, norm, variance, softmax, cumulative sums.

Decides which channels must stay because others are computed from all of them, and which become approximate because they
only share a statistic. Knows nothing of modules, groups or costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoprune.network.graph.labels import Labels, Value
from autoprune.network.graph.recorder import Rule, Tape
from autoprune.network.graph.rules.elementwise import elementwise
from autoprune.network.graph.rules.layers import layer_norm


def reduce(at: int) -> Rule:
    """Returns the rule of a reduction whose dimensions are its argument number `at` (the tensor is number 0).

    A statistic that keeps its dimension (`keepdim=True`) is there to be broadcast back over the channels that it was
    taken from: removing one shifts it for the others, as in a LayerNorm. Without it the channels are gone: they stay.
    """

    def rule(tape: Tape, x: Value, *args: Any, **kwargs: Any) -> Value | tuple[Value, ...]:
        axes = kwargs.get("dim", args[at - 1] if len(args) >= at else None)
        gone = _axes(axes, len(x.shape))
        kept = len(tape.shape) == len(x.shape)
        for axis in sorted(gone):
            if kept and len(gone) < len(x.shape):
                tape.labels.approximate(x.dims[axis], f"a statistic over these channels is taken at {tape.where}")
            else:
                tape.labels.freeze(x.dims[axis], f"reduced over channels at {tape.where}")
        dims: tuple[Labels | None, ...] = tuple(None if k in gone else d for k, d in enumerate(x.dims))
        if not kept:
            dims = tuple(d for k, d in enumerate(dims) if k not in gone)
        if len(tape.shapes) > 1:
            return tuple(Value(shape, dims) for shape in tape.shapes)
        return Value(tape.shape, dims)

    return rule


def _axes(axes: Any, rank: int) -> set[int]:
    if axes is None or axes == []:
        return set(range(rank))
    return {axis % max(rank, 1) for axis in ([axes] if isinstance(axes, int) else axes)}


def extremum(tape: Tape, x: Value, *args: Any, **kwargs: Any) -> Value | tuple[Value, ...]:
    """Largest or smallest: of one tensor along a dimension, of all of it, or of two tensors element by element."""
    other = kwargs.get("other", args[0] if args else None)
    if isinstance(other, Value):
        return elementwise(tape, x, other)
    return reduce(1)(tape, x, *args, **kwargs)


def along(at: int, what: str) -> Rule:
    """Returns the rule of an operator that mixes the entries of one dimension (argument number `at`) and keeps it."""

    def rule(tape: Tape, x: Value, *args: Any, **kwargs: Any) -> Value | tuple[Value, ...]:
        dim = kwargs.get("dim", args[at - 1] if len(args) >= at else -1)
        if not isinstance(dim, int):
            raise NotImplementedError
        if x.shape:
            tape.labels.freeze(x.dims[dim], f"{what} over channels at {tape.where}")
        if len(tape.shapes) > 1:
            return tuple(Value(shape, x.dims) for shape in tape.shapes)
        return Value(x.shape, x.dims)

    return rule


def rms_norm(tape: Tape, x: Value, shape: Sequence[int], weight: Value | None = None, *_: Any, **__: Any) -> Value:
    """Divides by the root mean square of the last dimensions: removing a channel shifts it for the others."""
    return layer_norm(tape, x, shape, weight, None, kind="RMSNorm")


REDUCTIONS: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "mean",
            "sum",
            "nansum",
            "nanmean",
            "prod",
            "any",
            "all",
            "amax",
            "amin",
            "argmax",
            "argmin",
            "logsumexp",
            "std",
            "var",
            "std_mean",
            "var_mean",
            "count_nonzero",
        ),
        reduce(1),
    ),
    **dict.fromkeys(("norm", "linalg_vector_norm"), reduce(2)),
    "max": extremum,
    "min": extremum,
    "softmax": along(1, "normalised"),
    "log_softmax": along(1, "normalised"),
    "softmin": along(1, "normalised"),
    "cumsum": along(1, "summed up"),
    "cumprod": along(1, "multiplied up"),
    "logcumsumexp": along(1, "summed up"),
    "cummax": along(1, "compared"),
    "cummin": along(1, "compared"),
}
