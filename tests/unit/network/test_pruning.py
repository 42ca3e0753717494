"""`autoprune.prune`: one smaller network without a search."""

import pytest
import torch
from torch import nn

import autoprune
from autoprune.errors import PolicyError

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(64) % 4


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    return autoprune.trace(model, X[:2])


def widths(model):
    return model[0].out_channels, model[2].out_channels


def test_one_ratio_goes_for_every_group_and_the_dense_model_stays(network):
    assert widths(autoprune.prune(network, 0.5)) == (6, 4)
    assert widths(network.model) == (12, 8)


def test_ratios_by_group_leave_the_others_whole(network):
    assert widths(autoprune.prune(network, {"2": 0.75})) == (12, 2)


def test_ratio_zero_is_the_identity(network, output):
    small = autoprune.prune(network, 0.0, calibration=[X])
    assert torch.equal(output(small, X), output(network.model, X))
    assert small is not network.model


def test_the_filters_with_the_largest_norm_stay(network):
    norms = network.model[0].weight.detach().flatten(1).norm(dim=1)
    kept = norms.argsort(descending=True)[:6].sort().values
    assert torch.equal(autoprune.prune(network, 0.5)[0].weight, network.model[0].weight[kept])


def test_with_calibration_the_output_is_nearer_to_the_dense_one(network, output):
    dense = output(network.model, X)
    bare, repaired = autoprune.prune(network, 0.5), autoprune.prune(network, 0.5, calibration=[X[:32], X[32:]])
    assert (output(repaired, X) - dense).square().mean() < 0.5 * (output(bare, X) - dense).square().mean()


def test_batches_of_inputs_and_targets_serve_as_well(network):
    a = autoprune.prune(network, 0.5, calibration=[X])
    b = autoprune.prune(network, 0.5, calibration=[(X, Y)])
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("criterion", ["activation", "obs", "obs_greedy", "taylor", "hessian", "hrank"])
def test_criteria_that_need_batches_work_with_them_and_say_so_without(network, criterion):
    assert widths(autoprune.prune(network, 0.5, criterion=criterion, calibration=[(X, Y)])) == (6, 4)
    with pytest.raises(PolicyError, match=f"the criterion {criterion} needs calibration batches"):
        autoprune.prune(network, 0.5, criterion=criterion)


def test_taylor_without_targets_is_refused(network):
    with pytest.raises(PolicyError, match=r"needs calibration batches of \(inputs, targets\)"):
        autoprune.prune(network, 0.5, criterion="taylor", calibration=[X])


def test_widths_are_rounded(network):
    assert widths(autoprune.prune(network, 0.3, round_to=4)) == (8, 4)


def test_at_least_one_channel_stays(network):
    assert widths(autoprune.prune(network, 0.999)) == (1, 1)


@pytest.mark.parametrize("ratio", [1.1, -0.1, 7])
def test_a_ratio_outside_zero_to_one_is_refused(network, ratio):
    with pytest.raises(PolicyError, match=r"outside \[0, 1\]"):
        autoprune.prune(network, ratio)


def test_unknown_groups_and_criteria_are_refused(network):
    with pytest.raises(PolicyError, match="no pruning group '22'"):
        autoprune.prune(network, {"22": 0.5})
    with pytest.raises(PolicyError, match="unknown criterion 'l22'"):
        autoprune.prune(network, 0.5, criterion="l22")
