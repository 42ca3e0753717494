"""Intervals of hypervolumes: what they are drawn from, and that they say so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autoprune.report.intervals import hypervolume_interval, hypervolume_sentence
from autoprune.report.view import SearchView


def seeded(view: SearchView, spread: float, seeds: int) -> SearchView:
    trials = tuple(replace(p, metrics={"val_accuracy_spread": spread}) for p in view.trials)
    return replace(view, trials=trials, seeds=seeds)


def test_nothing_is_said_where_no_spread_is_known(view: SearchView) -> None:
    assert hypervolume_interval(view, view.trials) is None
    assert "[" not in hypervolume_sentence(view)
    assert hypervolume_interval(replace(view, samples={"val": 500}), ()) is None


def test_the_interval_holds_the_hypervolume_and_shrinks_with_the_root_of_the_samples(view: SearchView) -> None:
    widths = []
    for samples in (500, 50_000):
        interval = hypervolume_interval(replace(view, samples={"val": samples}), view.trials)
        assert interval is not None
        assert interval.low < view.hypervolume < interval.high
        assert interval.source == f"{samples:,} validation samples"
        widths.append(interval.high - interval.low)
    assert widths[0] / widths[1] == pytest.approx(10, rel=0.2)


def test_one_point_has_the_interval_of_its_binomial_error(view: SearchView) -> None:
    point = replace(view.trials[1], val_accuracy=0.9)  # half of the dense cost
    interval = hypervolume_interval(replace(view, samples={"val": 1000}), [point])
    assert interval is not None
    error = (0.9 * 0.1 / 1000) ** 0.5
    half = 0.5 * (interval.high - interval.low) / (1 - view.fraction(point))
    assert half == pytest.approx(1.96 * error, rel=0.15)


def test_several_seeds_count_instead_of_samples(view: SearchView) -> None:
    wide, narrow = (
        hypervolume_interval(seeded(replace(view, samples={"val": 9}), spread, 4), seeded(view, spread, 4).trials)
        for spread in (0.02, 0.002)
    )
    assert wide is not None
    assert narrow is not None
    assert wide.source == narrow.source == "4 seeds"
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(10, rel=0.3)


def test_the_same_points_have_the_same_interval(view: SearchView) -> None:
    sampled = replace(view, samples={"val": 300})
    assert hypervolume_interval(sampled, view.trials) == hypervolume_interval(sampled, view.trials)


def test_dominated_trials_do_not_widen_the_interval(view: SearchView) -> None:
    sampled = replace(view, samples={"val": 300})
    assert hypervolume_interval(sampled, view.trials) == hypervolume_interval(sampled, view.front)


def test_an_accuracy_that_is_no_fraction_has_no_interval(view: SearchView) -> None:
    trials = (replace(view.trials[0], val_accuracy=-3.0),)
    assert hypervolume_interval(replace(view, samples={"val": 300}), trials) is None


def test_the_sentence_gives_both_intervals_and_their_source(view: SearchView) -> None:
    text = hypervolume_sentence(replace(view, samples={"val": 300}))
    assert text.count("[") == 2
    assert text.endswith("95 % intervals by parametric bootstrap over 300 validation samples")
