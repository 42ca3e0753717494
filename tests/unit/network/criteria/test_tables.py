"""Error tables against brute-force refits at every width."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.network.calibration.moments import gather
from autoprune.network.criteria import inverses
from autoprune.network.criteria.channels import CRITERIA, choose, score
from autoprune.network.criteria.inputs import Evidence
from autoprune.network.criteria.inverses import Inverses
from autoprune.network.criteria.tables import error_tables
from autoprune.network.graph.groups import positions_in
from autoprune.network.repair.compensation import entries_of, layer_moments, regular_factor
from autoprune.network.tracing.trace import trace

X = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))


def evidence_of(model, x=X):
    network = trace(model.eval(), x[:2])
    return Evidence(network, gather(network, [x]))


def lost(x, y, groups=1):
    """The relative error of the best refit with intercept, y centred."""
    design = np.hstack([x, np.ones((len(x), 1))])
    rest = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return float(np.square(rest).sum() / np.square(y - y.mean(0)).sum())


@pytest.mark.parametrize("criterion", ["l2", "obs", "obs_greedy", "random"])
def test_a_table_holds_the_error_of_the_best_refit_at_every_width(criterion):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    evidence = evidence_of(model)
    scores = score(evidence, [criterion])
    curve = error_tables(evidence, scores)["0"][criterion]
    with torch.no_grad():
        hidden, wanted = model[:2](X).double().numpy(), model(X).double().numpy()
    for width in range(1, 8):
        expected = lost(hidden[:, choose(scores[criterion]["0"], width)], wanted)
        assert curve[width] == pytest.approx(expected, rel=0.03, abs=3e-4), width
    assert curve[0] == pytest.approx(1.0)


def test_a_flattened_channel_goes_with_all_of_its_pixels():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(400, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    evidence = evidence_of(model, x)
    scores = score(evidence, ["l2"])
    curve = error_tables(evidence, scores)["0"]["l2"]
    with torch.no_grad():
        hidden, wanted = model[:2](x).double().flatten(2).numpy(), model(x).double().numpy()
    for width in range(1, 5):
        kept = hidden[:, choose(scores["l2"]["0"], width)].reshape(400, -1)
        assert curve[width] == pytest.approx(lost(kept, wanted), rel=0.03, abs=3e-4)


def test_other_inputs_of_a_consumer_help_to_make_up_for_what_goes():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(5, 3), nn.Linear(7, 2)

        def forward(self, x):
            return self.c(torch.tanh(torch.cat([self.a(x), self.b(x)], 1)))

    torch.manual_seed(2)
    model = Joined()
    evidence = evidence_of(model)
    scores = score(evidence, ["l2"])
    curve = error_tables(evidence, scores)["b"]["l2"]
    with torch.no_grad():
        a, b = torch.tanh(model.a(X)).double().numpy(), torch.tanh(model.b(X)).double().numpy()
        wanted = model(X).double().numpy()
    for width in range(0, 4):
        kept = np.hstack([a, b[:, choose(scores["l2"]["b"], width)]])
        assert curve[width] == pytest.approx(lost(kept, wanted), rel=0.03, abs=3e-4)


def test_tables_fall_with_width_end_at_zero_and_have_an_entry_for_each_width():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(6 * 16, 3),
    )  # fmt: skip
    evidence = evidence_of(model, torch.randn(32, 3, 4, 4))
    names = [name for name in CRITERIA if name not in ("taylor", "hessian")]
    tables = error_tables(evidence, score(evidence, names))
    assert set(tables) == {g.name for g in evidence.network.groups}
    for group in evidence.network.groups:
        assert set(tables[group.name]) == set(names)
        for curve in tables[group.name].values():
            assert len(curve) == group.size + 1
            assert all(a >= b for a, b in pairwise(curve))
            assert curve[-1] == 0.0


def test_a_group_without_refittable_consumers_uses_the_share_of_its_scores():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 1))
    evidence = evidence_of(model, torch.randn(8, 3, 4, 4))
    scores = {"l2": {"0": np.array([1.0, 2.0, 0.0, 3.0])}}
    np.testing.assert_allclose(error_tables(evidence, scores)["0"]["l2"], [1.0, 5 / 14, 1 / 14, 0.0, 0.0])


class Dense(nn.Module):
    """Concatenations as in DenseNet: the last layer reads three groups, the one before it two."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.c, self.d = nn.Conv2d(10, 4, 1), nn.Conv2d(14, 5, 3)

    def forward(self, x):
        first = torch.tanh(self.a(x))
        second = torch.cat([first, torch.tanh(self.b(first))], 1)
        return self.d(torch.cat([second, torch.tanh(self.c(second))], 1))


