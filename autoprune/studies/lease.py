"""Sees to it that only one process runs a search at a time.

Decides who may run: whoever wrote its name into the study and is still alive. With ask and tell nobody else notices
that a coordinator was killed, and a second one would take the trials of the first for left behind.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy
from optuna.storages._rdb.models import StudyUserAttributeModel
from optuna.study import Study
from sqlalchemy.exc import IntegrityError

from autoprune.errors import LeaseError, StorageError
from autoprune.studies.retrying import LastingStorage, hurried

LEASE = "autoprune.lease"
VALID_SECONDS = 120.0
"""How long a process is believed without a sign; of one on this machine is also looked up whether it exists.

One that was stopped for longer (SIGSTOP, a suspended machine) may be replaced. It stores nothing more then, and where
nobody took its place it goes on: its lease is still the one that it wrote.
"""
_RENEW_SECONDS = 30.0
_ROW: Any = StudyUserAttributeModel.__table__


class _Cell(Protocol):
    """Holds the lease as text, None where there never was one."""

    def read(self) -> str | None:
        """Returns what it holds."""

    def swap(self, old: str | None, new: str) -> bool:
        """Puts `new` in the place of `old`; False: it holds something else."""

    def now(self) -> float:
        """Returns the time by the clock that all holders share, in seconds since 1970."""


@dataclass(frozen=True)
class _Row:
    """The study's attribute in a database, which the statement compares and sets at once.

    Optuna offers no such thing for a study: its own way reads first and writes then, and two processes that started
    within milliseconds of each other both got the lease.
    """

    storage: LastingStorage
    study_id: int

    def read(self) -> str | None:
        def read() -> str | None:
            with self.storage.engine.connect() as connection:
                return _text_in(connection, self.study_id)

        return self.storage.again(read)

    def swap(self, old: str | None, new: str) -> bool:
        mine = (_ROW.c.study_id == self.study_id) & (_ROW.c.key == LEASE)
        first = sqlalchemy.insert(_ROW).values(study_id=self.study_id, key=LEASE, value_json=new)
        later = sqlalchemy.update(_ROW).where(mine, _ROW.c.value_json == old).values(value_json=new)

        def swap() -> bool:
            try:
                with self.storage.engine.begin() as connection:
                    if connection.execute(first if old is None else later).rowcount == 1:
                        return True
            except IntegrityError:  # somebody else was first
                pass
            return self.read() == new  # it arrived before the connection broke

        return self.storage.again(swap)

    def now(self) -> float:
        if self.storage.engine.dialect.name != "postgresql":
            return time.time()
        clock = sqlalchemy.text("select extract(epoch from clock_timestamp())")

        def ask() -> float:
            with self.storage.engine.connect() as connection:
                return float(connection.execute(clock).scalar_one())

        return self.storage.again(ask)


@dataclass(frozen=True)
class _Memory:
    """The attribute of a study in memory, which only this process sees."""

    study: Study
    lock = threading.Lock()

    def read(self) -> str | None:
        attrs = self.study.user_attrs
        return json.dumps(attrs[LEASE]) if LEASE in attrs else None

    def swap(self, old: str | None, new: str) -> bool:
        with self.lock:
            if self.read() != old:
                return False
            self.study.set_user_attr(LEASE, json.loads(new))
            return True

    def now(self) -> float:
        return time.time()


@contextmanager
def hold(study: Study) -> Iterator[None]:
    """Holds the lease of a study, which a thread renews, and gives it back at the end.

    While it is held, every write to the storage that the study was opened with first sees, in its own transaction,
    that the lease is still this process's: one that was asleep for minutes and was taken for dead writes nothing more.

    Raises:
        LeaseError: Another process that is alive holds it, or a write came after another process had taken it over.
    """
    cell = _cell_of(study)
    lease = _Lease(cell, study.study_name)
    lease.take()
    thread = threading.Thread(target=lease.renew, name="autoprune-lease", daemon=True)
    thread.start()
    try:
        if isinstance(cell, _Row):
            with cell.storage.fenced(lambda connection: lease.check(_text_in(connection, cell.study_id, lock=True))):
                yield
        else:
            yield
    finally:
        lease.ended.set()
        with hurried(study):
            lease.give_back()
            thread.join()


def is_running(study: Study) -> bool:
    """Whether a process that is alive holds the lease of a study."""
    cell = _cell_of(study)
    holder = _holder(cell.read())
    return holder is not None and _alive(holder, cell)


class _Lease:
    """The lease as one process holds it."""

    def __init__(self, cell: _Cell, study_name: str) -> None:
        self.ended = threading.Event()
        self._cell = cell
        self._name = study_name
        self._lock = threading.Lock()
        self._text = ""
        pid = os.getpid()
        self._mine = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": pid, "start": _start_of(pid)}

    def take(self) -> None:
        old = self._cell.read()
        holder = _holder(old)
        if holder is not None and _alive(holder, self._cell):
            raise LeaseError(
                f"the study {self._name!r} is being run by process {holder['pid']} on {holder['host']};"
                " wait for it, or end it and search again"
            )
        text = self._written()
        if not self._cell.swap(old, text):
            raise LeaseError(f"another process has just begun to run the study {self._name!r}")
        self._text = text

    def renew(self) -> None:
        while not self.ended.wait(_RENEW_SECONDS):
            with self._lock:
                try:
                    text = self._written()
                    if not self._cell.swap(self._text, text):
                        return  # the next write finds out
                except StorageError:  # whoever writes next says so
                    continue
                self._text = text

    def check(self, stored: str | None) -> None:
        """Compares the lease as a transaction sees it.

        Raises:
            LeaseError: It is another process's.
        """
        holder = _holder(stored)
        if holder is None or holder["id"] != self._mine["id"]:
            who = f"process {holder['pid']} on {holder['host']}" if holder else "another process, which has ended,"
            raise LeaseError(
                f"{who} has taken over the study {self._name!r}: this process did not answer for"
                f" {VALID_SECONDS:.0f} s or more; it stops and has stored nothing since"
            )

    def give_back(self) -> None:
        with self._lock, suppress(StorageError):  # then it runs out, or the next one sees that we have ended
            self._cell.swap(self._text, json.dumps(None))

    def _written(self) -> str:
        return json.dumps({**self._mine, "until": self._cell.now() + VALID_SECONDS})


def _cell_of(study: Study) -> _Cell:
    backend = getattr(study._storage, "_backend", study._storage)
    return _Row(backend, study._study_id) if isinstance(backend, LastingStorage) else _Memory(study)


def _text_in(connection: Any, study_id: int, *, lock: bool = False) -> str | None:
    query = sqlalchemy.select(_ROW.c.value_json).where(_ROW.c.study_id == study_id, _ROW.c.key == LEASE)
    if lock:  # nobody takes it over before the transaction ends
        query = query.with_for_update(read=True)
    text: str | None = connection.execute(query).scalar_one_or_none()
    return text


def _holder(text: str | None) -> dict[str, Any] | None:
    holder: dict[str, Any] | None = None if text is None else json.loads(text)
    return holder


def _alive(holder: dict[str, Any], cell: _Cell) -> bool:
    if cell.now() >= holder["until"]:  # even where its process exists: it may be stopped, or hang
        return False
    if holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists and belongs to somebody else
        pass
    # In containers the same number soon belongs to another process.
    return bool(_start_of(holder["pid"]) == holder["start"])


def _start_of(pid: int) -> str | None:
    """Returns when a process began, in ticks since the machine did; None where the system does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
