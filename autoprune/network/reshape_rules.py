"""Rules of view, reshape, flatten and their kin: labels followed by shape arithmetic.

Decides which channel an index of the new shape belongs to. Knows nothing of modules, groups or costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from autoprune.network.labels import Labels, Value
from autoprune.network.tape import Tape


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
    elif len(sources) == 1 and (found := repeated(x.dims[sources[0]], [tape.shape[k] for k in targets])) is not None:
        place, labels = found
        dims[targets[place]] = labels
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


def repeated(labels: Labels | None, sizes: Sequence[int]) -> tuple[int, Labels] | None:
    """Finds the one part of a split dimension along which its labels change, if they repeat along all others.

    So a flattened `C*H*W` that is unflattened again finds its channels back. Returns the part and its labels.
    """
    if labels is None:
        return None
    table = labels.reshape(tuple(sizes))
    changing = [k for k in range(table.ndim) if (table != table.take([0], axis=k)).any()]
    if len(changing) != 1:
        return None
    line = np.moveaxis(table, changing[0], 0).reshape(sizes[changing[0]], -1)[:, 0]
    return changing[0], line
