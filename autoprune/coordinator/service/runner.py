"""Runs the queue: which job gets a slot, and what becomes of one whose search ended, was killed, or is to make room.

Decides fairness (priority, then who has waited longest; a search that has had its slice makes room and goes on later),
what is tried again, and how the cores and GPUs are divided. A search is a process, `autoprune search` on the stored
space, so that one that dies takes nobody along. Must not know how a search works: it resumes by itself.
"""

from __future__ import annotations

import errno
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from autoprune.coordinator.running.log import entry_of, read_log
from autoprune.coordinator.service.children import Child, Command, end_all
from autoprune.errors import StudyError
from autoprune.files import write_whole
from autoprune.redaction import hide_secrets
from autoprune.space.section import NAME_PATTERN
from autoprune.studies import CANCELLED, DONE, FAILED, QUEUED, RUNNING, Job, Queue

ATTEMPTS = 5
"""How often a search is begun that each time is killed before it has finished another trial."""
SLICE_SECONDS = 1800.0
_AGAIN = frozenset({3, 130, 143})
"""Exit statuses after which a search is begun again: a database that is away, and an end that somebody asked for."""
_FIRST_WAIT = 2.0
_MOST_WAIT = 300.0
_NOTE_SECONDS = 30.0
_PATIENCE = 30.0
_MOST_REASON = 500


@dataclass(frozen=True)
class Slot:
    """The share of the machine that one search gets: cores (None: all), and GPUs as CUDA_VISIBLE_DEVICES names them."""

    cpus: tuple[int, ...] | None = None
    gpus: str | None = None


def slots_of(count: int, *, cores: Sequence[int], gpus: str | None) -> tuple[Slot, ...]:
    """Divides the machine into `count` slots.

    Two searches that each use every core run many times slower than two that have half of them each, so cores are
    dealt out; where there are fewer than slots, several slots share one. GPUs are dealt out where
    CUDA_VISIBLE_DEVICES, `gpus`, names them.
    """
    if count == 1:
        return (Slot(),)
    names = [name for name in (gpus or "").split(",") if name]
    return tuple(
        Slot(
            cpus=tuple(cores[i::count]) or (cores[i % len(cores)],),
            gpus=(",".join(names[i::count]) or names[i % len(names)]) if names else None,
        )
        for i in range(count)
    )


class Process(Protocol):
    """A search that runs."""

    def ended(self) -> int | None:
        """Returns its exit status, None where it runs."""

    def ask(self) -> None:
        """Asks it to end."""


class Searches(Protocol):
    """What is known of the searches themselves."""

    def finished(self, name: str) -> int:
        """Returns how many trials a search has finished."""

    def holder(self, name: str) -> str | None:
        """Returns who runs a search, None where nobody does."""


class Starter(Protocol):
    """Starts searches as processes."""

    def start(self, job: Job, slot: Slot, *, timeout: float | None) -> Process:
        """Starts a job's search.

        Raises:
            OSError: Its directory is gone, or its files cannot be written.
        """

    def end_all(self, processes: Sequence[Process]) -> None:
        """Asks processes to end and waits until they have."""

    def reason(self, job: Job) -> str:
        """Returns the last words of a job's search."""


@dataclass
class _Active:
    job: Job
    process: Process
    slot: Slot
    began: float
    noted: float
    asked: str | None = None


