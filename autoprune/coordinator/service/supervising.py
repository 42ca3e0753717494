"""Keeps the processes of a service running: starts them, asks how they are, and starts again what died or hangs.

Decides when a process is healthy, how long is waited before it is started again, and what others can read of it. Must
not know what the processes do; imports the standard library alone, so that there is little that can fail.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any

from autoprune.coordinator.service.children import Child, Command, end_all, kill_leftovers
from autoprune.coordinator.stored.service_state import LOCK, STATE, locked, read_service, service_folder
from autoprune.errors import StudyError
from autoprune.files import write_whole

STARTING, HEALTHY, FAILING, WAITING = "starting", "healthy", "failing", "waiting"
GRACE_SECONDS = 180.0
"""How long a process may take to answer for the first time; after each start that took longer twice as long."""
_MOST_GRACE = 1800.0
ILL_CHECKS = 4
"""So many failed checks in a row of a process that was healthy mean that it hangs."""
_CHECK_SECONDS = 5.0
_STEADY_SECONDS = 60.0
"""A process that was healthy for so long is started again at once when it dies."""
_MOST_WAIT = 60.0
_PAUSE_SECONDS = 0.5
_READ_SECONDS = 2.0
_LOCK_SECONDS = 2.0
"""How long the lock is waited for: `autoprune status` holds it for a moment."""
_MOST_OUTPUT = 2_000_000


@dataclass(frozen=True)
class Service:
    """A process to keep running.

    `check` returns None where it is well, else why not; it is called from a thread of its own. `patience` is how long
    it may take to end. `address` is where people find it.
    """

    name: str
    command: Command
    check: Callable[[], str | None]
    address: str | None = None
    patience: float = 5.0


def answers(url: str, *, seconds: float = _CHECK_SECONDS) -> Callable[[], str | None]:
    """Returns a check that a page of this machine answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def check() -> str | None:
        try:
            with opener.open(url, timeout=seconds):
                return None
        except urllib.error.HTTPError as error:
            return f"answers with status {error.code}"
        except OSError as error:  # refused, timed out
            return f"does not answer: {getattr(error, 'reason', None) or error}"

    return check


def beats(path: Path, *, seconds: float) -> Callable[[], str | None]:
    """Returns a check that a process has touched a file lately."""

    def check() -> str | None:
        try:
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            return "has not begun yet"
        return None if age < seconds else f"has done nothing for {age:.0f} s"

    return check


@dataclass
class _Kept:
    """A service with its process. `healthy` is when it came to be so; `quick` counts deaths without a steady time."""

    service: Service
    state: str = WAITING
    child: Child | None = None
    output: _Output | None = None
    began: float = 0.0
    healthy: float | None = None
    ill: int = 0
    quick: int = 0
    slow: int = 0
    """Starts in a row that were given up because nothing answered in time: a machine may be that busy."""
    restarts: int = -1
    next_start: float = 0.0
    reason: str = ""
    answer: tuple[int, str | None] | None = None
    """What the last check said, with the process id that it was about."""

    def to_json(self) -> dict[str, Any]:
        """Returns what others read."""
        return {
            "name": self.service.name,
            "state": self.state,
            "address": self.service.address,
            "pid": self.child.pid if self.child is not None else None,
            "restarts": max(0, self.restarts),
            "reason": self.reason,
        }


