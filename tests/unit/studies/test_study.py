"""Studies carry what is needed to read them, and refuse other settings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import optuna
import pytest

from autoprune.errors import StudyError
from autoprune.results import Problem
from autoprune.studies import load_rung, open_study, quiet_optuna, rung_names, search_names, study_summary

SETTINGS = {"model": {"name": "resnet20"}, "recipe": {"lr": 0.1}}


@pytest.fixture
def problem(make_chain: Callable[..., Problem]) -> Problem:
    return make_chain(3)


def test_a_study_is_readable_in_the_dashboard(storage: Any, problem: Problem) -> None:
    study = open_study(storage, "digits.tune", problem, fingerprint="f", settings=SETTINGS)
    assert study.metric_names == ["val_error", "macs_fraction"]
    assert [d.name for d in study.directions] == ["MINIMIZE", "MINIMIZE"]
    summary = study_summary(study)
    assert (summary.search, summary.rung, summary.primary) == ("digits", "tune", "macs")
    assert summary.reference == (1.0, 1.0)
    assert summary.dense == problem.cost_model.dense()
    assert study.user_attrs["autoprune.schema"] == 1


def test_the_same_settings_open_the_same_study(storage: Any, problem: Problem) -> None:
    first = open_study(storage, "digits.tune", problem, fingerprint="f", settings=SETTINGS)
    again = open_study(storage, "digits.tune", problem, fingerprint="f", settings=SETTINGS, create=False)
    assert first._study_id == again._study_id


def test_other_settings_are_refused_by_the_names_of_their_sections(storage: Any, problem: Problem) -> None:
    open_study(storage, "digits.tune", problem, fingerprint="f", settings=SETTINGS)
    changed = {**SETTINGS, "recipe": {"lr": 0.2}}
    with pytest.raises(StudyError, match="belongs to another space: it differs in recipe;"):
        open_study(storage, "digits.tune", problem, fingerprint="g", settings=changed)


def test_another_network_is_refused_even_under_the_same_settings(
    storage: Any, problem: Problem, make_chain: Callable[..., Problem]
) -> None:
    open_study(storage, "digits.tune", problem, fingerprint="f", settings=SETTINGS)
    with pytest.raises(StudyError, match="it differs in network;"):
        open_study(storage, "digits.tune", make_chain(4), fingerprint="f", settings=SETTINGS)


def test_a_missing_study_names_the_nearest_one(storage: Any, problem: Problem) -> None:
    open_study(storage, "digits.tune", problem, fingerprint="f", settings=SETTINGS)
    with pytest.raises(StudyError, match=r"no study 'digit\.tune'; did you mean 'digits\.tune'"):
        open_study(storage, "digit.tune", problem, fingerprint="f", settings=SETTINGS, create=False)
    with pytest.raises(StudyError, match="no search 'digit'; did you mean 'digits'"):
        rung_names(storage, "digit")
    with pytest.raises(StudyError, match="no rung 'final'"):
        load_rung(storage, "digits", "final")


def test_a_study_of_another_program_is_refused_and_not_listed(storage: Any, problem: Problem) -> None:
    with quiet_optuna():
        foreign = optuna.create_study(study_name="digits.tune", storage=storage, directions=["minimize"] * 2)
        foreign.add_trial(optuna.trial.create_trial(values=[1.0, 2.0]))
    with pytest.raises(StudyError, match="was not made by autoprune"):
        open_study(storage, "digits.tune", problem, fingerprint="f", settings=SETTINGS)
    assert search_names(storage) == []


def test_a_study_whose_maker_was_killed_at_once_is_finished(storage: Any, problem: Problem) -> None:
    with quiet_optuna():
        optuna.create_study(study_name="digits.tune", storage=storage, directions=["minimize"] * 2)
    study = open_study(storage, "digits.tune", problem, fingerprint="f", settings=SETTINGS)
    assert study_summary(study).search == "digits"


def test_an_unknown_schema_is_refused(storage: Any, problem: Problem) -> None:
    study = open_study(storage, "digits.tune", problem, fingerprint="f", settings=SETTINGS)
    study.set_user_attr("autoprune.schema", 99)
    with pytest.raises(StudyError, match="schema 99; this version reads schema 1"):
        open_study(storage, "digits.tune", problem, fingerprint="f", settings=SETTINGS)


def test_searches_and_rungs_are_listed_in_the_order_of_their_beginning(storage: Any, problem: Problem) -> None:
    for name in ("b.one.screen", "a.screen", "b.one.tune"):
        open_study(storage, name, problem, fingerprint="f", settings=SETTINGS)
    assert search_names(storage) == ["b.one", "a"]
    assert rung_names(storage, "b.one") == ["screen", "tune"]


def test_optunas_level_is_a_warning_inside_only_and_handlers_stay() -> None:
    logger = logging.getLogger("optuna")
    optuna.logging.set_verbosity(optuna.logging.INFO)
    handlers = list(logger.handlers)
    with quiet_optuna():
        assert logger.level == logging.WARNING
        assert logger.handlers == handlers
    assert logger.level == logging.INFO
    assert logger.handlers == handlers
