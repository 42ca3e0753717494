"""How far a search is, as its studies tell."""

from __future__ import annotations

import datetime
import os
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from autoprune.errors import StudyError
from autoprune.studies import finished_trials, lease, search_holder, search_state, write_complete
from autoprune.studies.state import write_current, write_total
from autoprune.studies.study import FINGERPRINT, RUNG, SEARCH

BEGUN = datetime.datetime(2026, 1, 1, 12, 0, 0)


def rung(storage: Any, name: str, *, errors: tuple[float, ...] = (), failed: int = 0, abandoned: int = 0) -> Any:
    """A study as a rung leaves it: a trial every ten seconds."""
    study = optuna.create_study(study_name=f"one.{name}", storage=storage, directions=["minimize", "minimize"])
    for key, value in {SEARCH: "one", RUNG: name, FINGERPRINT: "x"}.items():
        study.set_user_attr(key, value)
    ended = BEGUN
    for number, error in enumerate(errors):
        ended += datetime.timedelta(seconds=10)
        trial = create_trial(values=[error, 0.5], user_attrs={"identity": str(number)})
        trial.datetime_complete = ended
        study.add_trial(trial)
    for number in range(failed + abandoned):
        attrs = {"identity": f"f{number}", "abandoned": number >= failed}
        trial = create_trial(state=TrialState.FAIL, user_attrs=attrs)
        trial.datetime_complete = BEGUN
        study.add_trial(trial)
    return study


@pytest.fixture
def storage() -> Any:
    return optuna.storages.InMemoryStorage()


def test_a_running_search_tells_who_runs_it_its_rung_its_best_and_when_the_rung_ends(storage: Any) -> None:
    first = rung(storage, "screen", errors=(0.5, 0.4))
    second = rung(storage, "tune", errors=(0.3, 0.1, 0.2), failed=2, abandoned=1)
    write_total(first, 2)
    write_total(second, 8)
    rung(storage, "final")
    with lease.hold(first):
        state = search_state(storage, "one")
        assert search_holder(storage, "one") == state.holder
    assert (state.state, state.rung, state.done, state.total, state.failed) == ("running", "tune", 3, 8, 2)
    assert f"process {os.getpid()} on " in str(state.holder)
    assert state.best == pytest.approx(0.9)
    assert state.seconds_left == pytest.approx(50.0)
    assert state.updated == BEGUN + datetime.timedelta(seconds=30)


def test_a_search_that_nobody_runs_is_stopped_until_it_went_through_to_its_end(storage: Any) -> None:
    first = rung(storage, "screen", errors=(0.5, 0.4))
    write_total(first, 8)
    state = search_state(storage, "one")
    assert (state.state, state.holder, state.seconds_left) == ("stopped", None, None)
    write_complete(first, True)
    assert search_state(storage, "one").state == "finished"


def test_a_rung_beside_the_ladder_is_told_of_only_while_it_runs(storage: Any) -> None:
    first = rung(storage, "final", errors=(0.2,))
    rung(storage, "controls", errors=(0.5,))
    write_current(first, "controls")
    assert search_state(storage, "one", side=("controls",)).rung == "final"
    with lease.hold(first):
        assert search_state(storage, "one", side=("controls",)).rung == "controls"
        write_current(first, "final")  # the search was given more trials and is on its ladder again
        assert search_state(storage, "one", side=("controls",)).rung == "final"


def test_repeated_policies_count_once(storage: Any) -> None:
    study = rung(storage, "screen", errors=(0.5,))
    study.add_trial(create_trial(values=[0.5, 0.5], user_attrs={"identity": "0", "reused": 0}))
    assert search_state(storage, "one").done == 1
    assert finished_trials(storage, "one") == 2


def test_a_search_that_was_made_before_totals_were_stored_has_none(storage: Any) -> None:
    rung(storage, "screen", errors=(0.5, 0.4))
    state = search_state(storage, "one")
    assert (state.done, state.total, state.seconds_left) == (2, None, None)


def test_a_search_that_does_not_exist_has_no_trials_and_no_state(storage: Any) -> None:
    assert finished_trials(storage, "none") == 0
    assert search_holder(storage, "none") is None
    with pytest.raises(StudyError, match="no search 'none'"):
        search_state(storage, "none")
