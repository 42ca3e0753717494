"""The queue of searches: what is stored of a job, its states, and who may change them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from autoprune.errors import StudyError
from autoprune.studies import open_storage, search_names
from autoprune.studies.jobs import CANCELLED, DONE, FAILED, QUEUE, QUEUED, RUNNING, Queue, Request


def request(name: str = "one", **changes: Any) -> Request:
    return Request(**{"name": name, "space": {"schema": 1, "name": name}, "directory": "/somewhere", **changes})


@pytest.fixture
def storage() -> Any:
    return optuna.storages.InMemoryStorage()


@pytest.fixture
def queue(storage: Any) -> Queue:
    return Queue(storage)


def test_a_job_is_read_back_from_a_file_as_it_was_submitted(tmp_path: Path) -> None:
    wanted = request(priority=3, trials=7, timeout=60.5, workers=2, extra=("--allow-code",))
    Queue(open_storage(tmp_path / "optuna.db")).submit(wanted, now=1000.0)
    (job,) = Queue(open_storage(tmp_path / "optuna.db")).jobs()
    assert job.request == wanted
    assert (job.number, job.name, job.state, job.turn, job.attempts, job.spent) == (0, "one", QUEUED, 1000.0, 0, 0.0)
    assert job.submitted.timestamp() == 1000.0
    assert job.started is None


def test_the_queue_is_no_search(queue: Queue, storage: Any) -> None:
    queue.submit(request(), now=0.0)
    assert search_names(storage) == []


def test_a_job_passes_from_queued_to_running_to_done(queue: Queue) -> None:
    job = queue.submit(request(), now=0.0)
    queue.begin(job)
    running = queue.find("one")
    assert (running.state, running.attempts) == (RUNNING, 1)
    assert running.started is not None
    queue.note(running, spent=12.5)
    queue.end(queue.find("one"), DONE)
    done = queue.find("one")
    assert (done.state, done.spent) == (DONE, 12.5)
    assert done.ended is not None


def test_a_job_that_failed_says_why(queue: Queue) -> None:
    job = queue.submit(request(), now=0.0)
    queue.begin(job)
    queue.end(job, FAILED, "the checkpoint is gone")
    assert (queue.find("one").state, queue.find("one").reason) == (FAILED, "the checkpoint is gone")


def test_a_job_that_waits_and_is_cancelled_counts_as_cancelled_before_any_runner_sees_it(queue: Queue) -> None:
    job = queue.submit(request(), now=0.0)
    queue.ask_to_cancel(job)
    found = queue.find("one")
    assert (found.state, found.cancelled, found.cancelling) == (CANCELLED, True, False)


def test_a_job_that_runs_and_is_cancelled_is_cancelling_until_the_runner_ends_it(queue: Queue) -> None:
    job = queue.submit(request(), now=0.0)
    queue.begin(job)
    queue.ask_to_cancel(job)
    found = queue.find("one")
    assert (found.state, found.cancelling) == (RUNNING, True)
    queue.end(found, CANCELLED)
    assert queue.find("one").state == CANCELLED


def test_a_job_that_has_ended_cannot_be_cancelled(queue: Queue) -> None:
    job = queue.submit(request(), now=0.0)
    queue.begin(job)
    queue.end(job, DONE)
    with pytest.raises(StudyError, match="'one' is done already"):
        queue.ask_to_cancel(job)


def test_a_name_that_waits_or_runs_is_refused_and_one_that_has_ended_is_not(queue: Queue) -> None:
    job = queue.submit(request(), now=0.0)
    with pytest.raises(StudyError, match=r"'one' is queued already.*autoprune cancel one"):
        queue.submit(request(), now=1.0)
    queue.begin(job)
    with pytest.raises(StudyError, match="'one' is running already"):
        queue.submit(request(), now=1.0)
    queue.end(job, FAILED, "x")
    assert queue.submit(request(), now=2.0).number == 1
    assert queue.find("one").state == QUEUED


def test_high_priority_comes_first_then_who_has_waited_longest_and_a_job_put_back_waits_behind(queue: Queue) -> None:
    first = queue.submit(request("first"), now=1.0)
    queue.submit(request("second"), now=2.0)
    queue.submit(request("urgent", priority=5), now=3.0)

    def order() -> list[str]:
        return [job.name for job in sorted(queue.jobs(), key=lambda job: job.place)]

    assert order() == ["urgent", "first", "second"]
    queue.begin(first)
    queue.put_back(first, "made room", turn=4.0)
    assert order() == ["urgent", "second", "first"]
    found = queue.find("first")
    assert (found.state, found.reason) == (QUEUED, "made room")


def test_a_name_that_was_never_submitted_is_an_error_with_the_nearest_one(queue: Queue) -> None:
    queue.submit(request("resnet"), now=0.0)
    with pytest.raises(StudyError, match=r"no search 'resnte' was submitted; did you mean 'resnet'\?"):
        queue.find("resnte")


def test_only_one_runner_holds_a_queue(queue: Queue, storage: Any) -> None:
    other = Queue(storage)
    assert not other.held
    with queue.hold():
        assert other.held
        with pytest.raises(StudyError, match=QUEUE), Queue(storage).hold():
            pass
    assert not other.held


def test_a_queue_of_a_later_version_is_refused(queue: Queue, storage: Any) -> None:
    queue._study.set_user_attr("autoprune.schema", 2)
    with pytest.raises(StudyError, match="schema 2; this version reads schema 1"):
        Queue(storage)
