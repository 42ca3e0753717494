"""Error tables against brute-force refits at every width."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.network.calibration import gather
from autoprune.network.criteria import CRITERIA, Evidence, choose, score
from autoprune.network.tables import error_tables
from autoprune.network.trace import trace

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
