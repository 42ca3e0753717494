"""Reading trials in bulk gives what Optuna's own reading gives."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from autoprune.errors import LeaseError
from autoprune.studies.retrying import LastingStorage

SPACE = {
    "kind": CategoricalDistribution(["l2", None, 3]),
    "ratio": FloatDistribution(0.1, 0.9, log=True),
    "count": IntDistribution(1, 9, step=2),
}


@pytest.fixture
def storage(tmp_path: Path) -> Any:
    made = LastingStorage(f"sqlite:///{tmp_path}/optuna.db", {}, shown="here", say=None)
    yield made
    made.engine.dispose()


@pytest.fixture
def study_id(storage: LastingStorage) -> int:
    """A study with trials of every state, and another one beside it."""
    minimize = [optuna.study.StudyDirection.MINIMIZE] * 2
    found = storage.create_new_study(minimize, "one")
    other = storage.create_new_study(minimize, "two")
    now = datetime.datetime(2026, 1, 2, 3, 4, 5, 6)
    for number, state in enumerate([*TrialState, TrialState.COMPLETE]):
        ended = state.is_finished()
        trial = FrozenTrial(
            number=0,
            trial_id=0,
            state=state,
            value=None,
            values=[float(number), float("inf")] if state == TrialState.COMPLETE else None,
            datetime_start=None if state == TrialState.WAITING else now,
            datetime_complete=now if ended else None,
            params={"kind": [None, "l2", 3][number % 3], "ratio": 0.3, "count": 5},
            distributions=SPACE,
            user_attrs={"result": {"nested": [1, None, "ä"]}, "origin": number},
            system_attrs={"constraints": [-0.5]},
            intermediate_values={},
        )
        storage.create_new_trial(found, trial)
        storage.create_new_trial(other, trial)
    bare = storage.create_new_trial(found)
    for step, value in enumerate([0.5, float("nan"), float("-inf")]):
        storage.set_trial_intermediate_value(bare, step, value)
    return found


def same(ours: list[FrozenTrial], theirs: list[FrozenTrial]) -> None:
    def plain(trial: FrozenTrial) -> dict[str, Any]:
        steps = {"intermediate_values": repr(trial.intermediate_values)}  # where NaN equals itself
        return vars(trial) | steps | {"params": list(trial.params), "ranges": dict(trial.distributions)}

    assert [plain(trial) for trial in ours] == [plain(trial) for trial in theirs]


def test_every_trial_is_read_as_optuna_reads_it(storage: LastingStorage, study_id: int) -> None:
    ours = storage._get_trials(study_id, None, set(), -1)
    same(ours, RDBStorage._get_trials(storage, study_id, None, set(), -1))
    assert len(ours) == len(TrialState) + 2
    assert {t.state for t in ours} == set(TrialState)


def test_states_and_ids_select_trials_as_optuna_does(storage: LastingStorage, study_id: int) -> None:
    ids = [t._trial_id for t in storage._get_trials(study_id, None, set(), -1)]
    cases: list[tuple[Any, set[int], int]] = [
        ((TrialState.COMPLETE,), set(), -1),
        ([TrialState.FAIL, TrialState.RUNNING], {ids[0]}, ids[2]),
        (None, {ids[0], ids[-1]}, ids[3]),
        (None, set(), ids[-1]),
        ((), set(), -1),
    ]
    for states, included, after in cases:
        ours = storage._get_trials(study_id, states, included, after)
        same(ours, RDBStorage._get_trials(storage, study_id, states, included, after))


def test_a_study_that_does_not_exist_is_an_error(storage: LastingStorage) -> None:
    with pytest.raises(KeyError):
        storage._get_trials(99, None, set(), -1)


def test_a_transaction_asks_its_guard_once_and_the_next_one_asks_again(storage: LastingStorage, study_id: int) -> None:
    asked: list[int] = []
    template = storage._get_trials(study_id, (TrialState.COMPLETE,), set(), -1)[0]
    with storage.fenced(lambda connection: asked.append(1)):
        storage.create_new_trial(study_id, template)
        assert len(asked) == 1
        storage.set_study_user_attr(study_id, "a", 1)
        assert len(asked) == 2
        storage._get_trials(study_id, None, set(), -1)
    assert len(asked) == 2


def test_a_guard_that_refuses_undoes_each_transaction_anew(storage: LastingStorage, study_id: int) -> None:
    def refuse(connection: Any) -> None:
        raise LeaseError("taken over")

    before = storage._get_trials(study_id, None, set(), -1)
    template = before[0]
    with storage.fenced(refuse):
        for _ in range(2):
            with pytest.raises(LeaseError):
                storage.create_new_trial(study_id, template)
    same(storage._get_trials(study_id, None, set(), -1), before)
