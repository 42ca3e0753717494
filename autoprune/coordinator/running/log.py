"""The log of a search: one JSON object a line, through the standard library's logging, in a file that stays small.

Decides which events are written and with which keys, and how they are read back. Must not know how a search is shown
on the terminal. Everything that the package says through `logging.getLogger("autoprune...")` while a search runs ends
up in its log too.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from autoprune.errors import StudyError
from autoprune.objective import ACCURACY
from autoprune.redaction import hide_secrets
from autoprune.studies import Event, RungStarted, TrialFinished

LOGGER = logging.getLogger("autoprune")
MOST_BYTES = 5_000_000
"""Size of a log file before it is put aside; about 20,000 trials."""
KEPT_FILES = 3
"""Files put aside, beside the one that is written."""
ENDS = frozenset({"search_finished", "search_stopped", "search_failed"})
"""Events that end a search's call."""

_FIELDS = "autoprune_fields"


def log_path(home: Path, search: str) -> Path:
    """Returns the file of a search's log."""
    return home / "logs" / f"{search}.jsonl"


class SearchLog:
    """Writes the log of one call of a search; a context manager.

    An error that leaves the block is logged as the end of the search. Passwords in addresses are hidden.
    """

    def __init__(self, home: Path, search: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Opens the log; what an earlier call wrote stays.

        Raises:
            StudyError: The file cannot be opened.
        """
        self.objective = ACCURACY
        self._clock = clock
        self._begun = clock()
        self._executor: str | None = None
        path = log_path(home, search)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _end_line(path)
            self._handler = _Handler(path, maxBytes=MOST_BYTES, backupCount=KEPT_FILES, encoding="utf-8")
        except OSError as error:
            raise StudyError(f"the log {path} cannot be written: {error.strerror or error}") from error
        self._handler.setFormatter(_JsonLines(search))

    def __enter__(self) -> SearchLog:
        self._level = LOGGER.level
        LOGGER.setLevel(min(LOGGER.level or logging.INFO, logging.INFO))
        LOGGER.addHandler(self._handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Exception):
                fields = {"error": type(error).__name__, "seconds": self._spent}
                self._write(f"failed: {error}", "search_failed", fields, level=logging.ERROR)
            elif error is not None:
                self._write("interrupted", "search_stopped", {"seconds": self._spent}, level=logging.WARNING)
        finally:
            LOGGER.removeHandler(self._handler)
            LOGGER.setLevel(self._level)
            self._handler.close()

    def note(self, text: str) -> None:
        """Logs a sentence that a person was told."""
        self._write(text, "note")

    def started(self, *, executor: str, workers: int, device: str, fingerprint: str) -> None:
        """Logs that the preparation is over and the ladder begins."""
        self._executor = executor
        text = f"begins on {device} with {workers} worker{'s' if workers > 1 else ''}"
        fields = {"executor": executor, "workers": workers, "device": device, "fingerprint": fingerprint}
        self._write(text, "search_started", fields)

    def told(self, event: Event) -> None:
        """Logs what the ladder tells."""
        if isinstance(event, RungStarted):
            text = f"{event.rung}: {event.done} of {event.total} trials are finished"
            self._write(text, "rung_started", {"rung": event.rung, "total": event.total, "done": event.done})
        elif isinstance(event, TrialFinished):
            self._trial(event)
        else:
            text = f"{event.rung}: finished, {event.done} trials, {event.failed} failed"
            self._write(text, "rung_finished", {"rung": event.rung, "done": event.done, "failed": event.failed})

    def finished(self, *, complete: bool, front: int, hypervolume: float) -> None:
        """Logs the end of a search that no error ended."""
        text = f"finished: {front} points on the front" if complete else "the time limit ended the search too early"
        fields = {"front": front, "hypervolume": hypervolume, "complete": complete, "seconds": self._spent}
        self._write(text, "search_finished", fields)

    def _trial(self, event: TrialFinished) -> None:
        trial = event.trial
        common = {"rung": event.rung, "trial": trial.number, "origin": trial.origin, "executor": self._executor}
        head = f"{event.rung} trial {trial.number}"
        if trial.result is None:
            fields = {"state": "fail", "reason": trial.reason, **common}
            self._write(f"{head} failed: {trial.reason}", "trial_finished", fields, level=logging.WARNING)
            return
        accuracy = trial.result.metrics.get("val_accuracy")
        again = f", the result of trial {trial.reused}" if trial.reused is not None else ""
        spent = sum(trial.result.seconds.values()) if trial.reused is None else None
        fields = {
            "state": "complete",
            "reused": trial.reused,
            "val_accuracy": accuracy,
            "costs": dict(trial.result.costs),
            "seconds": None if spent is None else round(spent, 3),
            **common,
        }
        own = self.objective
        name = "val_accuracy" if own.percent else own.label("val")
        text = f"{head}: finished{again}" if accuracy is None else f"{head}: {name} {own.plain(accuracy)}{again}"
        self._write(text, "trial_finished", fields)

    @property
    def _spent(self) -> float:
        return round(self._clock() - self._begun, 3)

    def _write(
        self, message: str, event: str, fields: Mapping[str, Any] | None = None, *, level: int = logging.INFO
    ) -> None:
        known = {name: value for name, value in (fields or {}).items() if value is not None}
        LOGGER.log(level, "%s", message, extra={_FIELDS: {"event": event, **known}})


def _end_line(path: Path) -> None:
    """Ends a line that a process which was killed left unfinished."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


class _JsonLines(logging.Formatter):
    """Formats a record as one JSON object: time, level, event, search, process id, message, then what is known."""

    def __init__(self, search: str) -> None:
        super().__init__()
        self._search = search

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, _FIELDS, {}))
        when = datetime.datetime.fromtimestamp(record.created).astimezone()
        line = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": fields.pop("event", record.name),
            "search": self._search,
            "pid": os.getpid(),
            "message": record.getMessage(),
            **fields,
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return hide_secrets(json.dumps(line, default=str, ensure_ascii=False))


