"""Explanations against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.cost import MACS, MEMORY, CostModel, Form, Term
from autoprune.errors import PolicyError
from autoprune.policy import Choice, Group, Policy
from autoprune.prices import BALANCED, CHEAP, DEAR, FIXED, FREE, ErrorCurve, explain, going_price

A, B = Form(terms=((0, 1),)), Form(terms=((1, 1),))
# 100 MACs a channel of `a`, 100 a channel of `b`: 2,000 dense, so that 20 MACs are a percent.
MODEL = CostModel(("a", "b"), (10, 10), (Term(100, (A,)), Term(100, (B,))), (), (), ((Term(8, (A,)), Term(8, (B,))),))
GROUPS = (Group("a", 10, tuple(range(1, 11))), Group("b", 10, tuple(range(1, 11))))


def line(slope: float) -> ErrorCurve:
    """An error that falls by `slope` with every channel, to nothing at ten."""
    widths = tuple(range(1, 11))
    return ErrorCurve(widths, tuple(slope * (10 - w) for w in widths))


def policy(a: int, b: int) -> Policy:
    return Policy({"a": Choice("l2", 1 - a / 10), "b": Choice("l2", 1 - b / 10)})


def explained(a: int, b: int, curve_a: ErrorCurve, curve_b: ErrorCurve, **changes: Any) -> Any:
    curves = {"a": {"l2": curve_a}, "b": {"l2": curve_b}}
    settings: dict[str, Any] = {"groups": GROUPS, "model": MODEL, "curves": curves, "cost": MACS, **changes}
    return explain(policy(a, b), **settings)


def test_prices_shares_and_the_uniform_policy_equal_the_hand_computed_numbers() -> None:
    why = explained(8, 4, line(0.5), line(0.1))
    a, b = why.groups
    assert (why.dense, why.total) == (2000, 1200)
    assert why.error == pytest.approx(0.5 * 2 + 0.1 * 6)
    assert (a.error, b.error) == (pytest.approx(1.0), pytest.approx(0.6))
    assert (a.share, b.share) == (pytest.approx(8 / 12), pytest.approx(4 / 12))
    # One channel is 100 MACs, five percent of dense.
    assert (a.down.width, a.down.cost, a.down.error) == (7, -100, pytest.approx(0.5))
    assert (a.down.price, a.up.price) == (pytest.approx(0.1), pytest.approx(0.1))
    assert (b.down.price, b.up.price) == (pytest.approx(0.02), pytest.approx(0.02))
    assert (a.uniform, b.uniform, why.uniform_total) == (6, 6, 1200)
    assert why.uniform_error == pytest.approx(0.5 * 4 + 0.1 * 4)


def test_weights_scale_prices_and_totals_and_leave_the_errors_of_the_tables() -> None:
    why = explained(8, 4, line(0.5), line(0.1), weights={"b": 5.0})
    a, b = why.groups
    assert (a.weight, b.weight) == (1.0, 5.0)
    assert b.error == pytest.approx(0.6)
    assert b.down.price == pytest.approx(a.down.price) == pytest.approx(0.1)
    assert why.error == pytest.approx(1.0 + 5 * 0.6)
    assert why.uniform_error == pytest.approx(0.5 * 4 + 5 * 0.1 * 4)


def test_a_group_that_is_dear_to_narrow_should_be_wider_and_a_cheap_one_narrower() -> None:
    why = explained(5, 5, line(0.5), line(0.1))
    assert [row.verdict for row in why.groups] == [DEAR, CHEAP]
    assert 0.02 < why.price < 0.1


def test_a_policy_that_no_exchange_improves_is_balanced() -> None:
    bent = ErrorCurve((1, 5, 10), (9.0, 1.0, 0.0))  # steep below five, flat above
    why = explained(5, 5, bent, bent)
    assert [row.verdict for row in why.groups] == [BALANCED, BALANCED]
    row = why.groups[0]
    assert row.up.price <= why.price <= row.down.price


def test_the_ends_of_the_grid_have_one_step() -> None:
    why = explained(10, 1, line(0.1), line(0.1))
    assert why.groups[0].up is None
    assert why.groups[1].down is None


def test_a_group_of_one_width_is_fixed_and_one_without_cost_is_free() -> None:
    fixed = (Group("a", 10, (8,)), GROUPS[1])
    assert explained(8, 4, line(0.5), line(0.1), groups=fixed).groups[0].verdict == FIXED
    free = CostModel(("a", "b"), (10, 10), (Term(100, (B,)),), (), ())
    row = explained(8, 4, line(0.5), line(0.1), model=free).groups[0]
    assert (row.verdict, row.down.price, row.share) == (FREE, None, 0.0)


def test_memory_is_explained_without_shares() -> None:
    why = explained(8, 4, line(0.5), line(0.1), cost=MEMORY)
    assert why.total == 96
    assert [row.share for row in why.groups] == [None, None]


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no error curve of the group 'b' by the criterion 'l2'"):
        explained(8, 4, line(0.5), line(0.1), curves={"a": {"l2": line(0.5)}, "b": {"obs": line(0.5)}})
    with pytest.raises(PolicyError, match="says nothing about b"):
        explain(Policy({"a": Choice("l2", 0.5)}), GROUPS, MODEL, {"a": {"l2": line(1)}}, cost=MACS)


@pytest.mark.parametrize(
    ("widths", "errors", "said"),
    [
        ((), (), "0 widths"),
        ((1, 2), (0.5,), "2 widths and 1 errors"),
        ((2, 1), (0.5, 0.6), "must ascend"),
        ((1, 2), (math.nan, 0.0), "not finite"),
    ],
)
def test_a_malformed_curve_is_refused(widths: tuple[int, ...], errors: tuple[float, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ErrorCurve(widths, errors)


def test_a_curve_is_straight_between_its_widths_and_flat_beyond_them() -> None:
    curve = ErrorCurve((2, 4, 8), (1.0, 0.5, 0.1))
    assert [curve.at(w) for w in (0, 2, 3, 4, 6, 8, 20)] == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.3, 0.1, 0.1])


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=1, max_size=12))
def test_the_going_price_displeases_the_groups_least(pairs: list[tuple[float, float]]) -> None:
    ups, downs = [up for up, _ in pairs], [down for _, down in pairs]

    def displeased(price: float) -> float:
        x = math.log(price)
        return sum(max(0.0, math.log(u) - x) for u in ups) + sum(max(0.0, x - math.log(d)) for d in downs)

    price = going_price(ups, downs)
    assert price is not None
    least = min(displeased(candidate) for candidate in (*ups, *downs))
    assert displeased(price) <= least + 1e-9


def test_without_any_price_there_is_no_going_price() -> None:
    assert going_price([], []) is None
    assert going_price([], [0.5, 2.0]) == pytest.approx(0.5)
    assert going_price([0.5, 2.0], []) == pytest.approx(2.0)
