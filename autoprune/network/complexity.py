"""Counts of a concrete network, taken by PyTorch itself: the yardstick for the cost model.

Decides how MACs, parameters and bytes of a module are counted. `torch.utils.flop_counter` runs on the meta device,
because on the CPU it misses fused attention (11.3 instead of 17.6 GMACs for ViT-B/16).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from autoprune.network.trace import evaluating, unsaved_buffers


def count_macs(model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Returns the multiply-accumulates of one forward pass for one sample, as `torch.utils.flop_counter` counts
    them.
    """
    return macs_on_meta(on_meta(model), inputs)


def macs_on_meta(model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Returns what `count_macs` does, of a model on the meta device, which afterwards needs no gradients."""
    with FlopCounterMode(display=False) as counter:
        run_on_meta(model, inputs)
    return int(counter.get_total_flops()) // 2 // int(inputs[0].shape[0])


def run_on_meta(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Runs a model on the meta device, which afterwards needs no gradients, on inputs of the shapes of `inputs`."""
    model.requires_grad_(False)  # the counter wants gradients of what could have some
    fake = tuple(torch.empty_like(x, device="meta") for x in inputs)
    with evaluating(model), torch.no_grad(), _OnMeta():  # type: ignore[no-untyped-call]
        model(*fake)


def on_meta(model: nn.Module) -> nn.Module:
    """Returns a copy without its numbers, on the meta device."""
    memo: dict[int, object] = {}  # `Module.to` would untie tied parameters, after numbers were copied
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, memo)


def count_params(model: nn.Module) -> int:
    """Returns the number of trainable elements; tied parameters count once."""
    return sum(p.numel() for p in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """Returns the bytes of the state dict, tied tensors once; buffers that are not stored there do not count."""
    unsaved = unsaved_buffers(model)
    named = (*model.named_parameters(), *model.named_buffers(remove_duplicate=False))
    tensors = {id(t): t for name, t in named if name not in unsaved}
    return sum(t.numel() * t.element_size() for t in tensors.values())


class _OnMeta(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes the constants that a forward pass makes or holds to the meta device when they meet a tensor there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places = {leaf.is_meta for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if len(places) == 2:
            args, kwargs = tree_map(_to_meta, (args, kwargs))
        return func(*args, **kwargs)


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta else value
