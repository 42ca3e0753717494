"""Number formats: an autocast type, and the memory format of images.

Decides what a format does to a model and to what it reads. Must not know how one is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.network.data.staging import Device


@dataclass(frozen=True, slots=True)
class Precision:
    """The number format in which a network runs: an autocast type (None: float32) and the memory format of images."""

    autocast_dtype: torch.dtype | None = None
    channels_last: bool = True

    def arrange(self, value: Tensor) -> Tensor:
        """Returns a 4-D tensor of real numbers in this memory format; any other tensor as it is."""
        if value.dim() != 4 or not value.is_floating_point():
            return value
        return value.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def arrange_model(self, model: nn.Module) -> None:
        """Brings the weights of `model` into this memory format, in place; their values stay."""
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = self.arrange(parameter.data)


def autocast(device: Device, dtype: torch.dtype | None) -> torch.autocast:
    """Returns the context in which a forward pass runs in `dtype`; None: in float32."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
