"""What `autoprune submit`, `status`, `cancel` and `logs` do.

Decides what a job holds, and how searches, jobs and the service's processes are put together for a reader.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune import report, studies
from autoprune.coordinator.running import log
from autoprune.coordinator.stored.places import make_home, open_existing, storage_path
from autoprune.coordinator.stored.search import CONTROLS, SCRATCH
from autoprune.coordinator.stored.service_state import read_service
from autoprune.errors import StudyError, nearest
from autoprune.report.console import terminal
from autoprune.space import Space
from autoprune.studies import Job, Queue, Request


@dataclass(frozen=True)
class Wanted:
    """How a space is to be searched: as the options of `autoprune search`, and the job's priority."""

    priority: int = 0
    trials: int | None = None
    timeout: float | None = None
    workers: int | None = None
    extra: tuple[str, ...] = ()


def submit_space(space: Space, wanted: Wanted, *, home: Path) -> Job:
    """Adds a search to the queue of a home folder; the working directory is where it will run.

    Raises:
        StudyError: A search of that name waits or runs already or belongs to other settings, or the home folder cannot
            be written.
    """
    make_home(home)
    storage = studies.open_storage(storage_path(home))
    # A checkpoint counts by its bytes, and a latency table is measured: the search itself compares them.
    unknown = ("latency_table", *(("checkpoint",) if space.checkpoint is not None else ()))
    studies.check_settings(storage, space.name, space.fingerprint_sections(), unknown=unknown)
    request = Request(
        name=space.name,
        space=space.model_dump(mode="json", by_alias=True),
        directory=os.getcwd(),
        priority=wanted.priority,
        trials=wanted.trials,
        timeout=wanted.timeout,
        workers=wanted.workers,
        extra=wanted.extra,
    )
    return Queue(storage).submit(request, now=time.time())


def cancel_search(name: str, *, home: Path) -> str:
    """Ends the job of a search, and returns a sentence that says what becomes of it.

    Raises:
        StudyError: There is no such job, or it has ended.
    """
    queue = Queue(open_existing(home))
    job = queue.find(name)
    if job.cancelled:
        return f"{name}: cancelled already"
    queue.ask_to_cancel(job)
    if job.state == studies.QUEUED:
        return f"{name}: cancelled; it had not begun" if job.started is None else f"{name}: cancelled"
    said = f"{name}: cancelling; what it has found stays, and `autoprune search` or `submit` goes on with it"
    return said if queue.held else f"{said}\nno service runs: `autoprune serve` will end the job"


def show_status(home: Path, name: str | None = None) -> tuple[str, dict[str, Any]]:
    """Returns the state of the searches, the queue and the service, as text and as JSON values.

    Raises:
        StudyError: There is nothing in the home folder, or no search of that name.
    """
    data = status_of(home, name)
    width, color = terminal()
    return report.render_status(data, console_width=width, color=color).rstrip("\n"), data


def status_of(home: Path, name: str | None = None) -> dict[str, Any]:
    """Returns the same as JSON values alone.

    Raises:
        StudyError: There is nothing in the home folder, or no search of that name.
    """
    storage = open_existing(home)
    queue = Queue(storage)
    jobs = [job for job in queue.jobs() if name is None or job.name == name]
    known = studies.search_names(storage)
    wanted = [found for found in known if name is None or found == name]
    if name is not None and not wanted and not jobs:
        raise StudyError(f"there is no search {name!r}{nearest(name, {*known, *(job.name for job in queue.jobs())})}")
    searches = [studies.search_state(storage, found, side=(CONTROLS, SCRATCH)).to_json() for found in wanted]
    return {
        "schema": 1,
        "home": str(home.resolve()),
        "service": read_service(home),
        "runner": queue.held,
        "searches": searches,
        "jobs": [job.to_json() for job in jobs],
        "rows": rows_of(searches, jobs),
    }


def rows_of(searches: Sequence[Mapping[str, Any]], jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Returns one row a search, with its latest job: those that run first, then those that wait in their order.

    A job's state holds where it has not ended as the search did: queued, failed, cancelled.
    """
    latest = {job.name: job for job in jobs}
    rows = {row["name"]: {**row, "reason": row["holder"] or "", "priority": None} for row in searches}
    for name, job in latest.items():
        row = rows.setdefault(name, {"name": name, "rung": None, "done": 0, "total": None, "best": None})
        row["priority"] = job.request.priority
        before, updated = row.get("state"), row.get("updated")
        later = updated is not None and job.ended is not None and datetime.datetime.fromisoformat(updated) > _zoned(job)
        if before == "running" or later:  # somebody ran it again by hand
            continue
        if job.state == studies.DONE:
            row["state"] = "stopped" if job.reason else "finished"
        else:
            row["state"] = job.state
        doing = "recording" if before == "finished" else "preparing"
        row["reason"] = job.reason or (doing if job.state == studies.RUNNING else "")
    order = [studies.RUNNING, studies.QUEUED]

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        state, job = row["state"], latest.get(row["name"])
        first = order.index(state) if state in order else len(order)
        return (first, job.place if job is not None and state == studies.QUEUED else (0, 0.0, 0))

    return sorted(rows.values(), key=place)


def _zoned(job: Job) -> datetime.datetime:
    assert job.ended is not None
    return job.ended.astimezone()


def log_lines(name: str, *, home: Path, follow: bool, as_json: bool) -> Iterator[str]:
    """Yields the log of a search line by line; with `follow` until the search and its job have ended.

    Raises:
        StudyError: There is no such search or job, or it has no log yet.
    """
    lines: Iterator[str]
    if follow:
        if not log.log_path(home, name).is_file():
            status_of(home, name)
        lines = log.follow_log(home, name, over=lambda: _over(name, home))
    else:
        lines = iter(log.read_log(home, name))
    for line in lines:
        yield line if as_json else log.rendered(log.entry_of(line))


def _over(name: str, home: Path) -> bool:
    """Whether nobody runs a search and no job of it waits."""
    storage = open_existing(home)
    jobs = [job for job in Queue(storage).jobs() if job.name == name]
    if jobs and jobs[-1].state in studies.UNFINISHED:
        return False
    return studies.search_holder(storage, name) is None
