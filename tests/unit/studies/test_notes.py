"""Notes, settings and picks that are kept with a study."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.study import Study
from optuna_dashboard import get_note, save_note

from autoprune.studies import read_pick, write_notes, write_pick, write_study_note


@pytest.fixture
def study(tmp_path: Path) -> Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/optuna.db", directions=["minimize", "minimize"])
    for _ in range(2):
        study.tell(study.ask(), [0.1, 0.5])
    return study


def note_of(study: Study, number: int | None = None) -> str:
    if number is None:
        return get_note(study)
    return get_note(optuna.Trial(study, study.trials[number]._trial_id))


def test_the_dashboard_reads_the_notes_of_a_study_and_of_its_trials(study: Study) -> None:
    write_study_note(study, "the *front*")
    write_notes(study, {0: "a", 1: "b" * 5000, 7: "no such trial"})
    assert note_of(study) == "the *front*"
    assert [note_of(study, number) for number in (0, 1)] == ["a", "b" * 5000]


def test_a_note_is_replaced_by_a_newer_shorter_one(study: Study) -> None:
    write_notes(study, {0: "x" * 5000})
    write_notes(study, {0: "short"})
    write_study_note(study, "y" * 5000)
    write_study_note(study, "brief")
    assert (note_of(study, 0), note_of(study)) == ("short", "brief")


def test_a_note_that_a_person_edited_is_left_alone(study: Study) -> None:
    write_study_note(study, "ours")
    write_notes(study, {0: "ours"})
    save_note(study, "mine")
    save_note(optuna.Trial(study, study.trials[0]._trial_id), "mine too")
    write_study_note(study, "newer")
    write_notes(study, {0: "newer"})
    assert (note_of(study), note_of(study, 0)) == ("mine", "mine too")


def test_picks_come_back_as_they_were_written(study: Study) -> None:
    assert read_pick(study) is None
    write_pick(study, {"keys": ["x.final/1"], "synced": False})
    again = optuna.load_study(study_name=study.study_name, storage=study._storage)
    assert read_pick(again) == {"keys": ["x.final/1"], "synced": False}
    write_pick(study, None)
    assert read_pick(again) is None
