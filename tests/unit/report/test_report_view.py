"""Front, knee and hypervolume of a view, and its tables."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from autoprune.policy import Choice, Policy
from autoprune.report import (
    FrontPoint,
    LayerRow,
    SearchView,
    controls_table,
    front_json,
    front_table,
    group_table,
    layer_table,
    point_of,
)
from autoprune.report.view import criterion_text
from autoprune.results import Fidelity, TrialResult


def test_the_front_holds_what_no_trial_dominates_by_rising_cost(view: SearchView) -> None:
    assert [p.trial for p in view.front] == [0, 1, 3]
    assert view.knee is not None
    assert view.knee.trial == 1


def test_a_front_of_two_points_has_no_knee(view: SearchView) -> None:
    assert replace(view, trials=view.trials[:2]).knee is None


def test_the_hypervolume_is_the_area_below_the_reference_point(view: SearchView) -> None:
    one = replace(view, trials=view.trials[1:2], reference=(1.0, 0.8))
    assert one.hypervolume == pytest.approx(0.93 * 0.3)
    assert one.controls_hypervolume == pytest.approx(0.85 * 0.3 + 0.5 * 0.3)


def test_the_gain_compares_a_control_with_the_best_point_that_costs_no_more(view: SearchView) -> None:
    uniform, tiny = view.controls
    assert view.gain(uniform) == pytest.approx(0.08)
    assert view.gain(tiny) is None


def test_a_point_that_costs_a_little_more_than_a_control_is_compared_with_it(view: SearchView) -> None:
    """Both were moved onto the same budget: the one or the other is a channel below it."""
    *_, lower, point = view.front
    for share, best in ((0.999, point), (0.985, point), (0.975, lower)):
        costs = {name: round(share * cost) for name, cost in point.costs.items()}
        assert view.gain(replace(point, costs=costs, val_accuracy=0.0)) == pytest.approx(best.val_accuracy)


def test_a_point_that_lacks_a_cost_is_refused() -> None:
    with pytest.raises(ValueError, match="size_bytes"):
        FrontPoint(1, 0.9, {"macs": 1, "params": 1})


def test_a_view_needs_a_known_primary_cost_that_is_not_zero(view: SearchView) -> None:
    with pytest.raises(ValueError, match="flops"):
        replace(view, primary="flops")
    with pytest.raises(ValueError, match="is 0"):
        replace(view, dense=replace(view.dense, costs={**view.dense.costs, "macs": 0}))


def test_a_result_becomes_a_point() -> None:
    policy = Policy({"a": Choice("l2", 0.5), "b": Choice("obs", 0.5), "c": Choice("obs", 0.5)})
    costs = {"macs": 1, "params": 2, "size_bytes": 3, "activation_bytes": 4}
    metrics = {"val_accuracy": 0.9, "test_accuracy": 0.8, "latency_ms": 1.5}
    result = TrialResult(policy, "i", Fidelity("final", 8, test=True), {"a": 1}, costs, metrics)
    made = point_of(result, trial=7, origin="additive")
    assert (made.trial, made.val_accuracy, made.test_accuracy) == (7, 0.9, 0.8)
    assert made.criterion == "obs 2, l2 1"
    assert made.metrics["latency_ms"] == 1.5


def test_one_criterion_everywhere_is_named_once() -> None:
    assert criterion_text(Policy({"a": Choice("l2", 0.1), "b": Choice("l2", 0.2)})) == "l2"


def test_the_front_table_says_what_each_point_saves(view: SearchView) -> None:
    table = front_table(view)
    assert list(table["trial"]) == [0, 1, 3]
    assert list(table["macs_saved"]) == [750_000, 500_000, 250_000]
    assert list(table["macs_fraction"]) == [0.25, 0.5, 0.75]
    assert list(table["size_bytes_saved"]) == [120_000, 80_000, 40_000]
    assert list(table["knee"]) == [False, True, False]
    assert table["test_accuracy"].isna().all()


def test_an_empty_front_is_a_table_with_the_same_columns(view: SearchView) -> None:
    empty = front_table(replace(view, trials=()))
    assert len(empty) == 0
    assert list(empty.columns) == list(front_table(view).columns)


def test_the_controls_table_says_what_the_front_gains(view: SearchView) -> None:
    gains = list(controls_table(view)["front_gain"])
    assert gains[0] == pytest.approx(0.08)
    assert math.isnan(gains[1])


def test_the_group_table_has_a_column_a_front_point(view: SearchView) -> None:
    table = group_table(view)
    assert list(table.columns) == ["group", "dense", "trial 0", "trial 1", "trial 3"]
    assert list(table["trial 1"]) == [8, 16]


def test_the_layer_table_subtracts_after_from_before() -> None:
    table = layer_table([LayerRow("conv1", "conv", 16, 8, 100, 50, 10, 4)])
    assert table.loc[0, "macs_saved"] == 50
    assert table.loc[0, "params_saved"] == 6


def test_the_json_is_plain_and_has_no_nan(view: SearchView) -> None:
    data: dict[str, Any] = json.loads(json.dumps(front_json(view), allow_nan=False))
    assert data["schema"] == 1
    assert [p["trial"] for p in data["front"]] == [0, 1, 3]
    assert data["knee"] == 1
    assert data["front"][1]["test_accuracy"] is None
    assert data["front"][1]["widths"] == {"layer1.conv": 8, "layer2.conv": 16}
    assert data["controls"][0]["front_gain"] == pytest.approx(0.08)
    assert data["controls"][1]["front_gain"] is None
    assert data["reference"] == {"val_error": 1.0, "macs_fraction": 1.0}
