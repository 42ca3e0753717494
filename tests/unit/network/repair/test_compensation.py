"""Compensation against closed forms that numpy solves on the raw inputs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoprune.network.calibration.moments import Moments, gather
from autoprune.network.repair.compensation import compensated_tensors, entries_of, layer_moments, refit, regular_factor
from autoprune.network.surgery.cut import cut
from autoprune.network.tracing.trace import trace

RNG = np.random.default_rng(0)


def moments_of(x, groups=1, kernel=1):
    """Moments of `(rows, G * d)` inputs."""
    rows = torch.tensor(x, dtype=torch.float64).reshape(len(x), groups, -1).transpose(0, 1)
    return Moments(rows.transpose(1, 2) @ rows / len(x), rows.mean(1), len(x), kernel)


def correlated(rows=400, channels=8, rank=5, shift=0.7):
    return RNG.normal(size=(rows, rank)) @ RNG.normal(size=(rank, channels)) + 0.1 * RNG.normal(
        size=(rows, channels)
    ) + shift  # fmt: skip


def test_a_refit_without_bias_is_the_least_squares_solution():
    x, weight, stay = correlated(), RNG.normal(size=(3, 8)), np.array([0, 2, 3, 6])
    expected = np.linalg.lstsq(x[:, stay], x @ weight.T, rcond=None)[0].T
    found, shift = refit(torch.tensor(weight), moments_of(x), stay, ridge=0.0, centred=False)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-8)
    assert not shift.any()


def test_a_refit_with_bias_is_the_least_squares_solution_with_an_intercept():
    x, weight, stay = correlated(), RNG.normal(size=(3, 8)), np.array([1, 4, 5])
    ones = np.ones((len(x), 1))
    expected = np.linalg.lstsq(np.hstack([x[:, stay], ones]), x @ weight.T, rcond=None)[0].T
    found, shift = refit(torch.tensor(weight), moments_of(x), stay, ridge=0.0)
    np.testing.assert_allclose(found.numpy(), expected[:, :-1], atol=1e-8)
    np.testing.assert_allclose(shift.numpy(), expected[:, -1], atol=1e-8)


def test_the_ridge_is_relative_to_the_mean_power_and_pulls_towards_the_dense_weight():
    x, weight, stay = correlated(), RNG.normal(size=(3, 8)), np.array([1, 4, 5])
    kept, gram = x[:, stay], x[:, stay].T @ x[:, stay] / len(x)
    strength = 0.05 * np.trace(gram) / 3
    right = kept.T @ (x @ weight.T) / len(x) + strength * weight[:, stay].T
    expected = np.linalg.solve(gram + strength * np.eye(3), right).T
    found, _ = refit(torch.tensor(weight), moments_of(x), stay, ridge=0.05, centred=False)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)
    far, _ = refit(torch.tensor(weight), moments_of(x), stay, ridge=1e9, centred=False)
    np.testing.assert_allclose(far.numpy(), weight[:, stay], atol=1e-6)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_keeping_every_channel_returns_the_dense_weight(centred, ridge):
    weight = torch.tensor(RNG.normal(size=(3, 8)))
    found, shift = refit(weight, moments_of(correlated()), np.arange(8), ridge=ridge, centred=centred)
    torch.testing.assert_close(found, weight, atol=1e-7, rtol=0)
    assert shift.abs().max() < 1e-7


def test_channels_that_depend_on_others_are_reconstructed_exactly():
    base = RNG.normal(size=(300, 4))
    x = np.hstack([base, base[:, :2] @ RNG.normal(size=(2, 2)) + 0.3])
    weight = RNG.normal(size=(5, 6))
    found, shift = refit(torch.tensor(weight), moments_of(x), np.arange(4), ridge=0.0)
    np.testing.assert_allclose(base @ found.numpy().T + shift.numpy(), x @ weight.T, atol=1e-8)


def test_a_dead_channel_keeps_its_weight_and_breaks_nothing():
    x = correlated(channels=6)
    x[:, 2] = 0.0
    weight = RNG.normal(size=(3, 6))
    found, shift = refit(torch.tensor(weight), moments_of(x), np.array([0, 2, 4]))
    assert torch.isfinite(found).all()
    assert torch.isfinite(shift).all()
    np.testing.assert_allclose(found[:, 1].numpy(), weight[:, 2], atol=1e-8)


def test_a_layer_that_reads_nothing_but_zeros_keeps_its_weight():
    weight = torch.tensor(RNG.normal(size=(3, 6)))
    found, _ = refit(weight, moments_of(np.zeros((50, 6))), np.array([0, 2]))
    torch.testing.assert_close(found, weight[:, [0, 2]])


def test_each_group_of_a_grouped_convolution_is_refitted_on_its_own_inputs():
    x = correlated(channels=8)
    weight, stay = RNG.normal(size=(6, 4)), np.array([0, 3])
    found, _ = refit(torch.tensor(weight), moments_of(x, groups=2), stay, ridge=0.0, centred=False)
    for part in range(2):
        own, rows = x[:, 4 * part : 4 * part + 4], slice(3 * part, 3 * part + 3)
        expected = np.linalg.lstsq(own[:, stay], own @ weight[rows].T, rcond=None)[0].T
        np.testing.assert_allclose(found[rows].numpy(), expected, atol=1e-8)


def test_the_entries_of_a_channel_lie_together():
    assert entries_of(np.array([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


# --- in a network -------------------------------------------------------------------------------------------------


def net(bias=True, norm=False):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1, bias=bias)]
    layers += [nn.BatchNorm2d(6)] if norm else []
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()


def images(count=48):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def consumer_error(model, dense, x):
    with torch.no_grad():
        return float((model[:3](x) - dense[:3](x)).square().mean())


@pytest.mark.parametrize("bias", [True, False])
def test_compensation_brings_the_consumers_output_nearer_to_the_dense_one(bias):
    network = trace(net(bias), images(2))
    selection = {"0": np.array([0, 3, 5, 6])}
    tensors = compensated_tensors(network, selection, gather(network, [images()]))
    assert set(tensors) == ({"2.weight", "2.bias"} if bias else {"2.weight"})
    small = cut(network, selection)
    bare = consumer_error(small, network.model, images())
    small.load_state_dict({**small.state_dict(), **tensors})
    assert consumer_error(small, network.model, images()) < 0.7 * bare


def test_the_refit_of_a_convolution_is_the_best_one_over_all_patches():
    network = trace(net(), images(2))
    kept, x = np.array([0, 3, 5, 6]), images()
    with torch.no_grad():
        hidden = network.model[:2](x)
        patches = F.unfold(hidden, 3, padding=1).transpose(1, 2).reshape(-1, 72).double()
        wanted = patches @ network.model[2].weight.reshape(6, -1).T.double()
    columns = patches.reshape(-1, 8, 9)[:, kept].reshape(-1, 36)
    design = torch.cat([columns, torch.ones(len(columns), 1)], 1).numpy()
    expected = np.linalg.lstsq(design, wanted.numpy(), rcond=None)[0].T
    found = compensated_tensors(network, {"0": kept}, gather(network, [x]), ridge=1e-9)
    np.testing.assert_allclose(found["2.weight"].reshape(6, -1).numpy(), expected[:, :-1], atol=2e-4)
    shift = found["2.bias"] - network.model[2].bias.detach()
    np.testing.assert_allclose(shift.numpy(), expected[:, -1], atol=2e-4)


def test_layers_whose_inputs_stay_whole_are_left_alone():
    network = trace(net(), images(2))
    assert set(compensated_tensors(network, {"2": np.arange(3)}, gather(network, [images()]))) == {"4.weight", "4.bias"}
    assert compensated_tensors(network, {}, gather(network, [images()])) == {}


def test_refitted_weights_are_cut_to_the_outputs_that_stay():
    network = trace(net(), images(2))
    tensors = compensated_tensors(network, {"0": np.arange(4), "2": np.arange(3)}, gather(network, [images()]))
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "2.weight": (3, 4, 3, 3), "2.bias": (3,), "4.weight": (2, 3, 1, 1), "4.bias": (2,),
    }  # fmt: skip


def test_a_constant_shift_is_left_to_the_batch_norm_only_where_it_is_recalibrated():
    network = trace(net(bias=False, norm=True), images(2))
    statistics = gather(network, [images()])
    (links,) = [links for links in network.links if links.module == "2"]
    moments = statistics["2"]
    torch.testing.assert_close(layer_moments(moments, links), moments.covariance())
    torch.testing.assert_close(layer_moments(moments, links, recalibrated=False), moments.gram)


def test_a_weight_with_two_uses_is_not_refitted_to_one_of_them():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.b(torch.relu(self.a(x)))))))

    x = torch.randn(64, 6)
    network = trace(Twice(), x[:2])
    assert set(compensated_tensors(network, {"a": np.arange(4)}, gather(network, [x]))) == {"c.weight", "c.bias"}


# --- the kinds of layers that read what was removed ---------------------------------------------------------------


class Attention(nn.Module):
    """One head whose value channels are read by the output projection."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 12)
        self.proj, self.head = nn.Linear(12, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.proj(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))).relu())


