"""Small facts about a module as it stands: its device, its mode, its tensors by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Puts `model` into training or evaluation mode, and each of its modules back into its own at the end."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers by name; a tied one comes under each of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def device_of(model: nn.Module) -> torch.device:
    """Returns where the parameters of `model` lie; the CPU where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module of `model` into eval mode, and each back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def unsaved_buffers(model: nn.Module) -> set[str]:
    """Returns the names of the buffers that are no part of the state dict."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
