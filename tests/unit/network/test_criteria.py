"""Criteria: small cases computed by hand or by brute force."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoprune.errors import DataError, PolicyError
from autoprune.network.calibration import gather
from autoprune.network.criteria import CRITERIA, Evidence, choose, gather_gradients, score
from autoprune.network.trace import trace

X = torch.randn(256, 5, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()


def mlp(norm=False, bias=True):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(4)] if norm else []
    return nn.Sequential(nn.Linear(5, 4, bias=bias), *middle, nn.ReLU(), nn.Linear(4, 3)).eval()


def evidence_of(model, *, x=X, gradients=False, seed=0):
    network = trace(model, x[:2])
    found = gather_gradients(network, [(X[:128], Y[:128]), (X[128:], Y[128:])], F.cross_entropy) if gradients else {}
    return Evidence(network, gather(network, [x]), found, seed)


def scores_of(name, evidence):
    return CRITERIA[name](evidence, evidence.network.groups[0])


def with_rows(rows):
    model = nn.Sequential(nn.Linear(2, len(rows), bias=False), nn.ReLU(), nn.Linear(len(rows), 3)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(rows))
    network = trace(model, torch.zeros(2, 2))
    return Evidence(network)


ROWS = [[3.0, 4.0], [0.0, 1.0], [-6.0, 8.0]]


def test_l1_is_the_sum_of_absolute_weights():
    np.testing.assert_allclose(scores_of("l1", with_rows(ROWS)), np.array([7, 1, 14]) / (22 / 3))


def test_l2_is_the_euclidean_norm():
    np.testing.assert_allclose(scores_of("l2", with_rows(ROWS)), np.array([5, 1, 10]) / (16 / 3))


def test_fpgm_is_the_sum_of_distances_to_the_other_filters():
    a, b, c = (np.array(row) for row in ROWS)
    ab, ac, bc = (float(np.linalg.norm(u - v)) for u, v in ((a, b), (a, c), (b, c)))
    expected = np.array([ab + ac, ab + bc, ac + bc])
    np.testing.assert_allclose(scores_of("fpgm", with_rows(ROWS)), expected / expected.mean())


def test_lamp_divides_by_the_squares_of_all_that_are_as_large():
    np.testing.assert_allclose(scores_of("lamp", with_rows(ROWS)), [25 / 125, 1 / 126, 1.0])


def test_bn_scale_is_the_absolute_scale_and_l2_without_a_norm():
    model = mlp(norm=True)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -3.0, 0.5, 1.5]))
    np.testing.assert_allclose(scores_of("bn_scale", evidence_of(model)), np.array([1, 3, 0.5, 1.5]) / 1.5)
    plain = evidence_of(mlp())
    np.testing.assert_array_equal(scores_of("bn_scale", plain), scores_of("l2", plain))


def test_activation_is_the_root_mean_square_where_it_is_consumed():
    evidence = evidence_of(mlp())
    with torch.no_grad():
        expected = F.relu(evidence.network.model[0](X)).square().mean(0).sqrt().numpy()
    np.testing.assert_allclose(scores_of("activation", evidence), expected / expected.mean(), rtol=1e-4)


def test_random_follows_the_seed_and_differs_between_groups():
    evidence = evidence_of(mlp())
    np.testing.assert_array_equal(scores_of("random", evidence), scores_of("random", evidence_of(mlp())))
    assert not np.array_equal(scores_of("random", evidence), scores_of("random", evidence_of(mlp(), seed=1)))
    deep = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    first, second = score(Evidence(trace(deep, X[:2])), ["random"])["random"].values()
    assert not np.array_equal(first, second)


def least_error(x, y):
    design = np.hstack([x, np.ones((len(x), 1))])
    return float(np.square(y - design @ np.linalg.lstsq(design, y, rcond=None)[0]).mean(0).sum())


def test_obs_is_the_error_that_a_refit_cannot_repair():
    """Brute force: the consumer refitted by numpy with each channel taken away in turn."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    evidence = evidence_of(model)
    with torch.no_grad():
        hidden = model[:2](X).double().numpy()
        wanted = model(X).double().numpy()
    brute = np.array([least_error(np.delete(hidden, c, axis=1), wanted) for c in range(6)])
    found = scores_of("obs", evidence)
    np.testing.assert_allclose(found, brute / brute.mean(), rtol=0.05)
    assert found.argsort().tolist() == brute.argsort().tolist()


