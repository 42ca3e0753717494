"""Weights that a hook computes before each pass: old `weight_norm`, old `spectral_norm`, `torch.nn.utils.prune`.

Such a weight is a plain attribute of its module, made from parameters under other names. Decides which of them are made
anew when those parameters shrink, and which networks are refused. Knows nothing of groups.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from autoprune.errors import TraceError


def make_weights(module: nn.Module) -> None:
    """Makes the weights of a module say what its parameters say, where hooks compute them."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | BasePruningMethod):
            with torch.no_grad():
                hook(module, ())


def check_hooks(model: nn.Module) -> None:
    """Refuses a model with weights that cannot follow what is pruned.

    Raises:
        TraceError: It has layers under the old `spectral_norm`.
    """
    paths = [
        path
        for path, module in model.named_modules()
        if any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
    ]
    if paths:
        raise TraceError(
            f"{type(model).__name__} divides weights by a norm of all of their channels, which would change for those"
            f" that stay: {', '.join(paths[:8])}{' and more' if len(paths) > 8 else ''}\n"
            "  call torch.nn.utils.remove_spectral_norm on these modules first: their output stays what it is"
        )
