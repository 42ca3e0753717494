"""Rules of view, reshape, flatten and their kin: labels followed by shape arithmetic.

Decides which channel an index of the new shape belongs to, and which parts of a split dimension may shrink. Both
shapes are cut into the same *atoms*: `(B, 3*H*D)` → `(B*3, H, D)` has the atoms B, 3, H, D. Knows nothing of modules,
groups or costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from autoprune.network.graph.labels import Labels, Value
from autoprune.network.graph.recorder import Tape


def reshape(tape: Tape, x: Value, *_: Any, **__: Any) -> Value:
    """Follows labels through view, reshape, flatten, unflatten, squeeze and unsqueeze by shape arithmetic."""
    dims: list[Labels | None] = [None] * len(tape.shape)
    # Both shapes are walked side by side; a segment ends where the products of their sizes meet:
    # (B, 12, T, 64) → (B, 12 * T, 8, 8) is B → B, then (12, T) → 12 * T, then 64 → (8, 8).
    i = j = 0
    while i < len(x.shape) or j < len(tape.shape):
        i0, j0 = i, j  # the segment is [i0, i) before and [j0, j) after, with a and b elements so far
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
    """Fills `dims` for one run of dimensions whose sizes have the same product before and after."""
    # Dimensions of size 1 hold nothing: they come and go.
    sources = [k for k in range(*src) if x.shape[k] > 1]
    targets = [k for k in range(*dst) if tape.shape[k] > 1]
    labelled = [k for k in sources if x.dims[k] is not None]
    if not labelled or not targets:
        return
    atoms = _atoms([x.shape[k] for k in sources], [tape.shape[k] for k in targets])
    if atoms is None:
        for k in labelled:
            tape.labels.freeze(x.dims[k], f"{tape.where} reshapes channels together with another dimension")
        return
    sizes, of_source, of_target = atoms
    # Labels of every source are split into its atoms, and the atoms of every target are merged.
    found: list[Labels | None] = [None] * len(sizes)  # (atoms,)
    for place, k in enumerate(sources):
        own = [a for a in range(len(sizes)) if of_source[a] == place]
        labels = x.dims[k]
        if labels is None:
            continue
        inferred = [targets[of_target[a]] == tape.inferred for a in own]
        for a, part in zip(own, _split(tape, labels, [sizes[a] for a in own], inferred), strict=True):
            found[a] = part
    for place, k in enumerate(targets):
        own = [a for a in range(len(sizes)) if of_target[a] == place]
        dims[k] = _merge(tape, [found[a] for a in own], [sizes[a] for a in own])


def _atoms(sources: Sequence[int], targets: Sequence[int]) -> tuple[list[int], list[int], list[int]] | None:
    """Returns the sizes of the common atoms of two shapes, and the source and the target that each belongs to."""
    # Sources (12, 64) and targets (3, 4, 64) end after 12, 768 and after 3, 12, 768; these are the cuts, and the
    # atoms 3, 4, 64 lie between them. Sizes (6, 4) and (4, 6) have no common atoms: 6 is no multiple of 4.
    ends = [np.cumprod(shape).tolist() for shape in (sources, targets)]
    cuts = sorted({*ends[0], *ends[1]})
    sizes: list[int] = []
    before = 1
    for cut in cuts:
        if cut % before:
            return None
        sizes.append(cut // before)
        before = cut
    # An atom belongs to the dimension that ends at its cut or is the first to end behind it.
    of = [[int(np.searchsorted(end, cut)) for cut in cuts] for end in ends]
    return sizes, of[0], of[1]


def _split(tape: Tape, labels: Labels, sizes: Sequence[int], inferred: Sequence[bool]) -> list[Labels | None]:
    """Returns the labels of the parts of a split dimension.

    The innermost part may shrink, and every part whose size is left open or is a number of the module at work (heads).
    The other ones, such as the 3 of a packed query, key and value, stay: the same position of each is one channel.
    """
    if len(sizes) == 1:
        return [labels]
    if (again := repeated(labels, sizes)) is not None:
        place, line = again
        return [line if k == place else None for k in range(len(sizes))]
    last = len(sizes) - 1
    # Channels 3 * H * D with sizes (3, H, D): D is free, H where the module knows the number; 3 is not.
    free = [k for k, size in enumerate(sizes) if k == last or inferred[k] or size in tape.sizes]
    order = [k for k in range(len(sizes)) if k not in free] + free
    # (n,) → (3, H, D) → the fixed parts first → (3, H * D): one row for each combination of the fixed parts
    table = labels.reshape(sizes).transpose(order).reshape(-1, math.prod(sizes[k] for k in free))
    whole = tape.positions(table.ravel(), len(table))  # (H * D,): all rows joined
    if len(free) == 1:
        return [whole if k == last else None for k in range(len(sizes))]
    parts: list[Labels | None] = [tape.labels.fresh(size) if k in free else None for k, size in enumerate(sizes)]
    _multiply(tape, whole, [part for part in parts if part is not None])
    return parts


def _merge(tape: Tape, parts: Sequence[Labels | None], sizes: Sequence[int]) -> Labels | None:
    """Returns the labels of a dimension that is put together out of `parts`, the outermost first."""
    labelled = [part for part in parts if part is not None]
    if len(labelled) < 2:
        if not labelled:
            return None
        k = next(k for k, part in enumerate(parts) if part is not None)
        # (A, part, Z) flattened: index (a, c, z) is channel c, so each label comes Z times, and all of it A times.
        return np.tile(np.repeat(labelled[0], math.prod(sizes[k + 1 :])), math.prod(sizes[:k]))
    # Parts H, 3 (without labels), D: `whole` is (H * D,), and index (h, i, d) of the result has the label of (h, d):
    # (H * D,) → (H, 1, D) → (H, 3, D) → (H * 3 * D,).
    own = [size for size, part in zip(sizes, parts, strict=True) if part is not None]
    whole = tape.labels.fresh(math.prod(own))
    _multiply(tape, whole, labelled)
    grid = whole.reshape([size if part is not None else 1 for size, part in zip(sizes, parts, strict=True)])
    return np.broadcast_to(grid, tuple(sizes)).reshape(-1)


def _multiply(tape: Tape, whole: Labels, parts: Sequence[Labels]) -> None:
    """Makes `whole` the product of `parts`, the outermost first."""
    while len(parts) > 2:
        # (A, B, C) is the product of A and an inner one (B, C): index (a, i) of it has the factors a and i.
        rest = math.prod(len(part) for part in parts[1:])
        inner = tape.labels.fresh(rest)
        # (A * rest,): a a a b b b ... and i j k i j k ...
        tape.labels.multiply(whole, np.repeat(parts[0], rest), np.tile(inner, len(parts[0])))
        whole, parts = inner, parts[1:]
    outer, last = parts
    tape.labels.multiply(whole, np.repeat(outer, len(last)), np.tile(last, len(outer)))


def repeated(labels: Labels | None, sizes: Sequence[int]) -> tuple[int, Labels] | None:
    """Finds the one part of a split dimension along which its labels change, if they repeat along all others.

    So a flattened `C*H*W` that is unflattened again finds its channels back. Returns the part and its labels.
    """
    if labels is None:
        return None
    table = labels.reshape(tuple(sizes))  # (n,) → sizes
    # axes along which some index differs from the first one
    changing = [k for k in range(table.ndim) if (table != table.take([0], axis=k)).any()]
    if len(changing) != 1:
        return None
    # sizes → (part, rest): every column is the same line of labels
    line = np.moveaxis(table, changing[0], 0).reshape(sizes[changing[0]], -1)[:, 0]
    return changing[0], line