def test_obs_gives_a_channel_that_copies_another_one_no_worth():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[0].weight[3] = model[0].weight[1]
        model[0].bias[3] = model[0].bias[1]
    found = scores_of("obs", evidence_of(model))
    assert max(found[1], found[3]) < 0.05 * min(found[0], found[2])


def test_taylor_is_the_squared_first_order_change_of_the_loss():
    """Finite differences: each row of weights scaled down a little, one batch at a time."""
    model = mlp(bias=False).double()
    network = trace(model, X[:2].double())
    batches = [(X[:128].double(), Y[:128]), (X[128:].double(), Y[128:])]
    evidence = Evidence(network, {}, gather_gradients(network, batches, F.cross_entropy))
    model.requires_grad_(False)
    expected, step = np.zeros(4), 1e-6
    for x, y in batches:
        base = float(F.cross_entropy(model(x), y))
        for c in range(4):
            kept = model[0].weight[c].clone()
            with torch.no_grad():
                model[0].weight[c] *= 1 - step
                expected[c] += ((base - float(F.cross_entropy(model(x), y))) / step) ** 2
                model[0].weight[c] = kept
    np.testing.assert_allclose(scores_of("taylor", evidence), expected / expected.mean(), rtol=1e-3)


def test_gathering_gradients_leaves_the_model_as_it_was():
    model = mlp()
    model[0].weight.requires_grad_(False)
    evidence_of(model, gradients=True)
    assert all(p.grad is None for p in model.parameters())
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad


def test_gradients_without_batches_are_refused():
    with pytest.raises(DataError, match="no labelled calibration images"):
        gather_gradients(trace(mlp(), X[:2]), [], F.cross_entropy)


def test_taylor_without_gradients_is_refused():
    with pytest.raises(PolicyError, match="taylor needs gradients"):
        score(evidence_of(mlp()), ["taylor"])


def test_every_criterion_scores_every_group_of_a_branched_network():
    class Branched(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.grouped, self.back = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 1)
            self.fc = nn.Linear(8 * 4, 3)

        def forward(self, x):
            x = F.relu(self.norm(self.stem(x)))
            x = x + self.back(F.relu(self.grouped(self.deep(x))))
            return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))

    torch.manual_seed(0)
    x = torch.randn(16, 3, 6, 6)
    network = trace(Branched(), x[:2])
    gradients = gather_gradients(network, [(x, torch.arange(16) % 3)], F.cross_entropy)
    scores = score(Evidence(network, gather(network, [x]), gradients), CRITERIA)
    assert list(scores) == list(CRITERIA)
    for name, by_group in scores.items():
        for group in network.groups:
            found = by_group[group.name]
            assert found.shape == (group.size,)
            assert (found >= 0).all()
            assert name in ("lamp", "random") or found.mean() == pytest.approx(1.0)


def test_an_unknown_criterion_is_refused_with_the_nearest_name():
    with pytest.raises(PolicyError, match="unknown criterion 'taylr'; did you mean 'taylor'"):
        score(evidence_of(mlp()), ["taylr"])


def test_scores_that_are_not_finite_are_refused_by_name():
    model = mlp()
    network = trace(model, X[:2])
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(PolicyError, match="criterion 'l2' gives scores that are not finite for group '0'"):
        score(Evidence(network), ["l2"])


def test_weights_that_are_all_zero_are_all_worth_the_same():
    np.testing.assert_array_equal(scores_of("l1", with_rows([[0.0, 0.0]] * 3)), np.ones(3))


def test_the_highest_scores_are_chosen_in_ascending_order_and_ties_keep_the_first():
    assert choose(np.array([1.0, 3.0, 2.0, 3.0]), 2).tolist() == [1, 3]
    assert choose(np.array([1.0, 3.0, 2.0, 3.0]), 3).tolist() == [1, 2, 3]
    assert choose(np.ones(4), 2).tolist() == [0, 1]
