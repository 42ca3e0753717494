"""What is written about a trial, and under which keys."""

from __future__ import annotations

import base64
import json
import math
import posixpath
import re
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.policy import Choice, Policy
from autoprune.results import Fidelity, TrialResult
from autoprune.tracking.environment import environment_tags
from autoprune.tracking.pages import chart_view, encode_view
from autoprune.tracking.records import (
    TrialRecord,
    clip,
    safe_key,
    trial_curves,
    trial_metrics,
    trial_params,
    trial_tags,
)

POLICY = Policy({"a": Choice("l2", 0.25), "b": Choice("obs", 0.5)})


def make_record(**metrics: float) -> TrialRecord:
    result = TrialResult(
        policy=POLICY,
        identity="i",
        fidelity=Fidelity("tune", epochs=3),
        widths={"a": 6, "b": 4},
        costs={"macs": 50, "params": 10},
        metrics=metrics,
        curves={"val_accuracy": (0.5, math.inf)},
        seconds={"tune": 2.0, "evaluate": 0.5},
    )
    return TrialRecord("digits", "digits.tune", 7, "tune", POLICY, result, {"macs": 100}, ended=100.0)


@given(st.text(max_size=300))
def test_every_key_is_one_that_mlflow_accepts(name: str) -> None:
    key = safe_key(name)
    assert re.fullmatch(r"[A-Za-z0-9_\-. :/]{1,250}", key)
    assert posixpath.normpath(key) == key
    assert not key.startswith(("/", ".."))
    assert key != "."


@given(st.text(max_size=20), st.text(max_size=20))
def test_different_names_keep_different_keys(one: str, other: str) -> None:
    assert (safe_key(one) == safe_key(other)) == (one == other)


@pytest.mark.parametrize("name", ["val_accuracy", "ratio/layer1.0.conv1", "a b:c-d", "epoch/train_loss"])
def test_ordinary_names_stay_as_they_are(name: str) -> None:
    assert safe_key(name) == name


def test_ratios_widths_and_criteria_become_parameters() -> None:
    params = trial_params(make_record(val_accuracy=0.9))
    assert params == {
        "ratio/a": "0.25",
        "ratio/b": "0.5",
        "criterion/a": "l2",
        "criterion/b": "obs",
        "width/a": "6",
        "width/b": "4",
    }


def test_a_criterion_is_written_once_a_scope() -> None:
    record = TrialRecord("s", "s.tune", 1, "tune", POLICY, None, {}, state="fail", scopes={"a": "model"})
    assert trial_params(record) == {"ratio/a": "0.25", "ratio/b": "0.5", "criterion/model": "l2", "criterion/b": "obs"}


def test_metrics_hold_scores_costs_fractions_and_seconds_but_no_infinity() -> None:
    metrics = trial_metrics(make_record(val_accuracy=0.75, val_loss=math.inf))
    assert math.isnan(metrics.pop("val_loss"))
    assert metrics == {
        "val_accuracy": 0.75,
        "val_error": 0.25,
        "macs": 50.0,
        "macs_fraction": 0.5,
        "params": 10.0,
        "seconds/tune": 2.0,
        "seconds/evaluate": 0.5,
    }


def test_curves_are_kept_apart_from_scores() -> None:
    (name, series), *rest = trial_curves(make_record(val_accuracy=0.9)).items()
    assert not rest
    assert name == "epoch/val_accuracy"
    assert series[0] == 0.5
    assert math.isnan(series[1])


def test_the_start_of_a_trial_is_its_end_less_the_seconds_it_took() -> None:
    assert make_record(val_accuracy=0.9).milliseconds == (97_500, 100_000)


def test_a_complete_trial_needs_a_result() -> None:
    with pytest.raises(ValueError, match=r"digits\.tune/1 has no result"):
        TrialRecord("digits", "digits.tune", 1, "tune", POLICY, None, {})


def test_a_callers_tags_cannot_replace_those_that_tie_a_run_to_its_search() -> None:
    record = TrialRecord(
        "s", "s.tune", 1, "tune", POLICY, None, {}, state="fail", tags={"kind": "search", "optuna_url": "x"}
    )
    tags = trial_tags(record)
    assert tags["kind"] == "trial"
    assert tags["optuna_url"] == "x"


def test_long_values_are_cut_with_a_mark() -> None:
    assert clip("abc", 3) == "abc"
    assert clip("a" * 100, 10) == "aaaaaa ..."


def test_environment_tags_name_versions_and_the_commit_of_the_repository() -> None:
    tags = environment_tags()
    assert {"version.python", "version.torch", "version.optuna", "version.mlflow", "version.autoprune"} <= set(tags)
    assert tags.get("git_dirty", "false") in ("true", "false")


def test_environment_tags_leave_the_commit_out_where_there_is_no_repository(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    tags = environment_tags(tmp_path_factory.mktemp("bare"))
    assert "git_commit" not in tags
    assert "version.python" in tags


def test_a_view_that_does_not_fit_a_tag_is_deflated_as_the_front_end_reads_it() -> None:
    small = chart_view(filter_text="", cost="macs_fraction", params=["ratio/a"])
    assert json.loads(encode_view(small)) == small
    large = chart_view(filter_text="", cost="macs_fraction", params=[f"ratio/{i}" + "x" * 400 for i in range(50)])
    head, _, body = encode_view(large).partition(";")
    assert head == "deflate"
    assert json.loads(zlib.decompress(base64.b64decode(body))) == large
    assert len(large["compareRunCharts"][1]["selectedParams"]) == 14
