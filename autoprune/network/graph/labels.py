"""Channel labels: one integer for each index of each tensor dimension, joined where indices live or die together.

Decides how labels are made, joined, frozen and solved. Knows nothing of operators, modules or costs. Joins are
collected as index arrays and solved once, as the connected components of a sparse graph.

A dimension that is split into two that may both shrink (channels into heads and dimensions of a head) is their
*product*: an index of it stays where both of its factors stay. A component without factors is its own only one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor in the graph: its shape and, for each dimension, the labels of its indices.

    A dimension without labels (`None`) has a fixed size as far as pruning goes: batch, space, time.
    """

    shape: tuple[int, ...]
    dims: tuple[Labels | None, ...]
    name: str | None = None
    """Qualified name of the parameter or buffer that this tensor is, or is some rows of."""
    start: int = 0
    """The first of these rows."""
    maker: str = ""
    """Node that made it out of nothing but its shape, the same number everywhere: its indices are all alike."""
    axes: tuple[int, ...] = ()
    """The dimension of what that node made that each dimension is."""

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.dims):
            raise ValueError(f"shape {self.shape} has {len(self.shape)} dimensions, labels have {len(self.dims)}")
        for size, labels in zip(self.shape, self.dims, strict=True):
            if labels is not None and len(labels) != size:
                raise ValueError(f"dimension of size {size} has {len(labels)} labels")

    def with_dims(self, dims: tuple[Labels | None, ...]) -> Value:
        """Returns an unnamed tensor of the same shape with other labels."""
        return Value(self.shape, dims)


@dataclass(slots=True)
class LabelStore:
    """Makes labels, collects joins and freezes, and solves them."""

    count: int = 0
    _left: list[Labels] = field(default_factory=list)
    _right: list[Labels] = field(default_factory=list)
    _frozen: list[tuple[Labels, str]] = field(default_factory=list)
    _approximate: list[tuple[Labels, str]] = field(default_factory=list)
    _products: list[tuple[Labels, Labels, Labels]] = field(default_factory=list)

    def fresh(self, size: int) -> Labels:
        """Returns `size` labels that nothing else has."""
        labels = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return labels

    def join(self, a: Labels, b: Labels) -> None:
        """Makes the labels of equal position one.

        Raises:
            ValueError: The arrays differ in length.
        """
        if a.shape != b.shape:
            raise ValueError(f"cannot join {a.shape} labels with {b.shape}")
        self._left.append(a.ravel())
        self._right.append(b.ravel())

    def freeze(self, labels: Labels | None, reason: str) -> None:
        """Says that the channels behind `labels` must all stay, and why."""
        if labels is not None and labels.size:
            self._frozen.append((labels.ravel(), reason))

    def approximate(self, labels: Labels | None, reason: str) -> None:
        """Says that removing channels behind `labels` also changes the others, and why."""
        if labels is not None and labels.size:
            self._approximate.append((labels.ravel(), reason))

    def multiply(self, whole: Labels, outer: Labels, inner: Labels) -> None:
        """Says that each index of `whole` stays where its label in `outer` and its label in `inner` both stay.

        Raises:
            ValueError: The arrays differ in length.
        """
        if not whole.shape == outer.shape == inner.shape:
            raise ValueError(f"{whole.shape} labels cannot be products of {outer.shape} and {inner.shape}")
        self._products.append((whole.ravel(), outer.ravel(), inner.ravel()))

    def solve(self) -> Solution:
        """Returns the component of every label, its factors, and what is frozen or approximate."""
        left = np.concatenate(self._left) if self._left else np.empty(0, np.int64)
        right = np.concatenate(self._right) if self._right else np.empty(0, np.int64)
        empty = (np.empty(0, np.int64),) * 3
        # [(whole, outer, inner), ...], each (n,) → three arrays (m,), all products one behind the other
        columns = zip(*self._products, strict=True)
        whole, *parts = [np.concatenate(c) for c in columns] if self._products else empty
        while True:
            # An edge for each join; `component` is (labels,), numbered from 0.
            graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(self.count, self.count))
            number, component = connected_components(graph, directed=False)
            component = component.astype(np.int64)
            # Two products in one component: their outer factors are one, and so are their inner factors.
            order = np.argsort(component[whole], kind="stable")  # (m,): products of one component side by side
            same = np.flatnonzero(np.diff(component[whole[order]]) == 0)  # where the next one is of the same component
            pairs = [(part[order[same]], part[order[same + 1]]) for part in parts]
            if all((component[a] == component[b]).all() for a, b in pairs):
                break
            # These joins may bring further products into one component: solved again until nothing changes.
            left = np.concatenate([left, *(a for a, _ in pairs)])
            right = np.concatenate([right, *(b for _, b in pairs)])
        outer, inner = (component[part].tolist() for part in parts)
        # component of a product → its two factors; all products of a component have the same by now
        children = dict(zip(component[whole].tolist(), zip(outer, inner, strict=True), strict=True))
        frozen = _reasons(component, self._frozen)
        approximate = _reasons(component, self._approximate)
        factors = _factors(int(number), children, frozen)
        for reasons in (frozen, approximate):
            # What must stay as a whole keeps its factors.
            for c in [c for c in reasons if c in children]:
                for factor in factors[c][factors[c] >= 0].tolist():
                    reasons.setdefault(factor, reasons[c])
        return Solution(component, int(number), frozen, approximate, factors)


