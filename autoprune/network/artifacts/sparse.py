"""2:4 weights in the form that sparse kernels run.

Decides which linear layers can be converted. Knows nothing of how they were pruned.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from autoprune.errors import InputError

# --- sparse kernels -----------------------------------------------------------------------------------------------

_SPARSE_TYPES = (torch.float16, torch.bfloat16)
_OF_SHAPE = "Both dimensions must be"
"""What torch says of a weight whose shape the kernels do not take."""


def to_semi_structured(model: nn.Module) -> list[str]:
    """Stores the 2:4 weights of linear layers as `torch.sparse` semi-structured tensors, in place; for inference.

    Layers whose weight has two non-zeros at most in every four neighbours are converted; all others stay as they are.
    Convolutions stay: PyTorch has no sparse kernel for them. So do linear layers of a shape that the kernels do not
    take: rows and columns must be multiples of 16, with some versions of torch of 32 and 64.

    Returns:
        The paths of the converted layers.

    Raises:
        InputError: The model is not on a CUDA device of compute capability 8.0 or more, a 2:4 weight is neither
            float16 nor bfloat16, or no linear layer has a 2:4 weight of a shape that the kernels take.
    """
    found = {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear and module.weight.is_floating_point() and _is_pairwise(module.weight)
    }
    if not found:
        raise InputError("no linear layer of the model has a 2:4 weight; prune it with `pruning: 2:4` first")
    for path, module in found.items():
        _check_kernel(path, module.weight)
    converted: dict[str, Tensor] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*SparseSemiStructuredTensor is in prototype stage", UserWarning)
        for path, module in found.items():
            try:
                converted[path] = torch.sparse.to_sparse_semi_structured(module.weight.detach())
            except RuntimeError as error:
                if _OF_SHAPE not in str(error):
                    raise
    if not converted:
        shapes = sorted({tuple(module.weight.shape) for module in found.values()})
        raise InputError(f"no 2:4 weight has a shape that semi-structured kernels take: {shapes}")
    for path, sparse in converted.items():
        found[path].weight = nn.Parameter(sparse, requires_grad=False)
    return list(converted)


def _check_kernel(path: str, weight: Tensor) -> None:
    if weight.device.type != "cuda":
        raise InputError(f"{path} lies on {weight.device}; semi-structured kernels need a CUDA device (8.0 or more)")
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < (8, 0):
        raise InputError(f"{weight.device} has compute capability {capability}; 2:4 kernels need 8.0 or more")
    if weight.dtype not in _SPARSE_TYPES:
        raise InputError(f"{path} is {weight.dtype}; semi-structured kernels take float16 or bfloat16: model.half()")


def _is_pairwise(weight: Tensor) -> bool:
    if weight.shape[1] % 4 != 0:
        return False
    used = (weight.detach() != 0).reshape(-1, 4).sum(1)
    return bool((used <= 2).all()) and bool(used.any())
