"""Counts of a concrete network, taken by PyTorch itself: the yardstick for the cost model.

Decides how MACs, parameters and bytes of a module are counted. `torch.utils.flop_counter` runs on the meta device,
because on the CPU it misses fused attention (11.3 instead of 17.6 GMACs for ViT-B/16).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autoprune.network.trace import evaluating


def count_macs(model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Returns the multiply-accumulates of one forward pass for one sample, as `torch.utils.flop_counter` counts
    them.
    """
    twin = copy.deepcopy(model).to("meta")
    fake = tuple(torch.empty_like(x, device="meta") for x in inputs)
    with evaluating(twin), torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(*fake)
    return int(counter.get_total_flops()) // 2 // int(inputs[0].shape[0])


def count_params(model: nn.Module) -> int:
    """Returns the number of trainable elements; tied parameters count once."""
    return sum(p.numel() for p in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """Returns the bytes of the state dict, tied tensors once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
