"""Regularisation before pruning: it makes the right channels small, in all of their places, and nothing else."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.errors import InputError
from autoprune.network.models.building import build_model
from autoprune.network.models.zoo import LstmClassifier
from autoprune.network.tracing.trace import trace
from autoprune.network.training.recipe import Recipe, Stage, fine_tune
from autoprune.network.training.regularisation import (
    REGULARISERS,
    STRENGTHS,
    Regularisation,
    channel_norms,
    coupled_places,
    regulariser_of,
)


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ).eval()  # fmt: skip


def lstm():
    torch.manual_seed(0)
    return LstmClassifier(in_features=4, hidden=8, layers=2, num_classes=3).eval()


def traced(model, *shape):
    return trace(model, torch.zeros(2, *shape))


def spent(network, kind, strength, selection=None, steps=10):
    """Runs all steps of a stage without any training in between."""
    regulariser = regulariser_of(network, selection or {}, Regularisation(kind, strength))
    for step in range(steps):
        with regulariser.hiding():
            pass
        regulariser.shrink((step + 1) / steps, steps)


def norms(network):
    return channel_norms(network, coupled_places(network))[:-1]


def weights(network):
    return {name: value.clone() for name, value in network.model.state_dict().items()}


def test_every_kind_has_a_default_strength_and_a_builder():
    assert set(STRENGTHS) == set(REGULARISERS)
    assert Regularisation("growing_l2").force == STRENGTHS["growing_l2"]
    assert Regularisation("growing_l2", 0.0).force == 0


@pytest.mark.parametrize("kind", sorted(STRENGTHS))
def test_no_strength_changes_nothing(kind):
    network = traced(convolutions(), 2, 6, 6)
    before = weights(network)
    spent(network, kind, 0.0, {"0": np.arange(4)})
    assert all(torch.equal(value, before[name]) for name, value in weights(network).items())


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_bn_l1_takes_the_same_off_every_scale_however_long_the_stage_is(steps):
    network = traced(convolutions(), 2, 6, 6)
    with torch.no_grad():
        network.model[1].weight.copy_(torch.tensor([2.0, -2.0, 0.1, -0.1, 1.0, 1.0, 1.0, 0.8]))
    before = weights(network)
    spent(network, "bn_l1", 0.5, steps=steps)
    expected = [1.5, -1.5, 0.0, 0.0, 0.5, 0.5, 0.5, 0.3]
    torch.testing.assert_close(network.model[1].weight.detach(), torch.tensor(expected), atol=1e-5, rtol=0)
    changed = {name for name, value in weights(network).items() if not torch.equal(value, before[name])}
    assert changed == {"1.weight", "4.weight"}


def test_bn_l1_refuses_a_network_without_normalisation():
    with pytest.raises(InputError, match="group_lasso works for every network"):
        regulariser_of(traced(lstm(), 5, 4), {}, Regularisation("bn_l1"))


def test_group_lasso_shrinks_whole_channels_and_makes_small_ones_exactly_zero():
    network = traced(convolutions(), 2, 6, 6)
    with torch.no_grad():
        for place in (network.model[0].weight[3], network.model[1].weight[3:4], network.model[1].bias[3:4]):
            place.mul_(0.01)
        network.model[3].weight[:, 3].mul_(0.01)
    before = norms(network)
    spent(network, "group_lasso", 0.3)
    after = norms(network)
    assert (after < before).all()
    assert after[3] == 0
    assert (after[[0, 1, 2, 4, 5, 6, 7]] > 0).all()
    assert not network.model[3].weight[:, 3].any()


def test_the_norm_of_a_channel_counts_all_of_its_places():
    network = traced(convolutions(), 2, 6, 6)
    conv, norm, consumer = network.model[0], network.model[1], network.model[3]
    parts = [conv.weight[2], norm.weight[2], norm.bias[2], consumer.weight[:, 2]]
    expected = math.sqrt(sum(float(part.detach().square().sum()) for part in parts))
    assert float(norms(network)[2]) == pytest.approx(expected, rel=1e-5)


def test_a_channel_of_a_residual_stage_is_shrunk_in_every_block():
    network = traced(build_model(name="resnet20", arguments={"in_channels": 1, "shortcut": "B"}), 1, 8, 8)
    group = network.group("conv1")
    assert len(group.producers) > 1
    kept = np.arange(1, group.size)
    before = weights(network)
    spent(network, "growing_l2", 5.0, {"conv1": kept})
    after = weights(network)
    for name in ("conv1.weight", "layer1.0.conv2.weight", "layer1.2.conv2.weight", "layer1.1.bn2.weight"):
        torch.testing.assert_close(after[name][0], before[name][0] * math.exp(-5))
        assert torch.equal(after[name][1:], before[name][1:])
    for name in ("layer1.1.conv1.weight", "layer2.0.conv1.weight"):
        torch.testing.assert_close(after[name][:, 0], before[name][:, 0] * math.exp(-5))
        assert torch.equal(after[name][:, 1:], before[name][:, 1:])


@pytest.mark.parametrize("steps", [1, 20])
def test_growing_l2_shrinks_the_units_of_an_lstm_that_go_in_every_gate(steps):
    network = traced(lstm(), 5, 4)
    before = norms(network)
    name = network.groups[0].name
    spent(network, "growing_l2", 3.0, {name: np.array([0, 2, 5])}, steps=steps)
    ratio = norms(network) / before
    assert (ratio[[1, 3, 4, 6, 7]] < 0.1).all()
    assert (ratio[[0, 2, 5]] > 0.3).all()  # only the weights that they share with the others


def test_targeted_dropout_hides_only_what_goes_and_puts_it_back():
    network = traced(convolutions(), 2, 6, 6)
    before, x = weights(network), torch.randn(4, 2, 6, 6)
    regulariser = regulariser_of(network, {"0": np.arange(5)}, Regularisation("targeted_dropout", 1.0))
    with regulariser.hiding():
        assert not network.model[3].weight[:, 5:].any()
        assert network.model[3].weight[:, :5].all()
        network.model(x).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in weights(network).items())
    assert not network.model[3].weight.grad[:, 5:].any()
    assert network.model[3].weight.grad[:, :5].any()
    assert not network.model[0].weight.grad[5:].any()


def test_targeted_dropout_drops_about_as_often_as_it_says():
    network = traced(convolutions(), 2, 6, 6)
    torch.manual_seed(0)
    regulariser = regulariser_of(network, {"0": np.arange(2)}, Regularisation("targeted_dropout", 0.25))
    dropped = 0
    for _ in range(200):
        with regulariser.hiding():
            dropped += int((network.model[3].weight[:, 2:].abs().sum((0, 2, 3)) == 0).sum())
    assert 0.2 < dropped / (200 * 6) < 0.3


@pytest.mark.parametrize("kind", sorted(STRENGTHS))
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_with_a_regulariser_makes_channels_smaller_than_training_without(kind, optimizer, trained):
    network = trace(trained.model, torch.zeros(2, 2, 6, 6))
    selection = {"0": np.array([0, 1, 2, 3]), "3": np.array([0, 1, 2, 3])}
    recipe = Recipe(batch_size=32, optimizer=optimizer, lr=0.02 if optimizer == "sgd" else 0.002)
    sizes = []
    for strength in (0.0, STRENGTHS[kind]):
        own = replace(network, model=copy.deepcopy(network.model))
        regulariser = regulariser_of(own, selection, Regularisation(kind, strength))
        stage = Stage(0.0, 1.0, regulariser)
        history = fine_tune(
            own.model, trained.splits.train, recipe=recipe, epochs=2, stage=stage, teacher=network.model
        )
        assert all(math.isfinite(loss) for loss in history.train_loss)
        sizes.append(norms(own))
    going = [4, 5, 6, 7, 12, 13, 14, 15]
    ratio = (sizes[1] / sizes[0])[going].mean()
    assert ratio < (1.0 if kind in ("bn_l1", "group_lasso") else 0.5) or kind == "targeted_dropout"
    assert not torch.equal(sizes[0], sizes[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "growing_l1"}, "did you mean 'growing_l2'"),
        ({"kind": "bn_l1", "strength": -1.0}, "at least 0"),
        ({"kind": "bn_l1", "strength": math.nan}, "at least 0"),
        ({"kind": "targeted_dropout", "strength": 1.5}, "a probability, got 1.5"),
        ({"kind": "bn_l1", "share": 1.0}, "in \\(0, 1\\), got 1.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        Regularisation(**arguments)
