"""Greedy removal of channels against brute force: every remaining channel tried in turn, refitted by least squares."""

import numpy as np
import pytest
import torch
from torch import nn

import autoprune
from autoprune.network.calibration.moments import gather
from autoprune.network.criteria import obs
from autoprune.network.criteria.channels import score
from autoprune.network.criteria.inputs import Evidence, relative
from autoprune.network.criteria.tables import error_tables
from autoprune.network.tracing.trace import trace

X = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(300, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def evidence_of(model, x=X):
    network = trace(model.eval(), x[:2])
    return Evidence(network, gather(network, [x]))


def greedy(evidence, group):
    return score(evidence, ["obs_greedy"])["obs_greedy"][group]


class Two(nn.Module):
    """Two consumers of seven channels; the first one also reads three others, which never go."""

    def __init__(self):
        super().__init__()
        self.a, self.other = nn.Linear(5, 7), nn.Linear(5, 3)
        self.first, self.second = nn.Linear(10, 4), nn.Linear(7, 2)

    def forward(self, x):
        a = torch.tanh(self.a(x))
        joined = torch.cat([torch.tanh(self.other(x)), a], 1)
        return self.first(joined), self.second(a)


def conv(kernel, groups, flat):
    consumer = nn.Conv2d(8, 6, kernel, groups=groups, bias=False)
    head = [nn.Flatten(), nn.Linear(8 * 9, 4)] if flat else [consumer]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), *head)


def brute_order(evidence, group):
    """Tries every remaining channel, with each consumer refitted by numpy's solver in its regularised moments."""
    parts = []
    for links in evidence.consumers(group):
        moments = evidence.statistics[links.module]
        centred = links.layer.bias is not None
        matrices = (moments.covariance() if centred else moments.gram).double().numpy()
        weight = evidence.parameter(links.layer.weight).double().numpy()
        rows = weight.reshape(len(matrices), weight.shape[0] // len(matrices), -1)
        channel = np.where(
            (links.inputs >= group.offset) & (links.inputs < group.offset + group.size), links.inputs - group.offset, -1
        )
        parts.append((matrices, rows, np.repeat(channel, moments.kernel)))

    def error(gone):
        total = 0.0
        for matrices, rows, channel in parts:
            power = sum(np.trace(w @ c @ w.T) for c, w in zip(matrices, rows, strict=True))
            stay = ~np.isin(channel, gone)
            for c, w in zip(matrices, rows, strict=True):
                c = c + obs.RIDGE * c.diagonal().mean() * np.eye(len(c))
                fitted = np.linalg.solve(c[stay][:, stay], c[stay] @ w.T)
                total += (np.trace(w @ c @ w.T) - np.trace(fitted.T @ c[stay] @ w.T)) / power
        return total

    gone, errors = [], [0.0]
    while len(gone) < group.size:
        tried = {c: error([*gone, c]) for c in range(group.size) if c not in gone}
        best = min(tried, key=tried.get)
        gone.append(best)
        errors.append(tried[best])
    return gone, np.diff(errors)


CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)), X),
    "two consumers, one of them with inputs of other groups": (Two, X),
    "3x3 kernel": (lambda: conv(3, 1, flat=False), IMAGES),
    "grouped convolution": (lambda: conv(2, 2, flat=False), IMAGES),
    "flattened map": (lambda: conv(1, 1, flat=True), IMAGES),
}


@pytest.mark.parametrize("case", CASES)
def test_channels_go_in_the_order_of_brute_force_greedy_removal_at_the_same_costs(case):
    make, x = CASES[case]
    torch.manual_seed(1)
    evidence = evidence_of(make(), x)
    group = max(evidence.network.groups, key=lambda g: g.size)
    order, costs = brute_order(evidence, group)
    found = obs.removal_costs(evidence, group)
    assert np.argsort(found).tolist() == order
    np.testing.assert_allclose(found[order], np.maximum.accumulate(costs), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(greedy(evidence, group.name), relative(found))


def test_matrices_that_shrink_and_other_inputs_that_stay_do_not_change_the_order(monkeypatch):
    torch.manual_seed(2)
    evidence = evidence_of(Two())
    found = greedy(evidence, "a")
    for compact in (0.0, 1.0):
        monkeypatch.setattr(obs, "_COMPACT", compact)
        np.testing.assert_allclose(greedy(evidence, "a"), found, rtol=1e-9)


@pytest.mark.parametrize("pool", [1, 4])
def test_several_channels_a_step_are_all_removed_once_and_nearly_as_well(monkeypatch, pool):
    """Wide groups take four steps here instead of 24: what a width then loses is close to the exact order's error."""
    torch.manual_seed(3)
    evidence = evidence_of(nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 3)))

    def curves():
        scores = score(evidence, ["obs", "obs_greedy"])
        assert len(np.unique(scores["obs_greedy"]["0"])) == 24
        return {name: np.array(curve) for name, curve in error_tables(evidence, scores)["0"].items()}

    exact = curves()["obs_greedy"]
    monkeypatch.setattr(obs, "MAX_STEPS", 4)
    monkeypatch.setattr(obs, "_POOL", pool)
    coarse = curves()
    assert coarse["obs_greedy"][12:].mean() < (1.3 if pool == 4 else 2.0) * exact[12:].mean() + 1e-5
    assert coarse["obs_greedy"][4:].mean() < coarse["obs"][4:].mean()