class _Handler(RotatingFileHandler):
    """A full disk must not end a search through its log: the search's own storage will tell."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Drops a line that cannot be written to the disk; anything else that is wrong is a bug and is raised."""
        if not isinstance(sys.exception(), OSError):
            raise


def read_log(home: Path, search: str) -> list[str]:
    """Returns the lines of a search's log, the oldest first, those of files put aside included.

    Raises:
        StudyError: The search has no log.
    """
    path = log_path(home, search)
    with contextlib.ExitStack() as opened:
        files = _opened(path, opened)
        if not files:
            raise StudyError(f"the search {search!r} has no log in {path.parent}")
        texts = [file.read() for file in files]
    return [line for text in texts for line in _decoded(text).split("\n") if line]


def follow_log(home: Path, search: str, *, over: Callable[[], bool], pause: float = 0.5) -> Iterator[str]:
    """Yields the lines of a search's log and then those that are added, until `over` holds after an end was logged.

    A log that does not exist yet is waited for. Its file may be put aside meanwhile, more than once between two looks:
    no line is lost as long as the files put aside still hold it.
    """
    path = log_path(home, search)
    ended = False
    file: BinaryIO | None = None
    try:
        rest = b""
        while True:
            following = _after(path, file)
            # What was added before the file was put aside is read only now: nobody writes to it any more.
            chunk = file.read() if file is not None else b""
            *lines, rest = (rest + chunk).split(b"\n")
            if following is not None:
                lines.append(rest)  # torn, where it is anything: a full disk
                rest = b""
                if file is not None:
                    file.close()
                file = following
            for line in map(_decoded, filter(None, lines)):
                ended = is_end(line)
                yield line
            if following is not None or chunk:
                continue
            if ended and over():
                return
            time.sleep(pause)
    finally:
        if file is not None:
            file.close()


def _opened(path: Path, stack: contextlib.ExitStack) -> list[BinaryIO]:
    """Opens the files of a log, the oldest first; the stack closes them.

    They are opened from the newest on, the direction in which a file moves when it is put aside: one that moves
    meanwhile may be met twice, and then counts once, but is never missed.
    """
    found: list[BinaryIO] = []
    for place in (path, *(path.with_name(f"{path.name}.{number}") for number in range(1, KEPT_FILES + 1))):
        with contextlib.suppress(FileNotFoundError):
            file = stack.enter_context(place.open("rb"))
            if not any(_is_same(file, other) for other in found):
                found.append(file)
    return found[::-1]


def _after(path: Path, file: BinaryIO | None) -> BinaryIO | None:
    """Opens the file of a log that follows this one, or the oldest if this is none of them; None if it is the last."""
    with contextlib.ExitStack() as opened:
        files = _opened(path, opened)
        known = [file is not None and _is_same(file, other) for other in files]
        at = known.index(True) + 1 if True in known else 0
        return os.fdopen(os.dup(files[at].fileno()), "rb") if at < len(files) else None


def _is_same(one: BinaryIO, other: BinaryIO) -> bool:
    return os.path.samestat(os.fstat(one.fileno()), os.fstat(other.fileno()))


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", errors="replace")


def is_end(line: str) -> bool:
    """Whether a line of a log says that a call of the search ended."""
    return entry_of(line).get("event") in ENDS


def entry_of(line: str) -> dict[str, Any]:
    """Returns a line of a log as plain values; a line that a dying process left unfinished as its message alone."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return {"message": line}
    return found if isinstance(found, dict) else {"message": line}


def rendered(entry: Mapping[str, Any]) -> str:
    """Returns an entry as a line for people: time, level where it is not info, message, seconds."""
    when = str(entry.get("time", ""))[:19].replace("T", " ")
    level = str(entry.get("level", "info"))
    mark = "" if level == "info" else f"{level.upper()} "
    seconds = entry.get("seconds")
    spent = f" ({seconds:.1f} s)" if isinstance(seconds, (int, float)) else ""
    return f"{when:<19}  {mark}{entry.get('message', '')}{spent}"
