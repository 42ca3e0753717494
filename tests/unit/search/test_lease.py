"""Only one living process runs a search."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from typing import Any

import optuna
import pytest

from autoprune.errors import StudyError
from autoprune.search.lease import LEASE, hold


@pytest.fixture
def study(storage: Any) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(storage=storage, study_name="digits.screen", directions=["minimize"] * 2)


def holder(**changes: Any) -> dict[str, Any]:
    known = {"id": "other", "host": socket.gethostname(), "pid": os.getpid(), "start": "1", "until": time.time() + 99}
    return known | changes


def test_a_lease_is_refused_while_it_is_held_and_free_afterwards(study: optuna.Study) -> None:
    with hold(study), pytest.raises(StudyError, match=f"being run by process {os.getpid()} on"), hold(study):
        raise AssertionError("both hold it")
    with hold(study):
        assert study.user_attrs[LEASE]["pid"] == os.getpid()
    assert study.user_attrs[LEASE] is None


def test_a_lease_is_given_back_when_the_search_is_interrupted(study: optuna.Study) -> None:
    with pytest.raises(KeyboardInterrupt), hold(study):
        raise KeyboardInterrupt
    assert study.user_attrs[LEASE] is None


def test_the_lease_of_a_dead_process_of_this_machine_is_taken_over_at_once(study: optuna.Study) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    study.set_user_attr(LEASE, holder(pid=process.pid))
    with hold(study):
        assert study.user_attrs[LEASE]["id"] != "other"


def test_another_process_of_the_same_number_does_not_count(study: optuna.Study) -> None:
    study.set_user_attr(LEASE, holder(start="a long time ago"))
    with hold(study):
        assert study.user_attrs[LEASE]["id"] != "other"


def test_another_machine_is_believed_until_its_lease_runs_out(study: optuna.Study) -> None:
    study.set_user_attr(LEASE, holder(host="elsewhere"))
    with pytest.raises(StudyError, match="on elsewhere"), hold(study):
        raise AssertionError("both hold it")
    study.set_user_attr(LEASE, holder(host="elsewhere", until=time.time() - 1))
    with hold(study):
        assert study.user_attrs[LEASE]["host"] == socket.gethostname()
