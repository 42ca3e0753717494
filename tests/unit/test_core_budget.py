"""Budgets: how a limit is read, what it means for a network, and when none can meet it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.budget import KEYS, Budget, key_of, parse_limit, resolve_budget
from autoprune.cost import MACS, PARAMS, SIZE, CostModel, Form, Term
from autoprune.errors import BudgetError
from autoprune.policy import Group

W = Form(terms=((0, 1),))
NET = CostModel(
    ("g",),
    (100,),
    macs=(Term(10, (W,)),),
    params=(Term(1, (W,)),),
    size_bytes=(Term(4, (W,)),),
    live=((Term(1, (W,)),),),
)
GROUPS = [Group("g", 100, tuple(range(10, 101)))]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, (0.5, True)),
        (1, (1, True)),
        (1.0, (1.0, True)),
        (2, (2, False)),
        ("0.5", (0.5, True)),
        ("50%", (0.5, True)),
        (" 12.5 % ", (0.125, True)),
        ("30M", (30e6, False)),
        ("30m", (30e6, False)),
        ("1.2 MB", (1.2e6, False)),
        ("512 KiB", (512 * 1024, False)),
        ("1e6", (1e6, False)),
        ("0.5k", (500, False)),
        ("1B", (1, False)),
    ],
)
def test_a_limit_is_a_fraction_up_to_one_and_absolute_above_or_with_a_unit(
    value: float | str, expected: tuple[float, bool]
) -> None:
    assert parse_limit(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        "0",
        "-5",
        "",
        "M",
        "lots",
        "5 X",
        "5M%",
        "120%",
        "1,5",
        True,
        None,
        [],
        float("nan"),
        float("inf"),
        "1e999",
    ],
)
def test_what_is_no_positive_finite_limit_is_refused(value: object) -> None:
    with pytest.raises(BudgetError):
        parse_limit(value)  # type: ignore[arg-type]


@given(st.floats(1e-6, 1.0))
def test_a_fraction_reads_the_same_as_number_and_as_text(value: float) -> None:
    assert parse_limit(value) == parse_limit(repr(value)) == (value, True)


@given(st.integers(2, 10**12))
def test_a_count_reads_the_same_as_number_and_as_text(value: int) -> None:
    assert parse_limit(value) == parse_limit(str(value)) == (value, False)


def test_limits_become_absolute_and_the_first_is_the_axis_of_the_front() -> None:
    budget = resolve_budget({"params": 0.5, "macs": "700", "size": 1.0}, NET, GROUPS)
    assert dict(budget.limits) == {PARAMS: 50, MACS: 700, SIZE: 400}
    assert budget.primary == PARAMS
    assert budget.span == (0.1, 0.5)


def test_the_front_is_cut_to_what_is_possible_and_allowed() -> None:
    assert resolve_budget({"macs": 0.6}, NET, GROUPS, front=(0.05, 0.9)).span == (0.1, 0.6)
    assert resolve_budget({}, NET, GROUPS).span == (0.1, 1.0)


def test_a_violation_is_the_largest_relative_excess_and_zero_is_feasible() -> None:
    budget = resolve_budget({"macs": 0.5, "params": 0.8}, NET, GROUPS)
    assert budget.violation({MACS: 500, PARAMS: 10}) == 0.0
    assert budget.within({MACS: 500, PARAMS: 80})
    assert budget.violation({MACS: 750, PARAMS: 10}) == pytest.approx(0.5)
    assert not budget.within({MACS: 501, PARAMS: 10})
    assert Budget({}, MACS, (0.1, 1.0)).violation({MACS: 10**9}) == -1.0


def test_a_budget_that_no_policy_meets_says_the_least_possible() -> None:
    with pytest.raises(BudgetError, match=r"macs: 0\.05: the least possible is 100 \(0\.100 of the dense 1,000\)"):
        resolve_budget({"macs": 0.05}, NET, GROUPS)


def test_a_front_that_no_policy_lies_on_is_refused() -> None:
    with pytest.raises(BudgetError, match="no policy lies on the front"):
        resolve_budget({}, NET, GROUPS, front=(0.01, 0.05))
    with pytest.raises(BudgetError, match="must rise"):
        resolve_budget({}, NET, GROUPS, front=(0.5, 0.2))


def test_points_make_the_span_and_stand_once_each_from_the_highest_down() -> None:
    budget = resolve_budget({"macs": 0.6}, NET, GROUPS, points=(0.2, 0.6, 0.4, 0.2))
    assert budget.points == (0.6, 0.4, 0.2)
    assert budget.span == (0.2, 0.6)
    assert [budget.target(share) for share in (0.0, 0.3, 0.34, 0.66, 0.7, 1.0)] == [0.2, 0.2, 0.4, 0.4, 0.6, 0.6]
    assert [budget.nearest(target) for target in (0.01, 0.28, 0.29, 0.9)] == [0.2, 0.2, 0.4, 0.6]


def test_a_point_may_be_the_limit_itself_which_is_rounded_down() -> None:
    budget = resolve_budget({"macs": 1 / 3}, NET, GROUPS, points=(1 / 3, 0.2))
    assert budget.limits[MACS] == 333
    assert budget.points == (1 / 3, 0.2)


def test_without_points_a_target_is_anywhere_on_the_span() -> None:
    budget = resolve_budget({}, NET, GROUPS, front=(0.2, 0.8))
    assert [budget.target(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([0.2, 0.4, 0.8])
    assert budget.nearest(0.37) == 0.37


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ((0.7,), r"0\.7 exceeds the budget, 0\.600 of the dense macs"),
        ((0.05,), r"no policy meets the point 0\.05: the least possible macs is 0\.100"),
        ((0.0,), r"in \(0, 1\], got 0"),
    ],
)
def test_a_point_that_no_policy_may_have_is_refused(points: tuple[float, ...], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        resolve_budget({"macs": 0.6}, NET, GROUPS, points=points)


def test_an_unknown_cost_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(BudgetError, match="unknown budget 'parms'; did you mean 'params'"):
        resolve_budget({"parms": 0.5}, NET, GROUPS)
    assert [key_of(KEYS[key]) for key in KEYS] == [key.removesuffix("_ms") for key in KEYS]
