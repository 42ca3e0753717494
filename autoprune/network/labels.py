"""Channel labels: one integer for each index of each tensor dimension, joined where indices live or die together.

Decides how labels are made, joined, frozen and solved. Knows nothing of operators, modules or costs. Joins are
collected as index arrays and solved once, as the connected components of a sparse graph.
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
    """Qualified name of the parameter or buffer that this tensor is, if it is one."""
    constant: bool = False
    """Whether it was made out of nothing but its shape (zeros, ones)."""

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

    def solve(self) -> Solution:
        """Returns the component of every label, and what is frozen or approximate."""
        left = np.concatenate(self._left) if self._left else np.empty(0, np.int64)
        right = np.concatenate(self._right) if self._right else np.empty(0, np.int64)
        graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(self.count, self.count))
        number, component = connected_components(graph, directed=False)
        component = component.astype(np.int64)
        return Solution(
            component=component,
            number=int(number),
            frozen=_reasons(component, self._frozen),
            approximate=_reasons(component, self._approximate),
        )


@dataclass(frozen=True, slots=True)
class Solution:
    """The component of every label; reasons by component for those that are frozen or approximate."""

    component: Labels
    number: int
    frozen: dict[int, str]
    approximate: dict[int, str]


def _reasons(component: Labels, entries: list[tuple[Labels, str]]) -> dict[int, str]:
    reasons: dict[int, str] = {}
    for labels, reason in entries:
        for c in np.unique(component[labels]).tolist():
            reasons.setdefault(c, reason)
    return reasons
