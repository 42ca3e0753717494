"""What the benchmark's table is computed from: hypervolumes in the range asked for, means, times."""

import importlib.util
import math
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "benchmarks" / "bench" / "render.py"


@pytest.fixture
def render(monkeypatch):
    monkeypatch.syspath_prepend(SOURCE.parent)  # where `common` lies
    spec = importlib.util.spec_from_file_location("bench_render", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(*picks):
    """A pick: its budget, its MACs, its accuracy. The dense network has 0.9."""
    found = {str(budget): {"macs": macs, "before": accuracy} for budget, macs, accuracy in picks}
    return {**found, "dense": {"macs": 1.0, "before": 0.9}}


def test_nothing_is_gained_below_the_least_budget(render):
    at, below = rows((0.35, 0.35, 0.8)), rows((0.35, 0.25, 0.8))
    assert render.volume(at, "before") == pytest.approx(0.3 * 0.65)
    assert render.volume(below, "before") == pytest.approx(0.3 * 0.65)
    assert render.volume(below, "before", 0.0) == pytest.approx(0.3 * 0.75)


def test_what_a_pick_leaves_of_a_greater_budget_counts_but_not_at_the_budgets(render):
    whole, part = rows((0.5, 0.5, 0.8)), rows((0.5, 0.4, 0.8))
    assert render.volume(part, "before") == pytest.approx(0.3 * 0.6)
    assert render.within_budgets(part, "before") == render.volume(whole, "before") == pytest.approx(0.3 * 0.5)


def test_a_pick_that_was_not_scored_counts_nowhere(render):
    picks = rows((0.5, 0.5, 0.8))
    assert render.volume(picks, "after") == render.within_budgets(picks, "after") == 0.0


def test_the_mean_follows_straight_lines_up_to_the_dense_network(render):
    picks = rows((0.35, 0.3, 0.7), (0.5, 0.5, 0.8))
    # 0.725 at 0.35, 0.8 at 0.50, 0.84 at 0.70
    assert render.mean_accuracy(picks, "before") == pytest.approx((0.15 * 0.7625 + 0.2 * 0.82) / 0.35, abs=1e-4)
    assert math.isnan(render.mean_accuracy(rows((0.5, 0.5, 0.8)), "before"))


def test_the_time_to_a_hypervolume_is_that_of_the_candidate_that_reaches_it(render):
    def candidate(seconds, macs, accuracy):
        return {"seconds": seconds, "macs": macs, "val_accuracy": accuracy}

    document = {"candidates": [candidate(9.0, 0.35, 0.8), candidate(2.0, 0.5, 0.7), candidate(1.0, math.nan, 0.9)]}
    assert render.time_to([document], 0.09) == 2.0
    assert render.time_to([document], 0.15) == 9.0
    assert render.time_to([document], 0.2) is None
