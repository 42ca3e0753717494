"""The queue is the same on SQLite and on a real PostgreSQL server, and several processes may use it at once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from autoprune.errors import StudyError
from autoprune.studies import CANCELLED, DONE, QUEUED, RUNNING, Queue, Request, open_storage


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    return str(request.getfixturevalue("postgres_url")) if request.param == "postgresql" else tmp_path / "optuna.db"


def request_of(name: str) -> Request:
    return Request(name, {"schema": 1, "name": name, "criteria": {"choices": ["l1"] * 2000}}, "/d")


def test_jobs_pass_through_their_states_as_several_connections_see_them(where: str | Path) -> None:
    ours, runner = Queue(open_storage(where)), Queue(open_storage(where))
    for name in ("a", "b"):
        ours.submit(request_of(name), now=1.0)
    with runner.hold():
        assert ours.held
        with pytest.raises(StudyError), ours.hold():
            pass
        runner.begin(runner.find("a"))
        assert ours.find("a").state == RUNNING
        ours.ask_to_cancel(ours.find("a"))
        ours.ask_to_cancel(ours.find("b"))
        assert runner.find("a").cancelling
        assert runner.find("b").state == CANCELLED
        runner.put_back(runner.find("a"), "made room", turn=5.0)
        runner.end(runner.find("b"), CANCELLED)
    assert not ours.held
    assert [job.state for job in Queue(open_storage(where)).jobs()] == [CANCELLED, CANCELLED]
    job = ours.submit(request_of("a"), now=2.0)
    runner.begin(job)
    runner.end(job, DONE)
    assert Queue(open_storage(where)).find("a").state == DONE
    assert Queue(open_storage(where)).find("a").request == request_of("a")


def test_what_many_submit_at_the_same_moment_to_a_new_database_is_all_there_once(where: str | Path) -> None:
    errors: list[BaseException] = []

    def submit(name: str) -> None:
        try:
            Queue(open_storage(where)).submit(request_of(name), now=1.0)
        except BaseException as error:
            errors.append(error)

    open_storage(where)
    threads = [threading.Thread(target=submit, args=(f"n{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    jobs = Queue(open_storage(where)).jobs()
    assert sorted(job.name for job in jobs) == [f"n{i}" for i in range(6)]
    assert sorted(job.number for job in jobs) == list(range(6))
    assert {job.state for job in jobs} == {QUEUED}