class Recurrent(nn.Module):
    """Hidden units of two layers that a linear layer reads at every step."""

    def __init__(self, cls):
        super().__init__()
        self.cells = cls(6, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.cells(x)[0])


def perceptron():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


KINDS = {
    "convolution": (net, (3, 6, 6), "0", "2"),
    "linear": (perceptron, (6,), "0", "2"),
    "attention": (Attention, (7, 6), "v", "proj"),
    "lstm": (lambda: Recurrent(nn.LSTM), (7, 6), "cells", "head"),
    "gru": (lambda: Recurrent(nn.GRU), (7, 6), "cells", "head"),
}


@pytest.mark.parametrize(("build", "shape", "group", "consumer"), KINDS.values(), ids=KINDS)
def test_every_kind_of_consumer_is_nearer_to_the_dense_output_when_compensated(build, shape, group, consumer, output):
    torch.manual_seed(0)
    model = build().eval()
    x = torch.randn(256, *shape)
    network = trace(model, x[:2])
    kept = np.arange(0, network.group(group).size, 2)
    tensors = compensated_tensors(network, {group: kept}, gather(network, [x]))
    assert f"{consumer}.weight" in tensors
    small = cut(network, {group: kept})
    fresh = torch.randn(64, *shape)
    dense = output(model, fresh)
    bare = (output(small, fresh) - dense).square().mean()
    small.load_state_dict({**small.state_dict(), **tensors})
    assert (output(small, fresh) - dense).square().mean() < 0.8 * bare


