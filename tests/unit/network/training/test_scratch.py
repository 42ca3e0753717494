"""Networks that forget their weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoprune.errors import InputError
from autoprune.network.training.scratch import forget


def small() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
    model[1].running_mean.fill_(3.0)
    return model


def test_every_weight_and_statistic_is_initial_again_and_every_shape_stays() -> None:
    model = small()
    shapes = [p.shape for p in model.parameters()]
    forget(model, 0)
    assert [p.shape for p in model.parameters()] == shapes
    assert all(bool((p != 7.0).all()) for p in model.parameters())
    assert torch.equal(model[1].running_mean, torch.zeros(8))
    assert torch.equal(model[1].weight, torch.ones(8))


def test_the_seed_decides_and_the_generator_of_the_caller_stays() -> None:
    models = [small() for _ in range(3)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        forget(model, seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(models[0][0].weight, models[1][0].weight)
    assert not torch.equal(models[0][0].weight, models[2][0].weight)


def test_a_module_that_cannot_forget_is_named() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(InputError, match=r"1 \(Scale\) has parameters and no reset_parameters"):
        forget(nn.Sequential(nn.Linear(2, 3), Scale()), 0)
