"""The recorder that rules write to while a graph is walked: labels, layers, products.

Decides how what a rule finds is written down. Knows no operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from autoprune.network.graph.labels import Labels, LabelStore, Value
from autoprune.network.graph.record import Layer, Made, Product, Query, Size


@dataclass(slots=True)
class Tape:
    """What the rules write to."""

    labels: LabelStore = field(default_factory=LabelStore)
    layers: list[Layer] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    made: dict[str, Made] = field(default_factory=dict)
    """What was made out of nothing but a shape, by node."""
    node: str = ""
    """Name of the node at work."""
    module: str = ""
    """Path of the module at work; the root's is empty."""
    where: str = ""
    """Module path of the node at work, for reasons that a person reads."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Path of a module → the first of its paths, where it has several."""
    shape: tuple[int, ...] = ()
    """Shape of the result (of the first one where there are several)."""
    shapes: tuple[tuple[int, ...], ...] = ()
    normalised: bool = False
    """Whether a batch norm reads the result of the node at work."""
    sizes: frozenset[int | tuple[int, ...]] = frozenset()
    """Integer attributes of the module at work, and lists of them: they may follow when channels go."""
    told: bool = False
    """Whether the split at work is told the sizes of its parts, one by one."""
    inferred: int | None = None
    """Axis of the result whose size the call leaves open (-1)."""
    query: tuple[str, str | None, Labels] | None = None
    """Weight, bias and rows that make the queries of the attention at work, where they can be told."""
    queries: list[Query] = field(default_factory=list)
    contracted: list[Labels] = field(default_factory=list)
    """Dimensions that a product of activations sums over: no weight consumes them."""
    literals: list[Size] = field(default_factory=list)
    stored: dict[str, tuple[Labels | None, ...]] = field(default_factory=dict)
    """Labels that each parameter got, by its name: a computed weight is known by those that it still carries."""
    trainable: set[str] = field(default_factory=set)
    """Which of these are parameters, not buffers."""
    norm: str | None = None
    """Name of the weight of the only batch norm that reads it."""
    computed: list[tuple[str, int, str]] = field(default_factory=list)
    """Layers whose weight is no parameter, so that they stay: where, how many outputs, why."""

    def fixed(self, size: int, reason: str) -> Labels:
        """Returns labels that are frozen from the start."""
        labels = self.labels.fresh(size)
        self.labels.freeze(labels, reason)
        return labels

    def align(self, a: Labels | None, b: Labels | None, reason: str) -> Labels | None:
        """Joins two aligned dimensions; where one of them is fixed the other one is frozen for `reason`."""
        if a is None or b is None:
            self.labels.freeze(a if a is not None else b, reason)
            return a if a is not None else b
        self.labels.join(a, b)
        return a

    def fill(self, value: Value, axis: int, labels: Labels) -> bool:
        """Makes a dimension of a tensor of zeros or the like as wide as what it meets; False where it is no such one.

        Its indices are all alike: it can be of any size, once the call that makes it is told another one.
        """
        made = self.made.get(value.maker)
        if made is None:
            return False
        place = value.axes[axis]
        known = made.labels[place]
        if known is not None:
            self.labels.join(known, labels)
            return True
        made.labels[place] = labels
        start = 0
        for part in made.parts:
            stop = start + part.shape[made.axis]
            own = labels[start:stop] if place == made.axis else labels
            if len(own) == part.shape[place] and not self.fill(part, place, own):
                self.labels.freeze(own, f"a fixed part of the concatenation at {self.where}")
            start = stop
        return True

    def met(self, value: Value, axis: int, labels: Labels | None) -> Value:
        """Returns a tensor that is read by something with `labels` along a dimension: see `fill`."""
        if labels is None or not value.maker or value.dims[axis] is not None or len(labels) != value.shape[axis]:
            return value
        self.fill(value, axis, labels)
        found: Value = self.current(value)
        return found

    def current(self, value: Any) -> Any:
        """Returns a value with the labels that what made it has met by now."""
        made = self.made.get(value.maker) if isinstance(value, Value) else None
        if made is None:
            return value
        return replace(
            value, dims=tuple(made.labels[k] if d is None else d for k, d in zip(value.axes, value.dims, strict=True))
        )

    def freeze_all(self, values: Any, reason: str) -> None:
        """Freezes every label of every tensor in `values`."""
        if isinstance(values, Value):
            for labels in values.dims:
                self.labels.freeze(labels, reason)
        elif isinstance(values, (list, tuple)):
            for value in values:
                self.freeze_all(value, reason)

    def positions(self, labels: Labels, parts: int) -> Labels:
        """Joins the same position of each of `parts` equal parts; returns the first part."""
        table = labels.reshape(parts, -1)
        first: Labels = table[0]
        for row in table[1:]:
            self.labels.join(first, row)
        return first


Rule = Callable[..., "Value | tuple[Value, ...]"]
"""`rule(tape, *arguments)` with tensors replaced by values; raises NotImplementedError for a form it does not cover."""


def extent(labels: Labels | None, size: int) -> Labels | int:
    """Returns a dimension as costs count it: its labels, or its fixed size."""
    return size if labels is None else labels
