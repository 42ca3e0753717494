"""The table of rules: what each ATen operator does to channel labels.

One function an operator family, in the modules beside this one. A rule gets the tape (labels, layers, products)
and the operator's arguments, with tensors replaced by `Value`s, and returns the labels of the result. An operator
that is not in the table freezes what it reads. Knows nothing of modules, groups or costs.
"""

from __future__ import annotations

from typing import Any

from autoprune.network.attention_rules import attention, matmul, vector_norm
from autoprune.network.elementwise_rules import (
    BINARY,
    UNARY,
    elementwise,
    masked_fill,
    normalise_over,
    prelu,
    reduce,
    same,
    shape_only,
    spatial,
)
from autoprune.network.layer_rules import (
    batch_norm,
    convolution,
    embedding,
    group_norm,
    layer_norm,
    linear,
    transposed_convolution,
)
from autoprune.network.moving_rules import (
    chunk,
    concatenate,
    expand,
    flip,
    index,
    pad,
    permute,
    repeat,
    roll,
    select,
    slice_,
    transpose,
    unbind,
)
from autoprune.network.recurrent import RECURRENT_RULES
from autoprune.network.reshape_rules import reshape
from autoprune.network.tape import Rule

RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY, same),
    **dict.fromkeys(BINARY, elementwise),
    "prelu": prelu,
    "conv1d": convolution,
    "conv2d": convolution,
    "conv3d": convolution,
    "conv_transpose1d": transposed_convolution,
    "conv_transpose2d": transposed_convolution,
    "conv_transpose3d": transposed_convolution,
    "linear": linear,
    "batch_norm": batch_norm,
    "instance_norm": batch_norm,
    "layer_norm": layer_norm,
    "group_norm": group_norm,
    "embedding": embedding,
    **RECURRENT_RULES,
    **{
        f"{name}{rank}d": spatial(rank)
        for rank in (1, 2, 3)
        for name in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
    },
    **{f"max_pool{rank}d_with_indices": spatial(rank) for rank in (2, 3)},
    "upsample_nearest1d": spatial(1),
    "upsample_nearest2d": spatial(2),
    "upsample_nearest3d": spatial(3),
    "_upsample_nearest_exact2d": spatial(2),
    "upsample_bilinear2d": spatial(2),
    "upsample_bicubic2d": spatial(2),
    "upsample_linear1d": spatial(1),
    "upsample_trilinear3d": spatial(3),
    "view": reshape,
    "_unsafe_view": reshape,
    "reshape": reshape,
    "flatten": reshape,
    "unflatten": reshape,
    "squeeze": reshape,
    "unsqueeze": reshape,
    "permute": permute,
    "transpose": transpose,
    "t": transpose,
    "cat": concatenate,
    "concat": concatenate,
    "chunk": chunk,
    "split": chunk,
    "split_with_sizes": chunk,
    "unbind": unbind,
    "slice": slice_,
    "select": select,
    "pad": pad,
    "constant_pad_nd": pad,
    "expand": expand,
    "expand_as": expand,
    "repeat": repeat,
    "flip": flip,
    "mean": reduce,
    "sum": reduce,
    "amax": reduce,
    "amin": reduce,
    "softmax": normalise_over,
    "log_softmax": normalise_over,
    "scaled_dot_product_attention": attention,
    "linalg_vector_norm": vector_norm,
    "roll": roll,
    "masked_fill": masked_fill,
    "index": index,
    "matmul": matmul,
    "bmm": matmul,
    **dict.fromkeys(("zeros", "ones", "full", "arange", "empty", "rand", "randn", "new_zeros", "new_ones"), shape_only),
}


def operator_name(target: Any) -> str:
    """Returns the name under which `RULES` knows an ATen overload: `aten.relu_.default` → `relu`."""
    name = str((getattr(target, "_schema", None) and target._schema.name) or getattr(target, "__name__", target))
    name = name.split("::")[-1].split(".")[0]
    if name.endswith("_") and not name.startswith("__"):
        name = name[:-1]
    return name
