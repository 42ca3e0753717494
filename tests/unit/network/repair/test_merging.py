"""Merging: a removed channel goes into the kept one that is most like it, exactly where it is a copy of it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoprune.network.models.building import build_model
from autoprune.network.repair.merging import heirs_of, merge
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.twin import relative_error
from autoprune.network.tracing.trace import trace

KEPT, GONE = 2, 5
"""Channel 5 is made a copy of channel 2 and then removed."""


def copied(model, scale=1.0):
    """Makes the channel `GONE` of every module that is `doubled` `scale` times the channel `KEPT`."""
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "doubled", 0):
                for parameter in (module.weight, module.bias):
                    if parameter is not None:
                        parameter[GONE] = parameter[KEPT] * (scale if module.doubled == 1 else 1.0)
            if getattr(module, "doubled", 0) == 2:
                module.running_mean[GONE], module.running_var[GONE] = (
                    module.running_mean[KEPT],
                    module.running_var[KEPT],
                )
    return model


def doubled(module, kind=1):
    module.doubled = kind
    return module


def merged(network, selection):
    small = cut(network, selection)
    merge(network, small, selection)
    return small


def linear():
    return nn.Sequential(doubled(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 4)), torch.randn(16, 6)


def convolution():
    return nn.Sequential(
        doubled(nn.Conv2d(3, 8, 3, padding=1)), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3, padding=1)
    ), torch.randn(4, 3, 8, 8)


def flattened():
    return nn.Sequential(
        doubled(nn.Conv2d(3, 8, 3, padding=1)), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    ), torch.randn(4, 3, 8, 8)


def normalised(bias=True):
    layers = [doubled(nn.Conv2d(3, 8, 3, padding=1, bias=False)), doubled(nn.BatchNorm2d(8), 2), nn.SiLU()]
    layers += [nn.Conv2d(8, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    return nn.Sequential(*layers), torch.randn(4, 3, 8, 8)


def depthwise():
    return nn.Sequential(
        doubled(nn.Conv2d(3, 8, 1)), nn.ReLU(), doubled(nn.Conv2d(8, 8, 3, groups=8, padding=1), 3), nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    ), torch.randn(4, 3, 6, 6)  # fmt: skip


CASES = {"linear": linear, "convolution": convolution, "flattened": flattened, "normalised": normalised,
         "depthwise": depthwise}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_removed_copy_of_a_kept_channel_leaves_the_output_as_it_was(case, output):
    torch.manual_seed(0)
    model, x = case()
    model = copied(lively(model))
    network = trace(model, x[:2])
    group = network.groups[0]
    selection = {group.name: np.setdiff1d(np.arange(group.size), [GONE])}
    (heir,) = heirs_of(network, selection)
    assert (heir.gone - group.offset, heir.to - group.offset) == (GONE, KEPT)
    assert heir.scale == pytest.approx(1)
    dense = output(model, x)
    assert relative_error(output(cut(network, selection), x), dense) > 1e-3
    assert relative_error(output(merged(network, selection), x), dense) < 1e-5


def lively(model):
    """Batch norms with statistics of their own, so that nothing is neutral."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0.3, 0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize("case", [linear, convolution, flattened])
def test_under_a_rectifier_a_multiple_of_a_kept_channel_is_merged_exactly(case, output):
    torch.manual_seed(0)
    model, x = case()
    model = copied(model.eval(), scale=2.5)
    network = trace(model, x[:2])
    selection = {network.groups[0].name: np.setdiff1d(np.arange(8), [GONE])}
    assert heirs_of(network, selection)[0].scale == pytest.approx(2.5)
    assert relative_error(output(merged(network, selection), x), output(model, x)) < 1e-5


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_hidden_unit_that_is_a_copy_is_merged_in_every_gate_layer_and_consumer(cls, output):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = cls(4, 8, num_layers=2, bidirectional=True, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.cells(x)[0][:, -1])

    torch.manual_seed(0)
    model, x = Reader().eval(), torch.randn(5, 6, 4)
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[cls]
    with torch.no_grad():
        for name, parameter in model.cells.named_parameters():
            rows = parameter.view(gates, 8, -1)
            rows[:, GONE] = rows[:, KEPT]
            assert name.startswith(("weight", "bias"))
    network = trace(model, x[:2])
    selection = {"cells": np.setdiff1d(np.arange(8), [GONE])}
    assert relative_error(output(cut(network, selection), x), output(model, x)) > 1e-3
    assert relative_error(output(merged(network, selection), x), output(model, x)) < 1e-5


def test_a_value_channel_of_attention_that_is_a_copy_is_merged_in_the_projection(output):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6), doubled(nn.Linear(6, 12))
            self.proj, self.head = nn.Linear(12, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.proj(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))).relu())

    torch.manual_seed(0)
    model, x = copied(Attention().eval(), scale=1.5), torch.randn(3, 5, 6)
    network = trace(model, x[:2])
    selection = {"v": np.setdiff1d(np.arange(12), [GONE])}
    assert relative_error(output(cut(network, selection), x), output(model, x)) > 1e-3
    assert relative_error(output(merged(network, selection), x), output(model, x)) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Sigmoid])
def test_the_constant_part_of_a_removed_channel_goes_into_the_bias_or_the_batch_norm(bias, activation, output):
    torch.manual_seed(0)
    model, _ = normalised(bias)
    model[2] = activation()
    model = lively(model)
    with torch.no_grad():
        model[1].weight[GONE] = 0.0  # a channel that is nothing but the shift of its BatchNorm
        model[1].bias[GONE] = 1.7
        model[3].weight[:, GONE] += 1.0
    x = torch.randn(4, 3, 8, 8)
    network = trace(model, x[:2])
    selection = {"0": np.setdiff1d(np.arange(8), [GONE])}
    dense = output(model, x)
    assert relative_error(output(cut(network, selection), x), dense) > 0.05
    small = merged(network, selection)
    assert relative_error(output(small, x), dense) < 1e-5
    assert (small[3].bias is not None) == bias


def test_channels_that_are_nothing_like_the_kept_ones_are_left_out():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
    network = trace(model, torch.zeros(2, 4))
    selection = {"0": np.array([0, 1])}
    assert [heir.scale for heir in heirs_of(network, selection)] == [0.0, 0.0]
    small = merged(network, selection)
    assert torch.equal(small[2].weight, model[2].weight[:, :2])


def test_merging_beats_cutting_on_a_network_with_many_copies(output):
    torch.manual_seed(1)
    model, x = convolution()
    with torch.no_grad():
        for k in range(4):
            model[0].weight[4 + k] = model[0].weight[k] + 0.1 * torch.randn(3, 3, 3)
            model[0].bias[4 + k] = model[0].bias[k]
    network = trace(model.eval(), x[:2])
    selection = {"0": np.arange(4)}
    dense = output(model, x)
    bare = (output(cut(network, selection), x) - dense).square().mean()
    assert (output(merged(network, selection), x) - dense).square().mean() < 0.2 * bare


def test_merging_needs_no_data_and_leaves_the_dense_network_alone(select):
    model = build_model(name="resnet20", arguments={"in_channels": 1, "shortcut": "B"}).eval()
    network = trace(model, torch.zeros(2, 1, 8, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = merged(network, select(network))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.isfinite().all() for value in small.state_dict().values())


def test_nothing_is_merged_where_nothing_goes(output):
    model, x = convolution()
    network = trace(model.eval(), x[:2])
    assert torch.equal(output(merged(network, {}), x), output(model, x))
