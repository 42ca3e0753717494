"""What a search maximises, as people see it: names and numbers of accuracies and of metrics of any size."""

from __future__ import annotations

import functools
import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from autoprune.objective import ACCURACY, Objective, name_of, objective_of

R2 = Objective("r2", percent=False)


def r2(output: Any, target: Any, *, scale: float = 1.0) -> float:
    return scale * float(output == target)


class Scorer:
    def __call__(self, output: Any, target: Any) -> float:
        return r2(output, target)

    def score(self, output: Any, target: Any) -> float:
        return r2(output, target)


class Odd:
    __name__ = "<b>%</b>"

    def __call__(self, output: Any, target: Any) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (r2, "r2"),
        (Scorer(), "Scorer"),
        (Scorer().score, "score"),
        (functools.partial(r2, scale=2.0), "r2"),
        (functools.partial(functools.partial(r2, scale=2.0), scale=3.0), "r2"),
        (functools.partial(Scorer()), "Scorer"),
        (lambda output, target: 0.0, "metric"),
        (functools.partial(lambda output, target: 0.0), "metric"),
        (Odd(), "metric"),
        (max, "max"),
    ],
    ids=[
        "function",
        "object",
        "method",
        "partial",
        "partials",
        "partial object",
        "lambda",
        "partial lambda",
        "odd",
        "max",
    ],
)
def test_a_metric_goes_by_its_own_name(metric: Any, name: str) -> None:
    assert name_of(metric) == name
    assert objective_of(metric) == Objective(name, percent=False)


def test_without_a_metric_it_is_accuracy_in_percent() -> None:
    assert objective_of(None) == ACCURACY == Objective()
    assert (ACCURACY.label("val"), ACCURACY.long("test"), ACCURACY.head("val")) == (
        "val accuracy",
        "test accuracy",
        "val acc",
    )
    assert ACCURACY.axis("val") == "validation accuracy (%)"
    assert ACCURACY.axis("val", "test") == "accuracy (%): validation, and test"
    assert ACCURACY.axis("val", on="tune") == "validation accuracy on tune (%)"
    assert (ACCURACY.hint, ACCURACY.note, ACCURACY.best) == ("", "", "most accurate")
    assert (ACCURACY.error, ACCURACY.stored_error) == ("validation error", "val_error")
    assert (ACCURACY.text(0.8341), ACCURACY.text(0.8341, 2), ACCURACY.text(math.nan)) == ("83.4%", "83.41%", "–")
    assert ACCURACY.difference(0.834, 0.831) == "+0.3 points"
    assert ACCURACY.change(-0.0203, near=0.9) == "-2.0"
    assert (ACCURACY.scale, ACCURACY.suffix, ACCURACY.worst(0.97)) == (100.0, "%", 0.0)
    assert (ACCURACY.area(0.61234), ACCURACY.plain(0.82), ACCURACY.regret(0.0035)) == (
        "0.6123",
        "0.8200",
        "0.35 points",
    )
    assert ACCURACY.tells(0.0006)
    assert not ACCURACY.tells(-0.0004)


def test_an_own_metric_has_its_name_its_direction_and_no_percent_sign() -> None:
    assert (R2.label("val"), R2.head("val"), R2.long("val"), R2.long("test")) == (
        "val r2",
        "val r2",
        "validation r2",
        "test r2",
    )
    assert R2.axis("val") == "validation r2 (higher is better)"
    assert R2.axis("val", "test") == "r2 (higher is better): validation, and test"
    assert R2.hint == " (higher is better)"
    assert R2.note == "`r2` is maximised: higher is better."
    assert R2.best == "highest r2"
    assert (R2.error, R2.stored_error) == ("1 - validation r2", "1 - val r2")
    assert R2.difference(1.924, 1.912) == "+0.012"
    assert (R2.scale, R2.suffix) == (1.0, "")
    assert R2.tells(1e-9)
    assert not R2.tells(0.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.924, "1.924"),
        (0.98124, "0.9812"),
        (-192.4, "-192.4"),
        (1924.0, "1924"),
        (1924371.0, "1924371"),
        (1.924e9, "1.924e+09"),
        (-1.924e300, "-1.924e+300"),
        (0.0001924, "0.0001924"),
        (-1.924e-7, "-1.924e-07"),
        (5e-324, "4.941e-324"),
        (0.0, "0"),
        (-0.0, "0"),
        (math.nan, "–"),
        (math.inf, "–"),
    ],
)
def test_a_number_of_any_size_has_four_digits(value: float, text: str) -> None:
    assert R2.text(value) == text


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (-192.4, -192.9, "+0.5"),
        (1924.0, 1900.0, "+24"),
        (0.0, -0.5, "+0.5000"),
        (0.0001924, 0.0001900, "+0.0000024"),
        (2e-7, 1e-7, "+1e-07"),
        (3e12, 1e12, "+2e+12"),
        (math.nan, 1.0, "–"),
    ],
)
def test_a_difference_has_a_sign_and_the_places_of_its_values(a: float, b: float, text: str) -> None:
    assert R2.difference(a, b) == text


@pytest.mark.parametrize(
    ("dense", "worst"), [(1924.0, 0.0), (0.98, 0.0), (-192.4, -384.8), (-2e-9, -4e-9), (0.0, -1.0), (math.nan, -1.0)]
)
def test_the_value_that_counts_for_nothing_lies_below_the_dense_one(dense: float, worst: float) -> None:
    assert R2.worst(dense) == worst
    assert not R2.worst(dense) >= dense


def test_a_metric_that_is_too_small_to_tell_candidates_apart_is_warned_about() -> None:
    assert "dense network's r2 is -3.000e-17, too small" in R2.warning(-3e-17)
    assert "larger unit" in R2.warning(3e-17)
    assert not any(R2.warning(value) for value in (0.0, -1e-6, 0.98, 1e12, math.nan))
    assert not ACCURACY.warning(1e-17)


def test_it_survives_json_is_frozen_and_has_a_name() -> None:
    assert R2.to_json() == {"name": "r2", "percent": False}
    assert Objective.from_json(R2.to_json()) == R2
    assert Objective.from_json(ACCURACY.to_json()) == ACCURACY
    with pytest.raises(FrozenInstanceError):
        R2.name = "other"  # type: ignore[misc]
    with pytest.raises(ValueError, match="needs a name"):
        Objective("  ")
