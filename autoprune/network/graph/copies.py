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

from autoprune.errors import TraceError

_DEPTH = 6
"""How deep tensors are looked for in the containers and plain objects that modules hold."""


def sharing_copy(model: nn.Module, *, frozen: bool = False) -> nn.Module:
    """Returns a copy of every module of `model`, with the same parameters, buffers and other tensors.

    With `frozen` its parameters are new objects over the same memory, which want no gradients.

    Raises:
        TraceError: Something that a module holds cannot be copied; the message names it.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in held_tensors(model)}
    if frozen:
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return deep_copy(model, memo)


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Returns a copy of `model` with tensors of its own, but for what `memo` gives for the id of an original.

    What an earlier pass left on a module with gradients attached (an activation, a weight that a hook computes) is
    copied without them: torch refuses to copy it as it is.

    Raises:
        TraceError: Something that a module holds cannot be copied; the message names it.
    """
    known = {} if memo is None else memo
    for tensor in held_tensors(model):
        if not tensor.is_leaf and id(tensor) not in known:
            known[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, known)
    except Exception as error:  # whatever the model's own objects raise
        what = _uncopyable(model, memo or {})
        raise TraceError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {str(error).splitlines()[0]}{what}"
        ) from error


def keeps_graph(model: nn.Module) -> bool:
    """Whether a module of `model` holds a tensor that an earlier pass made with gradients attached."""
    return any(not tensor.is_leaf for tensor in held_tensors(model))


def without_graph(model: nn.Module) -> nn.Module:
    """Returns a copy of `model` with the same tensors, those detached that an earlier pass made with gradients."""
    memo = {id(t): t if t.is_leaf else t.detach() for t in held_tensors(model)}
    return deep_copy(model, memo)


def _uncopyable(model: nn.Module, memo: dict[int, Any]) -> str:
    """Returns a line that names the attribute that cannot be copied, where it is a single one."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                place = f"{path}.{name}" if path else name
                return f"\n  it is held by {place}: give the module a __deepcopy__, or drop it"
    return ""


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yields the tensors that the modules of `model` hold: parameters, buffers, and those in any other attribute."""
    seen: set[int] = set()
    for module in model.modules():
        for value in list(vars(module).values()):  # a list of them all would be forgotten, and its id given to the next
            yield from _tensors_in(value, seen, _DEPTH)


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
