"""The table of operators: what each ATen operator does to channel labels, and all else that is known of it.

One record an operator, in `OPERATORS`; its rule is a function in the modules beside this one. A rule gets the tape
(labels, layers, products) and the operator's arguments, with tensors replaced by `Value`s, and returns the labels of
the result. An operator that is not in the table freezes what it reads. Knows nothing of modules, groups or costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from autoprune.network.graph.recorder import Rule
from autoprune.network.graph.rules.attention import attention
from autoprune.network.graph.rules.contraction import addmm, einsum, matmul
from autoprune.network.graph.rules.elementwise import (
    BINARY,
    LIKE,
    UNARY,
    copy,
    elementwise,
    prelu,
    same,
    shape_only,
    spatial,
    uniform,
)
from autoprune.network.graph.rules.layers import (
    batch_norm,
    convolution,
    embedding,
    embedding_bag,
    group_norm,
    layer_norm,
    linear,
    transposed_convolution,
    weight_norm,
)
from autoprune.network.graph.rules.moving import (
    chunk,
    concatenate,
    expand,
    flip,
    index,
    index_select,
    last_two,
    move_dimensions,
    narrow,
    pad,
    permute,
    repeat,
    repeat_interleave,
    reverse,
    roll,
    select,
    slice_,
    stack,
    transpose,
    unbind,
)
from autoprune.network.graph.rules.recurrent import RECURRENT_RULES
from autoprune.network.graph.rules.reduction import REDUCTIONS, rms_norm
from autoprune.network.graph.rules.reshape import reshape
from autoprune.network.graph.rules.space import (
    channel_shuffle,
    fold,
    glu,
    grid_sample,
    pixel_shuffle,
    pixel_unshuffle,
    unfold,
    windows,
)


class Sizing(Enum):
    """What the sizes that a call is given are of."""

    RESULT = "dimensions of the result"
    PARTS = "parts of a split, one by one"
    NEW = "dimensions of a tensor that is made out of nothing else"
    LAST = "the last dimensions, over which a norm goes"
    CHANNELS = "dimension 1, over which a norm goes; its module writes the width down"


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator.

    Args:
        rule: What it does to labels; None: it freezes what it reads.
        alias: Its result is its input, or a view of it: that takes neither memory nor time.
        moves: It moves numbers without mixing them: each of its result is one of its input's.
        unchanged: All of them are where they were.
        sizing: What the sizes that it is given are of; None: it is given none.
        sizes: Which argument they are, as ATen counts; None: they are no argument. For a norm over dimension 1 it is
            the number of its groups.
        start: Which argument is the first dimension that they are of; None: it is dimension 0.
        functions: Names of the functions of PyTorch that are given these sizes; None: its own name.

    Raises:
        ValueError: It is said to be an alias, or to leave numbers where they are, and yet to mix them.
    """

    rule: Rule | None = None
    alias: bool = False
    moves: bool = False
    unchanged: bool = False
    sizing: Sizing | None = None
    sizes: int | None = None
    start: int | None = None
    functions: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if (self.alias or self.unchanged) and not self.moves:
            raise ValueError("a view, or what leaves numbers where they are, moves them at most: say moves=True")


def _all(names: Iterable[str], rule: Rule, **flags: Any) -> dict[str, Operator]:
    """Returns rows of operators that are alike."""
    return dict.fromkeys(names, Operator(rule, **flags))


def _view(rule: Rule, **flags: Any) -> Operator:
    return Operator(rule, alias=True, moves=True, **flags)


def _plain(rules: dict[str, Rule]) -> dict[str, Operator]:
    return {name: Operator(rule) for name, rule in rules.items()}


