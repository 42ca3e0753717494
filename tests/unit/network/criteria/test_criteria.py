"""Criteria: small cases computed by hand or by brute force."""

import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoprune.errors import DataError, InputError, PolicyError
from autoprune.network.calibration.moments import gather
from autoprune.network.criteria.channels import CRITERIA, choose, score
from autoprune.network.criteria.gradients import gather_fisher, gather_gradients
from autoprune.network.criteria.inputs import Evidence
from autoprune.network.criteria.own import criteria_key
from autoprune.network.criteria.ranks import gather_ranks
from autoprune.network.tracing.trace import trace

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
    batches = [(x, torch.arange(16) % 3)]
    gradients = gather_gradients(network, batches, F.cross_entropy)
    fisher, ranks = gather_fisher(network, batches, F.cross_entropy), gather_ranks(network, x)
    scores = score(Evidence(network, gather(network, [x]), gradients, 0, fisher, ranks), CRITERIA)
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


def test_hessian_adds_up_the_squares_of_gradient_times_weight():
    model = mlp()
    network = trace(model, X[:2])
    batches = [(X[:8], Y[:8]), (X[8:24], Y[8:24])]
    expected = torch.zeros(4, dtype=torch.float64)
    for x, y in batches:
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model[0].weight])
        expected += (gradient * model[0].weight).detach().double().square().sum(1) / 2
    evidence = Evidence(network, fisher=gather_fisher(network, batches, F.cross_entropy))
    np.testing.assert_allclose(scores_of("hessian", evidence), expected / expected.mean(), rtol=1e-5)
    with pytest.raises(PolicyError, match="the criterion hessian needs gradients"):
        scores_of("hessian", Evidence(network))
    with pytest.raises(DataError, match="no labelled"):
        gather_fisher(network, [], F.cross_entropy)


def test_hrank_is_the_mean_rank_of_the_channels_maps():
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(3, 1, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).reshape(3, 2, 1, 1))
    x = torch.stack([torch.ones(6, 6), torch.eye(6)]).expand(4, 2, 6, 6)  # ranks 1 and 6
    network = trace(model, x[:2])
    evidence = Evidence(network, ranks=gather_ranks(network, x))
    np.testing.assert_allclose(scores_of("hrank", evidence), np.array([1, 6, 0]) / (7 / 3))
    plain = with_rows(ROWS)
    np.testing.assert_allclose(scores_of("hrank", plain), scores_of("l2", plain))


def own(monkeypatch, function):
    module = types.ModuleType("their_criteria")
    module.function = function
    monkeypatch.setitem(sys.modules, "their_criteria", module)
    return "their_criteria:function"


def test_an_own_criterion_gets_weights_and_inputs_a_channel_and_is_made_relative(monkeypatch):
    seen = []

    def function(weights, inputs):
        seen.append((weights, inputs))
        return weights["0"].abs().sum(1)

    evidence = evidence_of(mlp())
    name = own(monkeypatch, function)
    found = score(evidence, [name])[name]["0"]
    np.testing.assert_allclose(found, scores_of("l1", evidence), rtol=1e-6)
    weights, inputs = seen[0]
    assert {path: tuple(w.shape) for path, w in weights.items()} == {"0": (4, 5)}
    hidden = F.relu(evidence.network.model[0](X)).detach()
    torch.testing.assert_close(inputs["2"], hidden.T @ hidden / len(X), rtol=1e-4, atol=1e-5)


def test_an_own_criterion_sees_every_place_of_a_convolution_once(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(18, 2)).eval()
    x = torch.randn(32, 3, 6, 6)
    network = trace(model, x[:2])
    seen = {}

    def function(weights, inputs):
        seen.update(inputs)
        return torch.ones(next(iter(weights.values())).shape[0])

    score(Evidence(network, gather(network, [x])), [own(monkeypatch, function)])
    with torch.no_grad():
        hidden = F.relu(model[0](x))  # (32, 4, 4, 4)
    windows = hidden.unfold(2, 2, 1).unfold(3, 2, 1)  # (32, 4, 3, 3, 2, 2)
    expected = torch.einsum("bchwij,bdhwij->cd", windows, windows) / (32 * 9 * 4)
    torch.testing.assert_close(seen["2"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda w: torch.ones(3), r"shape \(3,\) for group '0'; it must return 4 numbers, shape \(4,\)"),
        (lambda w: w["0"], r"shape \(4, 5\)"),
        (lambda w: None, "returns object"),
        (lambda w: ["a", "b", "c", "d"], "must return 4 numbers"),
        (lambda w: [1.0, float("nan"), 1.0, 1.0], "not finite for group '0'"),
        (lambda w: [1.0, float("inf"), 1.0, 1.0], "not finite for group '0'"),
    ],
)
def test_what_an_own_criterion_returns_is_checked(monkeypatch, result, message):
    name = own(monkeypatch, lambda weights, inputs: result(weights))
    with pytest.raises(PolicyError, match=message):
        score(evidence_of(mlp()), [name])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:function", "criterion 'no_such_module:function': there is no module 'no_such_module'"),
        ("math:sqroot", "criterion 'math:sqroot': math has no 'sqroot'; did you mean 'sqrt'"),
        ("math:pi", "criterion 'math:pi': pi is a float and cannot be called"),
    ],
)
def test_an_own_criterion_that_cannot_be_imported_says_why(path, message):
    with pytest.raises(InputError, match=message):
        score(evidence_of(mlp()), [path])


def test_the_cache_of_an_own_criterion_follows_its_source(tmp_path, monkeypatch):
    source = tmp_path / "changing_criteria.py"
    source.write_text("def function(weights, inputs):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = criteria_key(["l1", "changing_criteria:function"])
    assert before[0] == "l1"
    source.write_text("def function(weights, inputs):\n    return [2.0]\n")
    assert criteria_key(["l1", "changing_criteria:function"]) != before