@dataclass(frozen=True, slots=True)
class Solution:
    """The component of every label; reasons by component for those that are frozen or approximate.

    `factors` is `(components, k)`: an index of a component stays where all of these stay (-1 fills up). Most
    components are their own only factor.
    """

    component: Labels
    number: int
    frozen: dict[int, str]
    approximate: dict[int, str]
    factors: Labels

    def factors_of(self, labels: Labels) -> Labels:
        """Returns the `(n, k)` factors of every label, -1 where there are fewer."""
        found: Labels = self.factors[self.component[labels]]  # labels (n,) → components (n,) → factors (n, k)
        return found


def _factors(number: int, children: dict[int, tuple[int, int]], frozen: dict[int, str]) -> Labels:
    """Returns the `(number, k)` table of factors; a component that would be its own factor is frozen.

    `children` is component → (outer, inner). Factors that are products themselves are expanded: where 7 is 5 times 6
    and 5 is 1 times 2, the row of 7 is [1, 2, 6]. k is the length of the longest row.
    """
    # products that have a product as a factor
    nested = sorted(c for c, (a, b) in children.items() if a in children or b in children)
    # component → its factors, the outermost first; a product of a component with itself has that as its only factor
    found: dict[int, tuple[int, ...]] = {c: (a, b) if a != b else (a,) for c, (a, b) in children.items()}
    for c in nested:
        del found[c]

    def expand(c: int, above: frozenset[int]) -> tuple[int, ...] | None:
        if c not in children:
            return (c,)
        if c in above:
            return None
        if c not in found:
            parts = [expand(child, above | {c}) for child in children[c]]
            whole = [part for part in parts if part is not None]
            if len(whole) < len(parts):
                for one in (c, *children[c]):
                    frozen.setdefault(one, "it is split and put together again in another order")
                whole = [(c,)]
            found[c] = tuple(dict.fromkeys(factor for part in whole for factor in part))
        return found[c]

    for c in nested:
        expand(c, frozenset())
    # Rows of one length are written at once: c is the row's number, and -1 fills it up to k.
    lengths = {len(row) for row in found.values()}
    table = np.full((number, max(lengths, default=1)), -1, dtype=np.int64)
    table[:, 0] = np.arange(number)  # what is no product is its own only factor
    for length in lengths:
        alike = {c: row for c, row in found.items() if len(row) == length}
        table[list(alike), :length] = list(alike.values())
    return table


def _reasons(component: Labels, entries: list[tuple[Labels, str]]) -> dict[int, str]:
    """Returns component → the reason that was given first, in the order of the reasons."""
    first = np.full(int(component.max(initial=-1)) + 1, -1)  # (components,): number of the entry, -1 for none
    for k in reversed(range(len(entries))):  # backwards, so that the first entry is what stays written
        first[component[entries[k][0]]] = k
    found = np.flatnonzero(first >= 0)
    found = found[np.argsort(first[found], kind="stable")]
    return {c: entries[first[c]][1] for c in found.tolist()}
