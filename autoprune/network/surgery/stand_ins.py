"""Layers of a branch that was removed whole: light modules in place of those that lost every channel.

Decides what stands where a layer has no outputs, or no inputs, left: PyTorch's own modules refuse empty weights. A
stand-in keeps the names (and empty shapes) of the parameters and buffers, so that the state dict of a pruned network
says by itself which layers went. Knows nothing of groups, policies or of how channels are chosen.

    nothing comes out   `Absent`        returns an empty tensor of the layer's output shape
    nothing goes in     `Constant`      returns the bias (or zeros) in the layer's output shape
    a norm of nothing   `Passed`        returns its empty input
    a norm behind one   `UniformNorm`   a batch norm that normalises one pixel, as all of them are equal
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Not their subclasses, which may do more than normalise."""


class _StandIn(nn.Module):
    """Takes over the parameters and buffers of `layer`, under their names, and how it changes a shape."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, parameter in layer._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in layer._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in layer._non_persistent_buffers_set)
        self.training = layer.training
        self.was = type(layer).__name__
        self._size = _Size(layer)

    def extra_repr(self) -> str:
        """Says which layer this was."""
        return f"was={self.was}, weight={tuple(self.get_parameter('weight').shape)}"


class _Size:
    """The spatial size behind a convolution, as plain numbers; a linear layer has none."""

    def __init__(self, layer: nn.Module) -> None:
        self.rank = -1
        if not isinstance(layer, _ConvNd):
            return
        self.rank = len(layer.kernel_size)
        self.transposed = isinstance(layer, _ConvTransposeNd)
        self.stride = tuple(int(n) for n in layer.stride)
        self.window = tuple(d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        if self.transposed:
            assert not isinstance(layer.padding, str)
            self.margin = tuple(int(o) - 2 * int(p) for o, p in zip(layer.output_padding, layer.padding, strict=True))
        else:
            both = layer._reversed_padding_repeated_twice
            self.margin = tuple(both[2 * k] + both[2 * k + 1] for k in reversed(range(self.rank)))

    def __call__(self, x: Tensor) -> tuple[int, ...]:
        sizes = x.shape[x.ndim - self.rank :]
        pairs = zip(sizes, self.stride, self.window, self.margin, strict=True)
        if self.transposed:
            return tuple((n - 1) * s + w + m + 1 for n, s, w, m in pairs)
        return tuple((n + m - w - 1) // s + 1 for n, s, w, m in pairs)

    def shape(self, x: Tensor, channels: int) -> tuple[int, ...]:
        """Returns the layer's output shape: `(..., channels, space...)`, or `(..., channels)` for a linear layer."""
        if self.rank < 0:
            return (*x.shape[:-1], channels)
        return (*x.shape[: x.ndim - self.rank - 1], channels, *self(x))


class Absent(_StandIn):
    """A layer without output channels: `(B, C, ...)` to an empty `(B, 0, ...)`."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns no channels, in the layer's spatial size."""
        return x.new_zeros(self._size.shape(x, 0))


class Constant(_StandIn):
    """A layer without input channels: an empty `(B, 0, ...)` to its bias, or zeros, in every place."""

    def __init__(self, layer: nn.Module, *, normalised: bool) -> None:
        super().__init__(layer)
        self.out_dim = 1 if isinstance(layer, _ConvTransposeNd) else 0
        self.view = normalised and self._parameters.get("bias") is None

    @property
    def channels(self) -> int:
        """The outputs that are left: another cut may take some of them."""
        return int(self.get_parameter("weight").shape[self.out_dim])

    def forward(self, x: Tensor) -> Tensor:
        """Returns the bias in the layer's output shape: nothing is multiplied, and nothing stored for a batch norm."""
        if self.view:
            return x.new_zeros(1).expand(self._size.shape(x, self.channels))
        bias = self._parameters.get("bias")
        value = x.new_zeros(self.channels) if bias is None else bias.to(x.dtype)
        value = value.reshape(self.channels, *([1] * max(self._size.rank, 0)))
        return _spread(value, self._size.shape(x, self.channels))


class Passed(_StandIn):
    """A normalisation or activation over no channels: what comes in goes out."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x`."""
        return x


def _spread(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns `value` in every place of a tensor of its own: what comes next may write to it."""
    return value.expand(shape).clone(memory_format=torch.contiguous_format)


class UniformNorm(_BatchNorm):
    """A batch norm of an input that is the same in every place and for every sample, `(B, C, space...)`.

    In eval mode one pixel is normalised and spread; while it learns its statistics it is a batch norm as any other.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Returns the normalised input, in its shape."""
        if self.training:
            return super().forward(input)
        first = input[(slice(0, 1), slice(None), *[slice(0, 1)] * (input.ndim - 2))]
        return _spread(super().forward(first), input.shape)

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # the batch norm that this one was has checked it


def settle(model: nn.Module, norms: Mapping[str, str] | None = None) -> nn.Module:
    """Replaces every layer of `model` that has an empty weight, in place; returns what stands for the model itself.

    Args:
        model: A network with smaller parameters, module attributes still as they were.
        norms: Path of a layer without inputs → path of the batch norm that alone reads it.
    """
    behind = {} if norms is None else dict(norms)
    uniform = set(behind.values())
    replaced: dict[int, nn.Module] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) not in replaced:
            replaced[id(module)] = _stand_in(module, normalised=path in behind, uniform=path in uniform)
        new = replaced[id(module)]
        if new is not module:
            if not path:
                return new
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new)
    return model


def _stand_in(module: nn.Module, *, normalised: bool, uniform: bool) -> nn.Module:
    weight = module._parameters.get("weight")
    if isinstance(module, (_ConvNd, nn.Linear)) and weight is not None:
        transposed = isinstance(module, _ConvTransposeNd)
        inputs, outputs = (weight.shape[0], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[0])
        if outputs == 0:
            return Absent(module)
        return Constant(module, normalised=normalised) if inputs == 0 else module
    if isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)):
        width = weight if weight is not None else module._buffers.get("running_mean")
        if width is not None and width.numel() == 0:
            return Passed(module)
        if uniform and type(module) in _PLAIN_NORMS and module._buffers.get("running_mean") is not None:
            return _uniform(module)
    return module


def _uniform(norm: nn.Module) -> UniformNorm:
    new = UniformNorm.__new__(UniformNorm)
    new.__dict__.update(norm.__dict__)
    return new


def emptied(module: nn.Module) -> bool:
    """Whether a module is a stand-in that has no weights left to refit."""
    return isinstance(module, _StandIn)


def set_constant(module: nn.Module, value: Tensor) -> None:
    """Gives a layer without inputs the output `value` `(N,)`; a layer that has no bias is left alone."""
    bias = module._parameters.get("bias")
    if isinstance(module, Constant) and bias is not None:
        with torch.no_grad():
            bias.copy_(value.reshape(bias.shape).to(bias.dtype))
