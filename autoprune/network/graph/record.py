"""What is written down about a network while its graph is walked: layers, products, parameters, live tensors.

Values in labels; nothing here knows an operator or how groups are found.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoprune.network.graph.labels import Labels, Solution, Value

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


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """Memory of one tensor: bytes an element and its dimensions."""

    itemsize: int
    dims: tuple[Labels | int, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter or buffer of the model."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    trainable: bool
    dims: tuple[Labels | None, ...]
    saved: bool = True
    """Whether it is in the state dict: buffers that are not may change their size from pass to pass."""


@dataclass(frozen=True, slots=True)
class Record:
    """What one pass over the graph wrote down, in labels."""

    solution: Solution
    layers: tuple[Layer, ...]
    products: tuple[Product, ...]
    parameters: tuple[Parameter, ...]
    live: tuple[tuple[LiveTensor, ...], ...]
    batch: int
    literals: tuple[Size, ...] = ()
    queries: tuple[Query, ...] = ()
    contracted: tuple[Labels, ...] = ()
    widths: tuple[Width, ...] = ()
    """What integer attributes of the modules with code of their own may be the size of."""
    computed: tuple[tuple[str, int, str], ...] = ()
    """Layers whose weight is no parameter: where, how many outputs, why they stay."""