@pytest.mark.parametrize("steps", [128, 3])
def test_of_two_twins_one_goes_first_for_nothing_and_the_other_one_then_counts(monkeypatch, steps):
    monkeypatch.setattr(obs, "MAX_STEPS", steps)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6))
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = model[0].weight[1], model[0].bias[1]
    evidence = evidence_of(model)
    found = greedy(evidence, "0")
    first = int(found.argmin())
    twin = {1: 4, 4: 1}[first]
    assert found[first] < 0.02
    assert found[twin] > 10 * found[first]
    scores = score(evidence, ["obs", "obs_greedy"])
    assert scores["obs"]["0"].argsort()[:2].tolist() in ([1, 4], [4, 1])  # one-shot sees no worth in either
    curves = error_tables(evidence, scores)["0"]
    assert curves["obs_greedy"][5] == pytest.approx(0.0, abs=1e-3)
    assert curves["obs_greedy"][4] < 0.9 * curves["obs"][4]


def test_channels_without_any_signal_go_first_and_equal_ones_have_an_order_all_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight[[2, 5]] = 0.0
        model[0].bias[[2, 5]] = 0.0
    found = greedy(evidence_of(model), "0")
    assert set(found.argsort()[:2]) == {2, 5}
    with torch.no_grad():
        model[2].weight.zero_()
    found = greedy(evidence_of(model), "0")
    assert len(np.unique(found)) == 6
    np.testing.assert_allclose(found, 1.0, rtol=1e-6)


def test_a_group_without_refittable_consumers_falls_back_to_l2_as_obs_does():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 1))
    scores = score(evidence_of(model, IMAGES), ["l2", "obs", "obs_greedy"])
    np.testing.assert_array_equal(scores["obs_greedy"]["0"], scores["l2"]["0"])
    np.testing.assert_array_equal(scores["obs"]["0"], scores["l2"]["0"])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.head = nn.Linear(5, 6), nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.lstm(self.embed(x))[0])


def test_recurrent_consumers_count_as_little_as_for_obs_and_hidden_units_by_the_layers_that_read_them():
    torch.manual_seed(0)
    evidence = evidence_of(Recurrent(), X.view(80, 5, 5))
    scores = score(evidence, ["l2", "obs", "obs_greedy"])
    np.testing.assert_array_equal(scores["obs"]["embed"], scores["l2"]["embed"])
    np.testing.assert_array_equal(scores["obs_greedy"]["embed"], scores["l2"]["embed"])
    (hidden,) = (group for group in evidence.network.groups if group.size == 4)
    order, _ = brute_order(evidence, hidden)
    assert np.argsort(scores["obs_greedy"][hidden.name]).tolist() == order


def test_weights_that_are_not_finite_are_refused_by_name():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    network = trace(model.eval(), X[:2])
    with pytest.raises(autoprune.PolicyError, match="'obs_greedy' gives scores that are not finite for group '0'"):
        score(Evidence(network, gather(network, [X])), ["obs_greedy"])


def test_statistics_stay_as_they_are():
    torch.manual_seed(0)
    evidence = evidence_of(conv(3, 1, flat=False), IMAGES)
    before = {name: (m.gram.clone(), m.mean.clone()) for name, m in evidence.statistics.items()}
    weight = evidence.parameter("2.weight").clone()
    score(evidence, ["obs", "obs_greedy"])
    for name, (gram, mean) in before.items():
        assert torch.equal(evidence.statistics[name].gram, gram)
        assert torch.equal(evidence.statistics[name].mean, mean)
    assert torch.equal(evidence.parameter("2.weight"), weight)


def test_pruning_by_obs_greedy_keeps_one_of_each_pair_of_channels_that_resemble_each_other():
    """One-shot obs finds both channels of a pair worth little, and loses some pairs whole."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Tanh(), nn.Conv2d(16, 6, 3)).eval()
    with torch.no_grad():
        model[0].weight[8:] = model[0].weight[:8] + 0.02 * torch.randn(8, 3, 3, 3)
        model[0].bias[8:] = model[0].bias[:8]
    network = autoprune.trace(model, IMAGES[:2])
    with torch.no_grad():
        dense = model(IMAGES)
        losses = {
            name: float((autoprune.prune(network, 0.5, criterion=name, calibration=[IMAGES])(IMAGES) - dense).norm())
            for name in ("obs", "obs_greedy", "random")
        }
    assert losses["obs_greedy"] < 0.5 * losses["obs"]
    assert losses["obs_greedy"] < 0.5 * losses["random"]
    small = autoprune.prune(network, 0.5, criterion="obs_greedy", calibration=[IMAGES])
    kept = torch.cdist(small[0].weight.flatten(1), model[0].weight.flatten(1)).argmin(1)
    assert sorted(kept.remainder(8).tolist()) == list(range(8))
