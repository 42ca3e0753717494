"""Only one living process runs a search."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

from autoprune.errors import StudyError
from autoprune.studies import open_storage
from autoprune.studies.lease import LEASE, hold, is_running


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


def test_a_process_of_this_machine_that_gives_no_sign_any_more_is_replaced(study: optuna.Study) -> None:
    mine = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19]
    study.set_user_attr(LEASE, holder(start=mine, until=time.time() + 99))
    with pytest.raises(StudyError, match="being run by process"), hold(study):
        raise AssertionError("both hold it")
    study.set_user_attr(LEASE, holder(start=mine, until=time.time() - 1))
    with hold(study):
        assert study.user_attrs[LEASE]["id"] != "other"


HOLDER = """
import sys, time
import optuna
from autoprune.errors import LeaseError
from autoprune.studies import lease
from autoprune.studies.storage import open_storage

lease.VALID_SECONDS, lease._RENEW_SECONDS = 3.0, 0.3
study = optuna.load_study(study_name="digits.screen", storage=open_storage(sys.argv[1]))
try:
    with lease.hold(study):
        while True:
            study.set_user_attr("beat", time.time())
            print("wrote", flush=True)
            time.sleep(0.1)
except LeaseError as error:
    print(error, flush=True)
"""


@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "nobody came"])
def test_a_process_that_was_stopped_stores_nothing_once_it_is_replaced_and_else_goes_on(
    tmp_path: Path, replaced: bool
) -> None:
    path = tmp_path / "optuna.db"
    study = optuna.create_study(storage=open_storage(path), study_name="digits.screen", directions=["minimize"] * 2)
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "wrote\n"
        with pytest.raises(StudyError, match=f"being run by process {other.pid} on"), hold(study):
            raise AssertionError("both hold it")
        other.send_signal(signal.SIGSTOP)
        while is_running(study):
            time.sleep(0.1)
        if replaced:
            with hold(study):
                study.set_user_attr("beat", "mine")
                other.send_signal(signal.SIGCONT)
                *_, last = other.stdout  # it ends by itself
                assert "has taken over the study 'digits.screen'" in last
                assert "has stored nothing since" in last
            assert study.user_attrs["beat"] == "mine"
        else:
            other.send_signal(signal.SIGCONT)
            while not is_running(study):
                time.sleep(0.1)
            assert study.user_attrs[LEASE]["pid"] == other.pid
            assert other.poll() is None
    finally:
        other.kill()
        other.communicate()
