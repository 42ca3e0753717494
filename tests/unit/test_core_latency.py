"""Surfaces of a latency table, and limits on latency."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.budget import key_of, read_limit, resolve_budget
from autoprune.cost import COSTS, LATENCY, CostModel, Form, Surface, Term
from autoprune.errors import BudgetError
from autoprune.policy import Group, feasible_widths
from autoprune.results import not_faster

A, B = Form(terms=((0, 1),)), Form(1, ((1, 2),))
PLANE = Surface((A, B), ((2, 8, 16), (3, 65)), (100, 300, 200, 700, 400, 1500))
NET = CostModel(
    groups=("a", "b"),
    sizes=(16, 32),
    macs=(Term(9, (A, B)),),
    params=(Term(1, (A,)),),
    size_bytes=(Term(4, (A,)),),
    latency=(PLANE, Surface((A,), ((4, 16),), (10, 22)), Surface((), (), (1000,))),
)
GROUPS = [Group("a", 16, feasible_widths(16)), Group("b", 32, feasible_widths(32))]


def test_a_surface_holds_its_knots_and_is_bilinear_between_them() -> None:
    assert [PLANE.at((a, 1)) for a in (2, 8, 16)] == [100, 200, 400]
    assert [PLANE.at((a, 32)) for a in (2, 8, 16)] == [300, 700, 1500]
    assert PLANE.at((5, 1)) == 150
    assert PLANE.at((12, 1)) == 300
    halfway = 1 + 2 * 16  # of the axis from 3 to 65: 30 / 62
    assert PLANE.at((8, 16)) == int(200 + (halfway - 3) / 62 * 500)
    assert PLANE.at((12, 16)) == int(300 + (halfway - 3) / 62 * 800)


def test_beyond_its_knots_a_surface_stays_at_the_nearest() -> None:
    assert PLANE.at((1, 0)) == 100
    assert PLANE.at((99, 99)) == 1500
    cube = Surface((A, B, A), ((1, 3), (1, 5), (1, 3)), tuple(range(8)))
    assert cube.at((2, 1)) == int((0 + 1 + 4 + 5) / 4 + 2 * 0.5)
    assert cube.at((9, 9)) == 7


@pytest.mark.parametrize(
    ("forms", "knots", "values"),
    [((A,), ((2, 2),), (1, 1)), ((A,), ((1, 2),), (1,)), ((A,), ((),), ()), ((A, B), ((1, 2),), (1, 2))],
)
def test_a_surface_that_does_not_fit_its_axes_is_refused(forms, knots, values) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"knots must rise|values for"):
        Surface(forms, knots, values)


def test_latency_is_a_cost_where_there_is_a_table_and_none_elsewhere() -> None:
    assert NET.dense()[LATENCY] == 1500 + 22 + 1000
    assert NET.cost(LATENCY, {"a": 2, "b": 1}) == 100 + 10 + 1000
    assert tuple(NET.dense()) == (*COSTS, LATENCY)
    assert tuple(replace(NET, latency=()).dense()) == COSTS


@given(st.integers(1, 16), st.integers(1, 32), st.integers(0, 16), st.integers(0, 32))
def test_a_wider_network_is_never_predicted_faster_and_shares_hold_every_change(
    a: int, b: int, more_a: int, more_b: int
) -> None:
    wide = {"a": min(16, a + more_a), "b": min(32, b + more_b)}
    assert NET.cost(LATENCY, {"a": a, "b": b}) <= NET.cost(LATENCY, wide)
    moved = {"a": wide["a"], "b": b}
    share = NET.share(LATENCY, "a")
    change = NET.cost(LATENCY, moved) - NET.cost(LATENCY, {"a": a, "b": b})
    assert change == share.cost(LATENCY, moved) - share.cost(LATENCY, {"a": a, "b": b})


def test_limits_on_latency_are_fractions_or_times() -> None:
    assert read_limit("latency", 0.5) == (0.5, True)
    assert read_limit("latency", "50%") == (0.5, True)
    assert read_limit("latency", "4 ms") == (4e6, False)
    assert read_limit("latency", "800us") == (8e5, False)
    assert read_limit("latency_ms", 0.25) == (2.5e5, False)
    assert read_limit("macs", "30M") == (3e7, False)


@pytest.mark.parametrize(
    ("key", "value"),
    [("latency", 4), ("latency", "4"), ("latency", "4 MB"), ("latency", "0 ms"), ("latency_ms", "4 ms")]
    + [("latency_ms", value) for value in (0, -1.0, float("nan"), float("inf"), True)],
)
def test_a_latency_without_a_unit_or_that_is_not_positive_is_refused(key: str, value: float | str) -> None:
    with pytest.raises(BudgetError, match=r"latency|positive"):
        read_limit(key, value)


def test_a_latency_budget_is_resolved_in_nanoseconds_and_may_be_the_fronts_axis() -> None:
    budget = resolve_budget({"latency_ms": 0.002}, NET, GROUPS)
    assert budget.limits == {LATENCY: 2000}
    assert budget.primary == LATENCY
    assert budget.span[1] == 2000 / 2522
    assert key_of(LATENCY) == "latency"
    assert resolve_budget({"macs": 0.5, "latency": 0.8}, NET, GROUPS).limits[LATENCY] == int(0.8 * 2522)


def test_a_latency_budget_that_nothing_meets_or_without_a_table_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"no policy meets the budget latency: 1 us: the least possible is 0.001 ms"):
        resolve_budget({"latency": "1 us"}, NET, GROUPS)
    with pytest.raises(BudgetError, match="needs a latency table"):
        resolve_budget({"latency": 0.5}, replace(NET, latency=()), GROUPS)
    with pytest.raises(BudgetError, match="the same limit; give one"):
        resolve_budget({"latency": 0.9, "latency_ms": 1.0}, NET, GROUPS)


def test_a_network_is_called_no_faster_where_its_macs_fell_and_its_latency_did_not() -> None:
    def slow(ms: float, spread: float = 0.1, macs: int = 5, **more: float) -> bool:
        metrics = {"latency_ms": ms, "latency_spread_ms": spread, **more}
        dense = {"latency_ms": 2.0, "latency_spread_ms": 0.1, "latency_least_ms": 1.9}
        return not_faster({"macs": macs}, metrics, dense_costs={"macs": 10}, dense_metrics=dense)

    assert slow(2.0)
    assert slow(1.95)
    assert not slow(1.5)
    assert slow(1.5, spread=1.0, latency_least_ms=1.9)
    assert not slow(1.5, spread=1.0, latency_least_ms=1.2)  # disturbed, yet its fastest pass is faster
    assert not slow(3.0, macs=10)
    assert not not_faster({"macs": 5}, {}, dense_costs={"macs": 10}, dense_metrics={"latency_ms": 1.0})
