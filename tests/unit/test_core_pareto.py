"""Fronts: hypervolume against a second implementation, domination, and a spread selection."""

from __future__ import annotations

import math

import moocore
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.pareto import (
    cost_levels,
    dominates,
    front_indices,
    hypervolume,
    knee_index,
    ranks,
    select_spread,
    spread_order,
)

# A coarse grid makes ties and duplicates, which is where such code goes wrong.
values = st.integers(0, 24).map(lambda i: i / 16)
points = st.tuples(values, values)
clouds = st.lists(points, max_size=40)
REFERENCE = (1.0, 1.0)


@given(st.lists(points, min_size=1, max_size=40))
def test_the_hypervolume_equals_moocores(cloud: list[tuple[float, float]]) -> None:
    expected = moocore.hypervolume(np.array(cloud), ref=np.array(REFERENCE))
    assert hypervolume(cloud, REFERENCE) == pytest.approx(float(expected), abs=1e-12)


@given(clouds, points)
def test_a_new_point_never_lowers_the_hypervolume(cloud: list[tuple[float, float]], new: tuple[float, float]) -> None:
    assert hypervolume([*cloud, new], REFERENCE) >= hypervolume(cloud, REFERENCE) - 1e-12


@given(clouds)
def test_no_front_member_dominates_another_and_every_other_point_is_covered(cloud: list[tuple[float, float]]) -> None:
    front = [cloud[i] for i in front_indices(cloud)]
    assert not any(dominates(a, b) for a in front for b in front)
    assert all(p in front or any(dominates(a, p) for a in front) for p in cloud)
    assert front == sorted(front, key=lambda p: p[1])
    assert len(set(front)) == len(front)


@given(clouds)
def test_ranks_peel_fronts_off_one_by_one(cloud: list[tuple[float, float]]) -> None:
    depth = ranks(cloud)
    for a, rank_a in zip(cloud, depth, strict=True):
        above = [r for b, r in zip(cloud, depth, strict=True) if dominates(b, a)]
        assert rank_a == (max(above) + 1 if above else 0)


@given(clouds, st.integers(0, 12))
def test_a_spread_selection_has_the_asked_size_and_no_point_twice(cloud: list[tuple[float, float]], count: int) -> None:
    chosen = select_spread(cloud, count)
    assert len(chosen) == len(set(chosen)) == min(count, len(cloud))
    assert [cloud[i][1] for i in chosen] == sorted(cloud[i][1] for i in chosen)


@given(clouds)
def test_the_knee_lies_on_the_front(cloud: list[tuple[float, float]]) -> None:
    knee = knee_index(cloud)
    assert knee in front_indices(cloud) if cloud else knee is None


def test_points_that_are_not_finite_count_for_nothing() -> None:
    cloud = [(math.nan, 0.1), (0.1, math.inf), (-math.inf, 0.2), (0.5, 0.5)]
    assert front_indices(cloud) == [3]
    assert hypervolume(cloud, REFERENCE) == 0.25
    assert ranks(cloud) == [1, 1, 1, 0]
    assert select_spread(cloud, 4) == [3]
    assert knee_index(cloud) == 3


def test_a_crowded_stretch_does_not_crowd_out_an_end() -> None:
    crowded = [(0.10 - i * 1e-4, 0.9 + i * 1e-3) for i in range(50)]
    chosen = select_spread([*crowded, (0.5, 0.2)], 4)
    assert 50 in chosen


def test_a_far_worse_point_that_is_a_thousandth_cheaper_is_no_alternative() -> None:
    near_half = [(0.30, 0.4990), (0.14, 0.4995), (0.13, 0.5), (0.15, 0.4992)]
    assert select_spread([*near_half, (0.1, 0.7), (0.11, 0.7)], 4) == [1, 2, 4, 5]


def test_costs_within_two_percent_are_one_level_which_does_not_chain() -> None:
    assert cost_levels([1.0, 1.03, 1.01, 1.02, 2.0]) == [1.0, 1.03, 1.0, 1.0, 2.0]
    assert cost_levels([0.0, 0.0, -1.0]) == [0.0, 0.0, -1.0]
    assert cost_levels([]) == []


def test_the_knee_of_an_elbow_is_its_corner() -> None:
    assert knee_index([(0.9, 0.1), (0.2, 0.2), (0.15, 0.9)]) == 1


def test_any_beginning_of_the_spread_order_is_well_spread():
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert spread_order(values) == [2, 0, 4, 1, 3]
    assert spread_order([]) == []
    assert sorted(spread_order([-1.0, 0.0, 3.0])) == [0, 1, 2]