@pytest.mark.parametrize("normalised", [True, False])
def test_the_constant_part_of_a_removed_channel_goes_into_the_bias_or_is_left_to_the_batch_norm(normalised, output):
    model = net(bias=not normalised, norm=normalised)
    model[2] = nn.Conv2d(8, 6, 3, bias=not normalised)  # without padding a constant is one at the border too
    with torch.no_grad():
        model[0].weight[5] = 0.0
        model[0].bias[5] = 3.0  # a channel that is nothing but a constant
        model[2].weight[:, 5] += 0.5
    x = images()
    network = trace(model, x[:2])
    kept = np.setdiff1d(np.arange(8), [5])
    tensors = compensated_tensors(network, {"0": kept}, gather(network, [x]), ridge=1e-9)
    torch.testing.assert_close(tensors["2.weight"], model[2].weight[:, kept].detach(), atol=2e-3, rtol=0)
    if normalised:
        assert "2.bias" not in tensors
        return
    lost = 3.0 * model[2].weight[:, 5].sum((1, 2))
    torch.testing.assert_close(tensors["2.bias"], (model[2].bias + lost).detach(), atol=2e-3, rtol=0)


def test_a_ridge_that_rounding_outweighs_is_raised_until_the_moments_factor():
    """Forty inputs that are all the same one, and errors beneath: 1e-4 of the diagonal is too little."""
    generator = torch.Generator().manual_seed(0)
    noise = 1e-3 * torch.randn(40, 40, generator=generator, dtype=torch.float64)
    matrix = torch.stack([torch.ones(40, 40) + (noise + noise.T) / 2, torch.eye(40)]).double()
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(matrix + 1e-4 * torch.eye(40))
    factor = regular_factor(matrix, 1e-4)
    added = factor @ factor.mT - matrix
    ridge = float(added[0, 0, 0]) / float(matrix[0].diagonal().mean())
    assert ridge in (pytest.approx(1e-3), pytest.approx(1e-2))
    torch.testing.assert_close(added[1], ridge * torch.eye(40, dtype=torch.float64))
    easy = regular_factor(matrix[1:], 1e-4)
    torch.testing.assert_close(easy @ easy.mT, 1.0001 * matrix[1:])
    with pytest.raises(torch.linalg.LinAlgError):
        regular_factor(torch.full((1, 3, 3), float("nan")), 1e-4)
