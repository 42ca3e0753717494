"""Strided 1x1 convolutions of few channels, whose backward pass on a CPU writes past its workspace in oneDNN.

The gradient of the weight of a 1x1 convolution that moves by more than one pixel is computed there on a copy of every
stride-th pixel. Where images are in channels-last memory, the copy has room for the channels that there are, and is
written in blocks of 8 (AVX2) or 16 channels (AVX-512): with fewer channels the heap is damaged, the process dies,
several threads may wait for ever, or gradients are wrong. Projection shortcuts become that narrow when they are pruned.

Decides which convolutions run in another way, and in which. Knows nothing of training: whoever differentiates a forward
pass runs it, and the backward pass, in `safe_convolutions`.

Source: https://github.com/uxlfoundation/oneDNN/issues/6035 (open; oneDNN 3.12, torch 2.13 and 2.14).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

BLOCK = 16
"""Channels that oneDNN's widest kernels for 1x1 convolutions take at a time: float32 numbers of 512 bits."""


def safe_convolutions(model: nn.Module, device: torch.device | str) -> AbstractContextManager[Any]:
    """Returns the context, to be entered as often as one likes, in which `model` can be differentiated on `device`.

    The backward pass belongs into it as well, by `differentiate` or `gradients_of`: checkpointed parts of a network run
    again there. It sees calls from Python; a convolution within TorchScript or a compiled graph stays as it is. It does
    nothing on a GPU, and where no convolution is narrow: seeing every call costs 0.5 ms a step of ResNet-20, which is
    4 % with 64 images of 8x8 and 2 % with 32 of 32x32 (one thread, AVX-512).
    """
    return _Thinning() if torch.device(device).type == "cpu" and _is_at_risk(model) else nullcontext()


def _is_at_risk(model: nn.Module) -> bool:
    """Whether a module holds the weight of a narrow 1x1 convolution, unless that is known to move by single pixels."""
    for module in model.modules():
        if type(module) is nn.Conv2d and (max(module.stride) == 1 or module.groups > 1):
            continue
        if any(_is_narrow(weight) for weight in module.parameters(recurse=False)):
            return True
    return False


def _is_narrow(weight: Tensor) -> bool:
    """Whether a weight `(outputs, inputs of a group, ...)` is that of a narrow 1x1 convolution."""
    return weight.ndim == 4 and weight.shape[1] < BLOCK and weight.shape[2:] == (1, 1)


def differentiate(value: Tensor) -> None:
    """Adds the gradients of a scalar to the parameters that made it, as `torch.autograd.backward` does.

    That function, given a tensor, leaves the context, and checkpointed parts would not run as they did before. It is
    given the tensor's place in the graph.
    """
    if not value.requires_grad:
        torch.autograd.backward(value)  # which says so
    torch.autograd.backward(get_gradient_edge(value), torch.ones_like(value))


def gradients_of(value: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Returns the gradients of a scalar, None where a parameter has no part in it. See `differentiate`."""
    edges = [get_gradient_edge(parameter) for parameter in parameters]
    if not value.requires_grad:
        return torch.autograd.grad(value, list(parameters), allow_unused=True)  # which says so
    return torch.autograd.grad(get_gradient_edge(value), edges, torch.ones_like(value), allow_unused=True)


class _Thinning(TorchFunctionMode):
    """Runs narrow strided 1x1 convolutions with stride one on every stride-th pixel: the same products and sums."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_grad_enabled():
            if func is F.conv2d:  # `torch.conv2d` and `nn.Conv2d` arrive as this one too
                return _convolved(*args, **(kwargs or {}))
            if func is F.conv_transpose2d:
                return _transposed(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _convolved(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Returns what `conv2d` returns; the arguments have its names.

    oneDNN makes its copy where nothing is padded, there is one group and the stride divides the image; of sequences and
    volumes torch or oneDNN arranges the numbers anew before. Padded and grouped ones are left as they are.
    """
    down, right = _pair(stride)
    narrow = groups == 1 and _is_narrow(weight) and weight.requires_grad
    if not narrow or down == right == 1 or _pads(padding) or input.device.type != "cpu":
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    # The same pixels; where they lie channels-last, slices have gradients in contiguous memory, slow to add to others.
    thin = input[..., ::down, ::right] if input.is_contiguous() else F.avg_pool2d(input, 1, (down, right))
    return F.conv2d(thin, weight, bias)


def _transposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Returns what `conv_transpose2d` returns, whose weight `(inputs, outputs, ...)` has the gradient of a convolution
    of the outputs; the arguments have its names.
    """
    (down, right), (below, beside) = _pair(stride), _pair(output_padding)
    narrow = groups == 1 and _is_narrow(weight) and weight.requires_grad
    if not narrow or not (below or beside) or _pads(padding) or input.device.type != "cpu":
        return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    dense = F.conv_transpose2d(input, weight)
    height, width = ((n - 1) * step + 1 for n, step in zip(dense.shape[-2:], (down, right), strict=True))
    spread = dense.new_zeros((*dense.shape[:-2], height + below, width + beside))
    spread[..., :height:down, :width:right] = dense
    return spread if bias is None else spread + bias.to(spread.dtype)[:, None, None]


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value) * (1 if len(value) > 1 else 2)
    return pair[0], pair[1]


def _pads(padding: str | int | Sequence[int]) -> bool:
    if isinstance(padding, str):
        return padding != "valid"
    return padding != 0 if isinstance(padding, int) else any(padding)
