"""Errors: one tree, an exit status each, and hints at the nearest valid name."""

from __future__ import annotations

import pickle

import pytest

from autoprune import errors
from autoprune.errors import AutopruneError, Fault, InputError, SpaceError, TrackingError, TrialError, nearest


@pytest.mark.parametrize(
    "name",
    [
        "SpaceError",
        "PolicyError",
        "BudgetError",
        "CheckpointError",
        "DataError",
        "TraceError",
        "StudyError",
        "MissingExtraError",
    ],
)
def test_bad_input_is_a_value_error_with_status_2(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, InputError)
    assert issubclass(kind, ValueError)
    assert kind.status == 2


def test_the_tracker_has_status_3_and_a_failed_trial_is_no_bad_input() -> None:
    assert TrackingError("x").status == 3
    assert TrialError("x").status == AutopruneError("x").status == 1
    assert not issubclass(TrialError, InputError)


def test_a_fault_says_line_place_and_message_where_it_has_them() -> None:
    assert str(Fault("wrong", "a.b", 3)) == "line 3: a.b: wrong"
    assert str(Fault("wrong")) == "wrong"
    assert str(Fault("wrong", "a.b")) == "a.b: wrong"


def test_a_space_error_survives_pickling_as_a_worker_would_send_it() -> None:
    error = SpaceError([Fault("wrong", "a", 1), Fault("worse", "b", 2)], "my.yaml")
    copy = pickle.loads(pickle.dumps(error))
    assert copy.faults == error.faults
    assert str(copy) == str(error) == "my.yaml has 2 faults:\n  line 1: a: wrong\n  line 2: b: worse"


def test_a_misspelt_name_is_answered_with_the_nearest_one_or_the_list() -> None:
    assert nearest("tailor", ["taylor", "l1"]) == "; did you mean 'taylor'?"
    assert nearest("zzz", ["taylor", "l1"]) == "; valid: l1, taylor"
    assert nearest("zzz", []) == ""
    assert nearest("zzz", [f"name{i:02}" for i in range(20)]).endswith("name11, ...")
