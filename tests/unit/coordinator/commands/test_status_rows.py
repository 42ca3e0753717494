"""How searches and jobs become the rows of `autoprune status`."""

from __future__ import annotations

import datetime
from typing import Any

from autoprune.coordinator.commands.queueing import rows_of
from autoprune.studies import CANCELLED, DONE, FAILED, QUEUED, RUNNING, Job, Request

NOON = datetime.datetime(2026, 1, 1, 12, 0, 0)


def job(name: str, state: str, number: int = 0, *, priority: int = 0, **changes: Any) -> Job:
    request = Request(name, {}, "/d", priority=priority)
    return Job(number, request, state, NOON, float(number), **changes)


def search(name: str, state: str, **changes: Any) -> dict[str, Any]:
    row = {"name": name, "state": state, "holder": None, "rung": "tune", "done": 3, "total": 5, "best": 0.9}
    return {**row, "seconds_left": None, "updated": NOON.astimezone().isoformat(), **changes}


def told(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["name"], row["state"], row["reason"]


def test_what_runs_stands_first_then_what_waits_in_its_order_then_the_rest() -> None:
    rows = rows_of(
        [search("old", "finished"), search("now", "running", holder="process 7 on here")],
        [
            job("late", QUEUED, 1),
            job("now", RUNNING, 2),
            job("urgent", QUEUED, 3, priority=2),
            job("young", RUNNING, 4),
        ],
    )
    assert [told(row) for row in rows] == [
        ("now", "running", "process 7 on here"),
        ("young", "running", "preparing"),
        ("urgent", "queued", ""),
        ("late", "queued", ""),
        ("old", "finished", ""),
    ]


def test_a_job_that_ended_otherwise_than_well_says_why() -> None:
    (failed,) = rows_of([], [job("a", FAILED, reason="no such file")])
    (cancelled,) = rows_of([search("a", "stopped")], [job("a", CANCELLED)])
    (limited,) = rows_of([search("a", "stopped")], [job("a", DONE, reason="the time limit ended it")])
    assert [told(row) for row in (failed, cancelled, limited)] == [
        ("a", "failed", "no such file"),
        ("a", "cancelled", ""),
        ("a", "stopped", "the time limit ended it"),
    ]


def test_a_search_that_has_all_its_trials_and_still_runs_is_recording() -> None:
    (row,) = rows_of([search("a", "finished")], [job("a", RUNNING)])
    assert told(row) == ("a", "running", "recording")


def test_a_search_that_was_run_by_hand_after_its_job_had_failed_shows_its_own_state() -> None:
    ended = NOON - datetime.timedelta(hours=1)
    (row,) = rows_of([search("a", "finished")], [job("a", FAILED, reason="no such file", ended=ended)])
    assert told(row) == ("a", "finished", "")


def test_only_the_latest_job_of_a_name_counts() -> None:
    (row,) = rows_of([], [job("a", FAILED, 0, reason="x"), job("a", QUEUED, 1)])
    assert told(row) == ("a", "queued", "")