class Supervisor:
    """Keeps services running until it is told to stop."""

    def __init__(
        self,
        services: Sequence[Service],
        folder: Path,
        *,
        token: str,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kept = [_Kept(service) for service in services]
        self._folder = folder
        self._token = token
        self._say = say
        self._clock = clock
        self._written = ""
        self._over = threading.Event()
        self._checker = threading.Thread(target=self._check, name="health-checks", daemon=True)

    def run(self, stopping: Callable[[], bool], *, hurrying: Callable[[], bool], pause: float = 0.25) -> None:
        """Keeps everything running until `stopping()`; then ends it, at once when `hurrying()`."""
        self._checker.start()
        try:
            while not stopping():
                self.step()
                time.sleep(pause)
        finally:
            self._over.set()
            self._end(hurrying)

    def step(self) -> None:
        """Does what is to be done now."""
        for kept in self._kept:
            if kept.child is None:
                if self._clock() >= kept.next_start:
                    self._start(kept)
                continue
            status = kept.child.ended()
            if status is not None:
                self._died(kept, status)
            else:
                self._judge(kept)
        self._write()

    def _start(self, kept: _Kept) -> None:
        service = kept.service
        kept.restarts += 1
        kept.began, kept.healthy, kept.ill, kept.answer = self._clock(), None, 0, None
        kept.state = STARTING
        kept.output = _Output(self._folder / f"{service.name}.out")
        kept.child = Child(service.command, kept.output.write_end)
        kept.output.begin()

    def _died(self, kept: _Kept, status: int) -> None:
        last = kept.output.whole() if kept.output is not None else ""
        how = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
        self._again(kept, f"{how}: {last}" if last else how)

    def _again(self, kept: _Kept, reason: str) -> None:
        steady = kept.healthy is not None and self._clock() - kept.healthy >= _STEADY_SECONDS
        kept.quick = 0 if steady else kept.quick + 1
        wait = min(2.0 ** (kept.quick - 1), _MOST_WAIT) if kept.quick else 0.0
        kept.child, kept.state, kept.reason = None, WAITING, reason
        kept.next_start = self._clock() + wait
        self._say(f"{kept.service.name}: {reason}; it is started again in {wait:.0f} s")

    def _judge(self, kept: _Kept) -> None:
        answer, kept.answer = kept.answer, None
        if answer is None or kept.child is None or answer[0] != kept.child.pid:
            return
        if answer[1] is None:
            if kept.state != HEALTHY:
                where = f" at {kept.service.address}" if kept.service.address else ""
                self._say(f"{kept.service.name}: healthy{where}")
            kept.healthy = self._clock() if kept.healthy is None else kept.healthy
            kept.state, kept.reason, kept.ill, kept.slow = HEALTHY, "", 0, 0
            return
        kept.ill += 1
        grace = min(GRACE_SECONDS * 2.0**kept.slow, _MOST_GRACE)
        late = kept.healthy is None and self._clock() - kept.began >= grace
        if kept.healthy is not None:
            kept.state, kept.reason = FAILING, answer[1]
        if late or (kept.healthy is not None and kept.ill >= ILL_CHECKS):
            kept.slow += late
            kept.child.kill()
            self._again(kept, answer[1])

    def _check(self) -> None:
        """Asks every process how it is, again and again."""
        while not self._over.wait(_PAUSE_SECONDS):
            for kept in self._kept:
                child = kept.child
                if child is not None and kept.answer is None:
                    kept.answer = (child.pid, kept.service.check())
            if all(kept.state == HEALTHY for kept in self._kept):
                self._over.wait(_CHECK_SECONDS)

    def _end(self, hurrying: Callable[[], bool]) -> None:
        """Ends the services, those of one patience together: the most patient first, as the others serve it."""
        for patience in sorted({kept.service.patience for kept in self._kept}, reverse=True):
            ending = [kept for kept in self._kept if kept.service.patience == patience and kept.child is not None]
            for kept in ending:
                self._say(f"{kept.service.name}: ending")
            children = [kept.child for kept in ending if kept.child is not None]
            end_all(children, patience=patience, hurrying=hurrying)
            for kept in ending:
                kept.child, kept.state = None, WAITING
        (self._folder / STATE).unlink(missing_ok=True)

    def _write(self) -> None:
        """Writes what others read, whole, where it has changed."""
        services = [kept.to_json() for kept in self._kept]
        text = json.dumps(_document(self._token, services), indent=1) + "\n"
        if text != self._written:
            write_whole(self._folder / STATE, text)
            self._written = text


class _Output:
    """What a process prints, in a file that stays small; `last` is its last line."""

    def __init__(self, path: Path) -> None:
        self.last = ""
        self._thread: threading.Thread | None = None
        self._read, write = os.pipe()
        self.write_end: IO[bytes] = os.fdopen(write, "wb")
        self._handler = _Lines(path, maxBytes=_MOST_OUTPUT, backupCount=1, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(message)s"))

    def begin(self) -> None:
        """Reads on from now on; called when the process has the other end."""
        self.write_end.close()
        self._thread = threading.Thread(target=self._pump, name="output", daemon=True)
        self._thread.start()

    def whole(self) -> str:
        """Returns the last line of a process that has ended; waits a moment for what is not read yet."""
        if self._thread is not None:
            self._thread.join(_READ_SECONDS)
        return self.last

    def _pump(self) -> None:
        with os.fdopen(self._read, "rb") as pipe:
            for raw in pipe:
                line = raw.decode("utf-8", errors="replace").rstrip()
                self.last = line or self.last
                self._handler.handle(logging.LogRecord("service", logging.INFO, "", 0, line, None, None))
        self._handler.close()


class _Lines(RotatingFileHandler):
    """A full disk must not stop the reading: the process would block."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Drops a line that cannot be written."""


@dataclass(frozen=True)
class Held:
    """A home folder that this process serves. `token` marks what it starts; `left` tells what was left behind."""

    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    left: tuple[int, ...] = ()


@contextmanager
def serving(home: Path) -> Iterator[Held]:
    """Makes this process the one service of a home folder, and clears away what a killed one left.

    Raises:
        StudyError: Another service runs, or the folder cannot be written.
    """
    folder = service_folder(home)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    except OSError as error:
        raise StudyError(f"the folder {folder} cannot be written: {error.strerror or error}") from error
    with lock:
        if not locked(lock, patience=_LOCK_SECONDS):
            other = read_service(home) or {"pid": "?", "host": "?"}
            raise StudyError(f"a service runs on {home} already: process {other['pid']} on {other['host']}")
        state = folder / STATE
        left: list[int] = []
        if state.is_file():
            left = kill_leftovers(json.loads(state.read_text())["token"])
        held = Held(left=tuple(left))
        write_whole(state, json.dumps(_document(held.token, [])) + "\n")
        yield held


def _document(token: str, services: list[dict[str, Any]]) -> dict[str, Any]:
    return {"schema": 1, "token": token, "pid": os.getpid(), "host": socket.gethostname(), "services": services}
