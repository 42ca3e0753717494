"""BatchNorm statistics of a pruned network, estimated anew: recalibration.

Decides how many batches count, and that nothing else changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoprune.network.data.samples import Split
from autoprune.network.data.staging import Device
from autoprune.network.devices.device import ieee
from autoprune.network.graph.modules import mode


def recalibrate(
    model: nn.Module, split: Split, *, batches: int = 10, batch_size: int = 128, device: Device = "cpu", seed: int = 0
) -> None:
    """Re-estimates the BatchNorm statistics of `model`, in place: the plain average over `batches` batches of `split`.

    Gradients, weights and every other module stay as they are; a network without BatchNorm is left alone. At most one
    pass over `split` is made, and a last batch that is smaller than the others is left out, as it would weigh too much.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms or batches < 1:
        return
    model.to(device)
    batch_size = min(batch_size, len(split))
    momenta = [norm.momentum for norm in norms]
    order = Generator().manual_seed(seed)
    calls = dict.fromkeys(norms, 0)

    def average(norm: nn.Module, args: tuple[Any, ...]) -> None:
        # What a momentum of None does, but for reading the number of calls back from the device at each of them.
        assert isinstance(norm, _BatchNorm)
        calls[norm] += 1
        norm.momentum = 1.0 / calls[norm]

    handles = [norm.register_forward_pre_hook(average) for norm in norms]
    with torch.no_grad(), mode(model, training=False), ieee(device):
        for norm in norms:
            norm.reset_running_stats()
            norm.training = True
        try:
            for number, (x, _) in enumerate(split.batches(batch_size, shuffle=order, device=device)):
                if number >= batches or len(x) < batch_size:
                    break
                model(x)
        finally:
            for norm, momentum, handle in zip(norms, momenta, handles, strict=True):
                norm.momentum = momentum
                handle.remove()
