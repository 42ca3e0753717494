"""Scores that cannot be what they seem."""

from types import SimpleNamespace

import pytest

from autoprune.network import plausibility
from autoprune.network.plausibility import doubts
from autoprune.network.training.evaluation import Score


def bench(*, metric=None, classes=4, count=400):
    return SimpleNamespace(metric=metric, splits=SimpleNamespace(val=range(count), num_classes=classes))


@pytest.mark.parametrize(
    ("accuracy", "doubted"), [(0.089, True), (0.25, True), (0.28, True), (0.31, False), (0.99, False)]
)
def test_an_accuracy_that_chance_explains_is_doubted(accuracy, doubted):
    found = doubts(bench(), {"val_accuracy": accuracy})
    assert bool(found) is doubted
    if doubted:
        assert f"right on {accuracy:.1%} of 400 validation samples, where chance is 25.0%" in found[0]


def test_few_samples_need_more_to_be_above_chance():
    assert doubts(bench(), {"val_accuracy": 0.31}, limit=40)


@pytest.mark.parametrize(("collapsed", "doubted"), [(192.4, True), (5.0, False), (float("nan"), False)])
def test_a_metric_that_rises_when_everything_is_pruned_is_doubted(collapsed, doubted, monkeypatch):
    monkeypatch.setattr(plausibility, "collapsed_score", lambda bench, limit: Score(collapsed, 1.0, 10, ()))
    found = doubts(bench(metric=max, classes=0), {"val_accuracy": 5.2})
    assert bool(found) is doubted
    if doubted:
        assert "the metric is 192.4 with almost everything pruned and 5.2 for the dense network" in found[0]
        assert found[0].endswith("where lower is better, give the negative")


def test_a_mean_over_batches_is_said(monkeypatch):
    monkeypatch.setattr(plausibility, "collapsed_score", lambda bench, limit: Score(0.1, 1.0, 10, (), whole=False))
    assert "mean over batches" in doubts(bench(metric=max, classes=0), {"val_accuracy": 5.2})[0]