OPERATORS: dict[str, Operator] = {
    **_all(UNARY, same),
    **_all(BINARY, elementwise),
    **_all(LIKE, same),
    **_plain(REDUCTIONS),
    **_plain(RECURRENT_RULES),
    **_all(("dropout", "alias", "detach", "contiguous", "to"), same, alias=True, moves=True, unchanged=True),
    "clone": Operator(same, moves=True, unchanged=True),
    "copy": Operator(copy),
    "prelu": Operator(prelu),
    # layers and norms
    **_all([f"conv{rank}d" for rank in (1, 2, 3)], convolution),
    **_all([f"conv_transpose{rank}d" for rank in (1, 2, 3)], transposed_convolution),
    "linear": Operator(linear),
    **_all(("batch_norm", "instance_norm"), batch_norm, sizing=Sizing.CHANNELS),
    "group_norm": Operator(group_norm, sizing=Sizing.CHANNELS, sizes=1),
    "layer_norm": Operator(layer_norm, sizing=Sizing.LAST, sizes=1),
    "rms_norm": Operator(rms_norm, sizing=Sizing.LAST, sizes=1),
    "_weight_norm": Operator(weight_norm),
    "embedding": Operator(embedding),
    "embedding_bag": Operator(embedding_bag),
    # space
    **{
        f"{name}{rank}d": Operator(spatial(rank))
        for rank in (1, 2, 3)
        for name in (
            "max_pool",
            "avg_pool",
            "adaptive_avg_pool",
            "adaptive_max_pool",
            "lp_pool",
            "upsample_nearest",
            "_upsample_nearest_exact",
            "reflection_pad",
            "replication_pad",
        )
    },
    **{
        f"{name}{rank}d_with_indices": Operator(spatial(rank))
        for rank in (1, 2, 3)
        for name in ("max_pool", "adaptive_max_pool")
    },
    **{f"fractional_max_pool{rank}d": Operator(spatial(rank)) for rank in (2, 3)},
    "upsample_linear1d": Operator(spatial(1)),
    **_all(
        ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"), spatial(2)
    ),
    "upsample_trilinear3d": Operator(spatial(3)),
    "tril": Operator(spatial(2)),
    "triu": Operator(spatial(2)),
    "pixel_shuffle": Operator(pixel_shuffle),
    "pixel_unshuffle": Operator(pixel_unshuffle),
    "channel_shuffle": Operator(channel_shuffle),
    "native_channel_shuffle": Operator(channel_shuffle),
    "glu": Operator(glu),
    "im2col": Operator(unfold),
    "col2im": Operator(fold),
    "unfold": Operator(windows),
    "grid_sampler": Operator(grid_sample),
    "grid_sampler_2d": Operator(grid_sample),
    "grid_sampler_3d": Operator(grid_sample),
    # other shapes
    "view": _view(reshape, sizing=Sizing.RESULT, sizes=1),
    "_unsafe_view": _view(reshape, sizing=Sizing.RESULT, sizes=1, functions=()),  # what `view` becomes in a graph
    "reshape": _view(reshape, sizing=Sizing.RESULT, sizes=1),
    "unflatten": _view(reshape, sizing=Sizing.RESULT, sizes=2, start=1),
    "expand": _view(expand, sizing=Sizing.RESULT, sizes=1),
    **_all(("flatten", "squeeze", "unsqueeze"), reshape, alias=True, moves=True),
    **_all(("view_as", "reshape_as", "ravel"), reshape),
    **_all(("expand_as", "broadcast_to"), expand),
    # other places
    "permute": _view(permute),
    **_all(("movedim", "moveaxis"), move_dimensions),
    **_all(("transpose", "t"), transpose, alias=True, moves=True),
    **_all(("swapaxes", "swapdims"), transpose),
    **_all(("mT", "adjoint", "matrix_H"), last_two),
    "numpy_T": Operator(reverse),
    **_all(("cat", "concat", "concatenate"), concatenate),
    "stack": Operator(stack),
    **_all(("chunk", "split"), chunk, alias=True, moves=True),
    # PyTorch's `split` is given either one size, which is `aten.split`, or a list of them.
    "split_with_sizes": _view(chunk, sizing=Sizing.PARTS, sizes=1, functions=("split", "split_with_sizes")),
    **_all(("unsafe_chunk", "unsafe_split", "tensor_split"), chunk),
    "unbind": Operator(unbind, moves=True),
    "slice": _view(slice_),
    "narrow": Operator(narrow),
    "select": _view(select),
    "index_select": Operator(index_select),
    "index": Operator(index),
    **_all(("pad", "constant_pad_nd"), pad),
    **_all(("repeat", "tile"), repeat),
    "repeat_interleave": Operator(repeat_interleave),
    "flip": Operator(flip),
    "roll": Operator(roll),
    # products
    "scaled_dot_product_attention": Operator(attention),
    **_all(("matmul", "bmm", "mm", "mv", "dot"), matmul),
    **_all(("addmm", "baddbmm", "addmv"), addmm),
    "einsum": Operator(einsum),
    # tensors out of nothing but a shape
    **_all(
        ("arange", "empty", "rand", "randn", "new_empty", "linspace", "eye", "scalar_tensor"),
        shape_only,
    ),
    **_all(("zeros", "ones", "full"), uniform, sizing=Sizing.NEW, sizes=0),
    **_all(("new_zeros", "new_ones", "new_full"), uniform, sizing=Sizing.NEW, sizes=1),
}
"""ATen's name of an operator, without namespace and overload, → what is known of it."""

SIZED_FUNCTIONS: dict[str, Operator] = {
    function: known
    for name, known in OPERATORS.items()
    if known.sizes is not None
    for function in (known.functions if known.functions is not None else (name,))
}
"""Functions and methods of PyTorch that are given sizes."""

_UNKNOWN = Operator()


def operator_name(target: Any) -> str:
    """Returns the name under which `OPERATORS` knows an ATen overload: `aten.relu_.default` → `relu`."""
    name = str((getattr(target, "_schema", None) and target._schema.name) or getattr(target, "__name__", target))
    name = name.split("::")[-1].split(".")[0]
    if name.endswith("_") and not name.startswith("__"):
        name = name[:-1]
    return name


def operator_of(target: Any) -> Operator:
    """Returns what is known of an ATen overload; of one that is not in the table nothing is."""
    return OPERATORS.get(operator_name(target), _UNKNOWN)
