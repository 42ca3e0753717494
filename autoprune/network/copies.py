"""Copies of a model that have its very tensors: what runs on one leaves nothing behind in the model.

Decides what is shared and what is copied. A forward pass may keep something on its module (a grid, a cache, a mask of
the last size); on a copy it does so there. Knows nothing of why a copy is run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_DEPTH = 6
"""How deep tensors are looked for in the containers and plain objects that modules hold."""


def sharing_copy(model: nn.Module, *, frozen: bool = False) -> nn.Module:
    """Returns a copy of every module of `model`, with the same parameters, buffers and other tensors.

    With `frozen` its parameters are new objects over the same memory, which want no gradients.

    Raises:
        RuntimeError: Something that a module holds cannot be copied.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in held_tensors(model)}
    if frozen:
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(model, memo)


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yields the tensors that the modules of `model` hold: parameters, buffers, and those in any other attribute."""
    seen: set[int] = set()
    for module in model.modules():
        yield from _tensors_in(list(vars(module).values()), seen, _DEPTH)


def _tensors_in(value: Any, seen: set[int], depth: int) -> Iterator[Tensor]:
    if id(value) in seen or depth < 0 or isinstance(value, nn.Module | type | str | bytes | int | float):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors_in(inner, seen, depth - 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            yield from _tensors_in(inner, seen, depth - 1)
    elif hasattr(value, "__dict__"):
        yield from _tensors_in(vars(value), seen, depth - 1)


_SAME = 1e-2
"""Largest difference that the order of sums may make, relative to the largest output."""


def runs_channels_last(model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether `model` gives for images that lie channels-last in memory what it gives for contiguous ones.

    Code behind a convolution that calls `view` fails there, and code that calls `as_strided` gives other numbers. It is
    tried on a copy, with weights that lie so too.
    """
    try:
        twin = sharing_copy(model, frozen=True).eval()
        with torch.no_grad():
            expected = twin(*inputs)
            for parameter in twin.parameters():
                parameter.data = channels_last(parameter.data)
            found = twin(*map(channels_last, inputs))
    except Exception:  # whatever the model's own code raises
        return False
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    return all(_near(a, b) for a, b in pairs if isinstance(b, Tensor) and b.is_floating_point() and b.numel())


def channels_last(value: Tensor) -> Tensor:
    """Returns images `(B, C, H, W)`, or weights of four dimensions, channels-last in memory; anything else as it is."""
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def _near(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().nan_to_num().max() <= _SAME * expected.abs().nan_to_num().max())
