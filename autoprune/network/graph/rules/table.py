"""The table of rules: what each ATen operator does to channel labels.

One function an operator family, in the modules beside this one. A rule gets the tape (labels, layers, products)
and the operator's arguments, with tensors replaced by `Value`s, and returns the labels of the result. An operator
that is not in the table freezes what it reads. Knows nothing of modules, groups or costs.
"""

from __future__ import annotations

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
from autoprune.network.graph.rules.reduction import REDUCTIONS
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

RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY, same),
    **dict.fromkeys(BINARY, elementwise),
    **dict.fromkeys(LIKE, same),
    **REDUCTIONS,
    **RECURRENT_RULES,
    "copy": copy,
    "prelu": prelu,
    **{f"conv{rank}d": convolution for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": transposed_convolution for rank in (1, 2, 3)},
    "linear": linear,
    "batch_norm": batch_norm,
    "instance_norm": batch_norm,
    "layer_norm": layer_norm,
    "group_norm": group_norm,
    "_weight_norm": weight_norm,
    "embedding": embedding,
    "embedding_bag": embedding_bag,
    **{
        f"{name}{rank}d": spatial(rank)
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
        f"{name}{rank}d_with_indices": spatial(rank) for rank in (1, 2, 3) for name in ("max_pool", "adaptive_max_pool")
    },
    **{f"fractional_max_pool{rank}d": spatial(rank) for rank in (2, 3)},
    "upsample_linear1d": spatial(1),
    **dict.fromkeys(
        ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"), spatial(2)
    ),
    "upsample_trilinear3d": spatial(3),
    "tril": spatial(2),
    "triu": spatial(2),
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "channel_shuffle": channel_shuffle,
    "native_channel_shuffle": channel_shuffle,
    "glu": glu,
    "im2col": unfold,
    "col2im": fold,
    "unfold": windows,
    "grid_sampler": grid_sample,
    "grid_sampler_2d": grid_sample,
    "grid_sampler_3d": grid_sample,
    **dict.fromkeys(
        (
            "view",
            "_unsafe_view",
            "reshape",
            "view_as",
            "reshape_as",
            "flatten",
            "ravel",
            "unflatten",
            "squeeze",
            "unsqueeze",
        ),
        reshape,
    ),
    "permute": permute,
    "movedim": move_dimensions,
    "moveaxis": move_dimensions,
    **dict.fromkeys(("transpose", "t", "swapaxes", "swapdims"), transpose),
    **dict.fromkeys(("mT", "adjoint", "matrix_H"), last_two),
    "numpy_T": reverse,
    **dict.fromkeys(("cat", "concat", "concatenate"), concatenate),
    "stack": stack,
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "tensor_split"), chunk),
    "unbind": unbind,
    "slice": slice_,
    "narrow": narrow,
    "select": select,
    "index_select": index_select,
    "index": index,
    "pad": pad,
    "constant_pad_nd": pad,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand),
    "repeat": repeat,
    "tile": repeat,
    "repeat_interleave": repeat_interleave,
    "flip": flip,
    "roll": roll,
    "scaled_dot_product_attention": attention,
    **dict.fromkeys(("matmul", "bmm", "mm", "mv", "dot"), matmul),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), addmm),
    "einsum": einsum,
    **dict.fromkeys(
        (
            "arange",
            "empty",
            "rand",
            "randn",
            "new_empty",
            "linspace",
            "eye",
            "scalar_tensor",
        ),
        shape_only,
    ),
    **dict.fromkeys(("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"), uniform),
}


def operator_name(target: Any) -> str:
    """Returns the name under which `RULES` knows an ATen overload: `aten.relu_.default` → `relu`."""
    name = str((getattr(target, "_schema", None) and target._schema.name) or getattr(target, "__name__", target))
    name = name.split("::")[-1].split(".")[0]
    if name.endswith("_") and not name.startswith("__"):
        name = name[:-1]
    return name


ALIASES = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "permute",
        "transpose",
        "t",
        "slice",
        "select",
        "expand",
        "chunk",
        "split",
        "split_with_sizes",
        "dropout",
        "alias",
        "detach",
        "contiguous",
        "to",
    ]
)
"""Operators whose result is their input, or a view of it."""
SIZED = frozenset(["view", "_unsafe_view", "reshape", "unflatten", "expand", "split_with_sizes"])
"""Operators whose arguments are sizes."""
SPLITS = frozenset(["split_with_sizes", "split_with_sizes_copy", "unsafe_split_with_sizes"])
"""Operators that are told the sizes of their parts, one by one."""