def straight(evidence, group, scores):
    """The curve by one factorisation a consumer, of all its inputs: first those of other groups, then by rank."""
    order = np.argsort(-scores, kind="stable")
    rank = np.argsort(order)
    total = np.zeros(group.size + 1)
    for links in evidence.consumers(group):
        moments = evidence.statistics[links.site]
        position = positions_in(links.inputs, group)
        own, others = np.flatnonzero(position >= 0), np.flatnonzero(position < 0)
        own = own[np.argsort(rank[position[own]], kind="stable")]
        permutation = entries_of(np.concatenate([others, own]), moments.kernel)
        matrix = layer_moments(moments, links).double()[:, permutation][:, :, permutation]
        weight = evidence.parameter(links.layer.weight).double().reshape(len(matrix), -1, matrix.shape[1])
        columns = (weight[:, :, permutation] @ regular_factor(matrix, 1e-4)).square().sum((0, 1)).numpy()
        lost = np.zeros(group.size)
        np.add.at(lost, rank[position[own]], columns[len(others) * moments.kernel :].reshape(len(own), -1).sum(1))
        total += np.append(np.cumsum(lost[::-1])[::-1], 0.0) / columns.sum()
    return np.minimum.accumulate(total)


IMAGES = torch.randn(60, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def twins():
    """Sixteen channels that are four, and two that are constant zero."""
    model = nn.Sequential(nn.Conv2d(3, 18, 3), nn.ReLU(), nn.Conv2d(18, 7, 3, bias=False))
    with torch.no_grad():
        for of in (model[0].weight, model[0].bias):
            for first in (4, 8, 12):
                of[first : first + 4] = of[:4]
        model[0].weight[16:], model[0].bias[16:] = 0.0, -1.0
    return model


CASES = {
    "concatenations": (Dense, IMAGES),
    "fewer patches than entries": (Dense, IMAGES[:2]),
    "channels that follow from others": (twins, IMAGES),
    "grouped convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 6, 2, groups=2)),
        IMAGES,
    ),
    "flattened map": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)),
        IMAGES,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_shared_factorisations_give_what_one_for_each_ranking_gives(case):
    make, x = CASES[case]
    torch.manual_seed(3)
    evidence = evidence_of(make(), x)
    scores = score(evidence, ["l1", "l2", "obs", "obs_greedy", "activation", "random"])
    tables = error_tables(evidence, scores)
    for group in evidence.network.groups:
        for name, by_group in scores.items():
            expected = straight(evidence, group, by_group[group.name])
            np.testing.assert_allclose(tables[group.name][name], expected, rtol=1e-5, atol=1e-9)


def test_each_consumer_is_inverted_once_for_each_ridge_whoever_asks(monkeypatch):
    """obs and obs_greedy share one inverse; the groups of a concatenation share another one for their tables."""
    made = []
    one = inverses._inverted
    monkeypatch.setattr(inverses, "_inverted", lambda links, *a: made.append((links.site, a[-1])) or one(links, *a))
    torch.manual_seed(3)
    evidence = evidence_of(Dense(), IMAGES)
    scores = score(evidence, ["l1", "obs", "obs_greedy"])
    assert sorted(made) == [("b", 1e-3), ("c", 1e-3), ("d", 1e-3)]
    made.clear()
    error_tables(evidence, scores)
    assert sorted(made) == [("c", 1e-4), ("d", 1e-4)]


def test_inverses_beyond_the_bound_are_forgotten_and_made_anew_the_same(monkeypatch):
    torch.manual_seed(3)
    evidence = evidence_of(Dense(), IMAGES)
    scores = score(evidence, ["obs", "obs_greedy"])
    tables = error_tables(evidence, scores)
    monkeypatch.setattr(inverses, "KEPT_BYTES", 8 * 126**2 + 1)  # no more than the widest one
    few = Inverses()
    small = Evidence(evidence.network, evidence.statistics, inverses=few)
    again = score(small, ["obs", "obs_greedy"])
    assert all(np.array_equal(again[name][g], scores[name][g]) for name in scores for g in scores[name])
    assert error_tables(small, again) == tables
    assert sum(kept.matrix.nbytes for kept in few._kept.values()) <= 8 * 126**2 + 1
