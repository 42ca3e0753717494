"""What the recorded products, parameters and activations cost, as sums of products of kept channels.

Decides how a dimension's labels become linear forms, or a product of them where an index belongs to a head and to a
dimension of every head. Knows nothing of operators or of how groups were found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from autoprune.cost import CostModel, Form, Term
from autoprune.network.graph.labels import Labels

if TYPE_CHECKING:
    from autoprune.network.graph.groups import PruningGroup
    from autoprune.network.graph.record import Parameter, Record


def cost_model(record: Record, groups: Sequence[PruningGroup], units: Callable[[Labels], Labels]) -> CostModel:
    """Returns the exact cost of the recorded network as a function of the widths of `groups`.

    `units` turns labels into units as in `IndexMap`.
    """
    cache: dict[bytes, tuple[Term, ...]] = {}

    def size(labels: Labels) -> tuple[Term, ...]:
        key = labels.tobytes()
        if key not in cache:
            cache[key] = _size(units(labels), groups)
        return cache[key]

    def terms(factor: int, dims: Iterable[Labels | int], divide: int = 1) -> list[Term]:
        # A product of sums: (C + D) times (H*W) is multiplied out into one term for each choice of summands.
        sums = [Term(factor)]
        for dim in dims:
            parts = (Term(dim),) if isinstance(dim, int) else size(dim)
            sums = [Term(a.factor * b.factor, (*a.forms, *b.forms)) for a in sums for b in parts]
        # Divided by the batch: what does not go into the factor stays as the divisor, so that numbers stay whole.
        return [
            Term(t.factor // math.gcd(t.factor, divide), t.forms, divide // math.gcd(t.factor, divide)) for t in sums
        ]

    def elements(parameter: Parameter, factor: int) -> list[Term]:
        return terms(factor, [n if d is None else d for n, d in zip(parameter.shape, parameter.dims, strict=True)])

    batch = record.batch
    live = [
        tuple(_merge(term for t in tensors for term in terms(t.itemsize, t.dims, batch))) for tensors in record.live
    ]
    return CostModel(
        groups=tuple(group.name for group in groups),
        sizes=tuple(group.size for group in groups),
        macs=_merge(term for p in record.products for term in terms(p.factor, p.dims, batch)),
        params=_merge(term for p in record.parameters if p.trainable for term in elements(p, 1)),
        size_bytes=_merge(term for p in record.parameters if p.saved for term in elements(p, p.itemsize)),
        live=_largest(live),
    )


def _size(units: Labels, groups: Sequence[PruningGroup]) -> tuple[Term, ...]:
    """Returns the number of indices that stay as a sum: one linear form, and a product for each set of groups whose
    channels meet in an index.
    """
    bounds = np.array([group.offset for group in groups], dtype=np.int64)  # (groups,), ascending
    table = units.reshape(len(units), -1)  # (n,) → (n, 1); (n, k) stays
    # (n, k): number of the group that each unit is in, the last whose first unit is not above it; -1 for what stays
    members = np.where(table < 0, -1, np.searchsorted(bounds, table, side="right") - 1)
    counts: dict[tuple[int, ...], int] = {}  # set of groups → indices that hold a channel of each
    members.sort(axis=1)
    codes = np.zeros(len(members), dtype=np.int64)  # (n,): a number for each set of groups, the row of `members`
    for column in members.T:  # (n,): read like digits, renumbered after each so that they never overflow
        codes = np.unique(codes * (len(groups) + 1) + column, return_inverse=True)[1]
    _, first, numbers = np.unique(codes, return_index=True, return_counts=True)
    # `first` is (sets,): an index with that set, whose row says which groups it is
    for row, number in zip(members[first].tolist(), numbers.tolist(), strict=True):
        counts[tuple(g for g in row if g >= 0)] = int(number)
    # Indices that hold only a part of a group count as if they stayed: the dense cost is exact, and the check of each
    # group finds what a narrower one is then said to cost too much.
    # 12 heads of 64 dimensions in 768 indices: the set of the two groups occurs 768 times, which is once 12 times 64.
    whole = {key: number // math.prod(groups[g].size for g in key) for key, number in counts.items() if key}
    rest = sum(counts[key] - times * math.prod(groups[g].size for g in key) for key, times in whole.items())
    # Indices of one group alone, and those that stay: constant + Σ (times a channel occurs) * (its group's width).
    linear = Form(counts.get((), 0) + rest, tuple((k[0], n) for k, n in sorted(whole.items()) if len(k) == 1 and n))
    found: list[Term] = []
    if linear.terms:
        found.append(Term(1, (linear,)))
    elif linear.const:
        found.append(Term(linear.const))
    for key, repeats in whole.items():
        if len(key) > 1 and repeats:
            found.append(Term(repeats, tuple(Form(0, ((g, 1),)) for g in key)))
    return tuple(found)


def _merge(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Adds up terms with the same forms."""
    sums: dict[tuple[tuple[Form, ...], int], int] = {}
    for term in terms:
        forms = tuple(sorted(term.forms, key=lambda f: (f.terms, f.const)))
        sums[forms, term.divisor] = sums.get((forms, term.divisor), 0) + term.factor
    return tuple(Term(factor, forms, divisor) for (forms, divisor), factor in sums.items() if factor)


def _largest(points: Sequence[tuple[Term, ...]]) -> tuple[tuple[Term, ...], ...]:
    """Drops points of the graph whose sum can never be the largest: each of their terms is exceeded in another
    point.
    """
    kept: list[dict[tuple[tuple[Form, ...], int], int]] = []
    for terms in sorted({frozenset(p) for p in points}, key=lambda p: -sum(t.factor for t in p)):
        table = {(t.forms, t.divisor): t.factor for t in terms}
        if not any(all(other.get(key, 0) >= factor for key, factor in table.items()) for other in kept):
            kept.append(table)
    return tuple(tuple(Term(factor, forms, divisor) for (forms, divisor), factor in table.items()) for table in kept)