class Runner:
    """Runs the jobs of a queue that it holds."""

    def __init__(
        self,
        queue: Queue,
        searches: Searches,
        starter: Starter,
        *,
        slots: Sequence[Slot],
        slice_seconds: float = SLICE_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._queue = queue
        self._searches = searches
        self._starter = starter
        self._free = list(slots)
        self._slice = slice_seconds
        self._clock = clock
        self._active: dict[int, _Active] = {}
        self._not_before: dict[int, float] = {}

    def adopt(self) -> None:
        """Lets jobs wait again that a runner which is gone had begun."""
        for job in self._queue.jobs():
            if job.state == RUNNING:
                if job.cancelled:
                    self._queue.end(job, CANCELLED)
                else:
                    self._again(job, "the service ended")

    def step(self) -> None:
        """Does what is to be done now; called about once a second."""
        jobs = {job.number: job for job in self._queue.jobs()}
        now = self._clock()
        for number in list(self._active):
            self._look_after(jobs[number], now)
        for job in jobs.values():
            if job.state == CANCELLED and job.ended is None and job.number not in self._active:
                self._queue.end(job, CANCELLED)
        if not self._free and all(now - active.began < self._slice for active in self._active.values()):
            return
        waiting = self._waiting(jobs.values(), now)
        while self._free and waiting:
            self._begin(waiting.pop(0), now)
        if waiting:
            self._make_room(waiting, now)

    def stop(self) -> None:
        """Ends every search and lets its job wait, first in its line, for the next runner."""
        self._starter.end_all([active.process for active in self._active.values()])
        now = self._clock()
        for active in list(self._active.values()):
            job = self._queue.get(active.job.number)
            self._note(job, active, now)
            self._release(active)
            if active.process.ended() == 0:
                self._queue.end(job, DONE, self._starter.reason(job))
            elif job.cancelled:
                self._queue.end(job, CANCELLED)
            else:
                self._queue.note(job, attempts=max(0, job.attempts - 1))
                self._queue.put_back(job, "the service ended")

    # --- jobs that run ---

    def _look_after(self, job: Job, now: float) -> None:
        active = self._active[job.number]
        status = active.process.ended()
        if status is not None:
            self._note(job, active, now)
            self._release(active)
            self._settle(self._queue.get(job.number), active, status, now)
        elif job.cancelling and active.asked != CANCELLED:
            active.asked = CANCELLED
            active.process.ask()
        elif now - active.noted >= _NOTE_SECONDS:
            self._note(job, active, now)

    def _note(self, job: Job, active: _Active, now: float) -> None:
        active.noted = now
        self._queue.note(job, spent=active.job.spent + now - active.began)

    def _release(self, active: _Active) -> None:
        del self._active[active.job.number]
        self._free.append(active.slot)

    def _settle(self, job: Job, active: _Active, status: int, now: float) -> None:
        if status == 0:
            self._queue.end(job, DONE, self._starter.reason(job))
        elif job.cancelled:
            self._queue.end(job, CANCELLED)
        elif active.asked == QUEUED:
            self._queue.note(job, attempts=0)
            self._queue.put_back(job, "made room for others", turn=now)
        elif status < 0 or status in _AGAIN:
            self._again(job, how_it_ended(status))
        else:
            self._queue.end(job, FAILED, self._starter.reason(job) or how_it_ended(status))

    def _again(self, job: Job, reason: str) -> None:
        """Lets a job wait that was ended from outside; one that never gets on has failed."""
        attempts = job.attempts
        if self._searches.finished(job.name) > job.finished:
            attempts = 0
            self._queue.note(job, attempts=0)
        if attempts >= ATTEMPTS:
            self._queue.end(job, FAILED, f"{reason}, {attempts} times without finishing another trial")
            return
        if attempts > 1:  # once is nothing: the whole machine may have gone down, and what ran goes on first
            self._not_before[job.number] = self._clock() + min(_FIRST_WAIT * 2 ** (attempts - 1), _MOST_WAIT)
        self._queue.put_back(job, reason)

    # --- jobs that wait ---

    def _waiting(self, jobs: Iterable[Job], now: float) -> list[Job]:
        """Returns the jobs that could begin now, in their order."""
        names = {active.job.name for active in self._active.values()}
        waiting = []
        for job in sorted((job for job in jobs if job.state == QUEUED), key=lambda job: job.place):
            if job.name in names or now < self._not_before.get(job.number, 0.0):
                continue
            holder = self._searches.holder(job.name)
            reason = f"{holder} runs it" if holder else ""
            if holder and job.reason != reason:
                self._queue.note(job, reason=reason)
            if not holder:
                waiting.append(job)
        return waiting

    def _begin(self, job: Job, now: float) -> None:
        timeout = job.request.timeout
        left = None if timeout is None else timeout - job.spent
        if left is not None and left <= 0:
            self._queue.end(job, DONE, "the time limit ended the search")
            return
        slot = self._free.pop(0)
        self._queue.begin(job, finished=self._searches.finished(job.name))
        try:
            process = self._starter.start(job, slot, timeout=left)
        except OSError as error:
            self._free.append(slot)
            self._queue.end(job, FAILED, f"cannot be begun: {error.filename or ''}: {error.strerror or error}")
            return
        self._active[job.number] = _Active(job, process, slot, now, now)

    def _make_room(self, waiting: Sequence[Job], now: float) -> None:
        """Asks searches that have had their slice to end where others of no lower priority wait."""
        asked = sum(active.asked == QUEUED for active in self._active.values())
        for active in sorted(self._active.values(), key=lambda active: active.began):
            rivals = sum(job.request.priority >= active.job.request.priority for job in waiting)
            if active.asked is None and now - active.began >= self._slice and asked < rivals:
                active.asked = QUEUED
                active.process.ask()
                asked += 1


def how_it_ended(status: int) -> str:
    """Returns an exit status in words."""
    if status >= 0:
        return f"the search ended with status {status}"
    try:
        return f"the search was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"the search was killed by signal {-status}"


@dataclass(frozen=True)
class SearchProcesses:
    """Starts `autoprune search` with the environment `env` for the searches of `home`."""

    home: Path
    env: Mapping[str, str]

    def start(self, job: Job, slot: Slot, *, timeout: float | None) -> Child:
        """Starts a job's search; see `Starter`.

        Raises:
            OSError: As there; or the job's name, which comes from the database, would leave the home folder.
        """
        request = job.request
        if not re.fullmatch(NAME_PATTERN, request.name):
            raise PermissionError(errno.EPERM, "it is no name of a search", request.name)
        space = self.home / "jobs" / f"{job.number}-{request.name}.json"
        write_whole(space, json.dumps(request.space, indent=1) + "\n")
        options = {"--trials": request.trials, "--workers": request.workers, "--timeout": timeout}
        command = [sys.executable, "-P", "-m", "autoprune", "search", str(space), "--home", str(self.home)]
        command += [text for name, value in options.items() if value is not None for text in (name, str(value))]
        env = {"OMP_WAIT_POLICY": "PASSIVE", **self.env}
        if slot.gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = slot.gpus
        output = self.output(job)
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("wb") as file:
            return Child(Command([*command, *request.extra], env, Path(request.directory), slot.cpus), file)

    def end_all(self, processes: Sequence[Process]) -> None:
        """Asks processes to end and waits until they have."""
        end_all([process for process in processes if isinstance(process, Child)], patience=_PATIENCE)

    def reason(self, job: Job) -> str:
        """Returns why a search failed, as it said last; of one that its time limit ended, that."""
        try:
            last = entry_of(read_log(self.home, job.name)[-1])
        except (StudyError, IndexError):
            last = {}
        if last.get("event") == "search_finished":
            return "" if last.get("complete") else str(last["message"])
        try:
            text = self.output(job).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        _, found, said = text.rpartition("autoprune: ")
        lines = (said if found else text).strip().splitlines()
        return hide_secrets("\n".join(lines if found else lines[-1:])[:_MOST_REASON])

    def output(self, job: Job) -> Path:
        """Returns the file with what a job's search wrote to the terminal when it last ran."""
        return self.home / "logs" / f"{job.name}.out"
