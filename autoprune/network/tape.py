"""The tape that rules write to while a graph is walked: labels, layers, products.

Decides what is written down about a network. Knows no operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from autoprune.network.labels import Labels, LabelStore, Value

TAKEN_APART = "taken apart one by one"
"""Why the 3 of a packed query, key and value stays: true, and never what a person asks about."""


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product or convolution: MACs are `factor` times the sizes of `dims`."""

    factor: int
    dims: tuple[Labels | int, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """A use of a weight that consumes the channels `inputs` and produces the channels `outputs`.

    `kind` is `conv`, `transposed`, `depthwise`, `linear`, `norm`, `embedding`, `recurrent`, `product` (a parameter that
    is multiplied by hand) or `computed` (the weight is computed from the parameter on the way). `in_dim` and `out_dim`
    are the weight's dimensions; `in_dim` is None where the layer mixes no channels.
    """

    kind: str
    weight: str
    bias: str | None
    inputs: Labels | None
    outputs: Labels
    in_dim: int | None
    out_dim: int
    groups: int = 1
    out_shape: tuple[int, ...] = ()
    node: str = ""
    product: int | None = None
    """Index of the layer's product on the tape; None for a layer that multiplies nothing."""
    start: int = 0
    """First row of the weight that is used, where a part of it is; `outputs` (or `inputs`) tell how many."""
    bias_start: int = 0
    """First entry of the bias that is used."""
    normalised: bool = False
    """Whether a batch norm follows, which absorbs a constant shift once it is recalibrated."""
    norm: str | None = None
    """Name of that batch norm's weight, where a single one follows and has a weight."""
    where: str = ""
    """Path of the module whose forward pass uses the weight."""


@dataclass(frozen=True, slots=True)
class Size:
    """A number in a call of `view` and its kin: the size of a dimension with labels, written down in a module.

    `node` is the call, `shapes` are those of its results (none where it cannot be told sizes from outside), and `axis`
    is the dimension, or the place among `parts`, the sizes that a split or a norm is told one by one.
    """

    module: str
    number: int
    labels: Labels
    node: str
    shapes: tuple[tuple[int, ...], ...]
    axis: int
    parts: tuple[int, ...] = ()
    apart: bool = False
    """Whether the first dimension goes through the call as it is, so that this one holds nothing of the batch."""
    made: bool = False
    """Whether the call makes a tensor, or is a norm: these are counted apart from `view` and its kin."""
    implied: bool = False
    """Whether the call is not told the size: only what PyTorch's own modules keep under its number is this size."""


@dataclass(frozen=True, slots=True)
class Width:
    """A number that an attribute of `module` has, and a dimension of this size of something that the module works on.

    `name` is the attribute where it is known to follow the dimension.
    """

    module: str
    number: int
    labels: Labels
    name: str = ""


@dataclass(frozen=True, slots=True)
class Query:
    """Queries of an attention whose scale follows from their width: the rows of a parameter that make them.

    `rows` are positions along the first dimension of `weight` (and `bias`); `width` are the labels of one head's
    dimensions.
    """

    weight: str
    bias: str | None
    rows: Labels
    width: Labels


@dataclass(slots=True)
class Made:
    """A tensor that a module made out of nothing but its `shape` (zeros), and the labels that its dimensions met.

    Or one that was put together along `axis` out of `parts`, among which there are such tensors.
    """

    module: str
    shape: tuple[int, ...]
    labels: list[Labels | None]
    parts: tuple[Value, ...] = ()
    axis: int = 0


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
