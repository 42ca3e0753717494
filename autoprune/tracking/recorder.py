"""The recorder: a queue between a search and the tracker, so that a store that is away delays records and nothing else.

Decides when recording is tried again and when a single record is set aside. Works in a thread of its own: opening the
store takes seconds that an evaluation can use. Must not know what is recorded: a job is a function of the tracker.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from autoprune.errors import TrackingError
from autoprune.tracking.client import Tracker
from autoprune.tracking.records import TrialRecord

Job = Callable[[Tracker], object]
_TRIES = 3


@dataclass(frozen=True, slots=True)
class Refused:
    """A job that a reachable store would not take, and why."""

    what: str
    reason: str


class Recorder:
    """Runs jobs against a tracker, in order, and keeps those that cannot be done yet.

    A store that is away is tried again every `interval` seconds. A job that fails three times although the store
    answers is set aside in `refused`, so that one bad record does not hold up all others. Any error but
    `TrackingError` is a bug: it is raised by the next call of `put` or `drain`.
    """

    def __init__(
        self, connect: Callable[[], Tracker], *, interval: float = 30.0, say: Callable[[str], None] | None = None
    ) -> None:
        """Starts the thread.

        Args:
            connect: Makes the tracker; called again until it succeeds.
            interval: Seconds between two attempts at a store that is away.
            say: Told once, in plain words, that the store is away, that it is back, and of a refused record. It is
                called from the recorder's thread.
        """
        self._connect = connect
        self._interval = interval
        self._say = say or (lambda _text: None)
        self._jobs: deque[tuple[str, Job]] = deque()
        self._changed = threading.Condition()
        self._refused: list[Refused] = []
        self._bug: BaseException | None = None
        self._away = False
        self._hurry = False
        self._closed = False
        self._tries = 0
        self._tracker: Tracker | None = None
        self._thread = threading.Thread(target=self._work, name="autoprune-recorder", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """How many jobs are not done yet."""
        with self._changed:
            return len(self._jobs)

    @property
    def refused(self) -> tuple[Refused, ...]:
        """The jobs that were set aside."""
        with self._changed:
            return tuple(self._refused)

    @property
    def away(self) -> bool:
        """Whether the last attempt found the store out of reach."""
        with self._changed:
            return self._away

    def put(self, job: Job, *, what: str) -> None:
        """Queues a job; returns at once.

        Args:
            job: Called with the tracker; called again after a `TrackingError`, so it must be one that may be repeated.
            what: Its name in messages.

        Raises:
            RuntimeError: The recorder is closed.
        """
        with self._changed:
            self._raise_bug()
            if self._closed:
                raise RuntimeError("the recorder is closed")
            self._jobs.append((what, job))
            self._changed.notify_all()

    def record_trial(self, record: TrialRecord, *, done: Callable[[str], None] | None = None) -> None:
        """Queues a trial; `done` is told its run's id, from the recorder's thread.

        Raises:
            RuntimeError: The recorder is closed.
        """

        def job(tracker: Tracker) -> None:
            run_id = tracker.record_trial(record)
            if done is not None:
                done(run_id)

        self.put(job, what=f"trial {record.key}")

    def drain(self, timeout: float) -> int:
        """Waits until everything is recorded, the store turns out to be away, or `timeout` seconds have passed.

        A store that was away is tried once more, at once.

        Returns:
            How many jobs are left.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            if self._away:
                self._hurry = True
                self._changed.notify_all()
            while self._jobs and not self._bug and (left := deadline - time.monotonic()) > 0:
                if self._away and not self._hurry:
                    break
                self._changed.wait(left)
            self._raise_bug()
            return len(self._jobs)

    def close(self, timeout: float = 0.0) -> int:
        """Drains for up to `timeout` seconds, ends the thread and returns how many jobs were left undone."""
        left = self.drain(timeout)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=1.0)
        return left

    def _raise_bug(self) -> None:
        if self._bug is not None:
            raise self._bug

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                what, job = self._jobs[0]
            try:
                if self._tracker is None:
                    self._tracker = self._connect()
                job(self._tracker)
            except TrackingError as error:
                self._failed(what, error)
            except BaseException as error:  # a bug: it is handed to the caller's thread
                with self._changed:
                    self._bug = error
                    self._changed.notify_all()
                return
            else:
                self._done()

    def _done(self) -> None:
        with self._changed:
            was_away, self._away, self._hurry, self._tries = self._away, False, False, 0
            self._jobs.popleft()
            self._changed.notify_all()
        if was_away:
            self._say("MLflow is back; what was waiting is being recorded")

    def _failed(self, what: str, error: TrackingError) -> None:
        if self._reachable():
            with self._changed:
                self._tries += 1
                if self._tries < _TRIES:
                    return
                self._tries = 0
                self._jobs.popleft()
                self._refused.append(Refused(what, str(error)))
                self._changed.notify_all()
            self._say(f"MLflow refused {what}: {error}")
            return
        with self._changed:
            first, self._away, self._hurry = not self._away, True, False
            self._changed.notify_all()
        if first:
            self._say(f"MLflow is away; the search goes on and records follow later ({error})")
        with self._changed:
            self._changed.wait_for(lambda: self._hurry or self._closed, self._interval)

    def _reachable(self) -> bool:
        if self._tracker is None:
            return False
        try:
            self._tracker.ping()
        except TrackingError:
            return False
        return True
