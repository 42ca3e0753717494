"""Random initial weights for a pruned network: the control that asks what its trained weights were worth.

Decides how a network forgets what it learned: every module draws its parameters anew, as it does where it is built.
Knows nothing of policies or searches.

Source: Liu et al., Rethinking the Value of Network Pruning, ICLR 2019.
"""

from __future__ import annotations

import torch
from torch import nn

from autoprune.errors import InputError


def forget(model: nn.Module, seed: int) -> None:
    """Gives every parameter and statistic of `model` its initial value again, in place; the widths stay.

    Modules use their own `reset_parameters`. Initial values that the model's class sets afterwards (a zero in the last
    norm of a block, say) are not known here.

    Args:
        model: The network.
        seed: Draws the weights; the generators of the caller stay as they are.

    Raises:
        InputError: A module has parameters of its own and no `reset_parameters`.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index or 0 for device in devices]):
        torch.manual_seed(seed)
        for path, module in model.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif next(module.parameters(recurse=False), None) is not None:
                kind = type(module).__name__
                raise InputError(
                    f"{path or 'the model'} ({kind}) has parameters and no reset_parameters(), so it cannot be"
                    " trained from scratch: set search.scratch to 0, or give the class that method"
                )
