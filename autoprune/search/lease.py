"""Sees to it that only one process runs a search at a time.

Decides who may run: whoever wrote its name into the study and is still alive. With ask and tell nobody else notices
that a coordinator was killed, and a second one would take the trials of the first for left behind.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.study import Study

from autoprune.errors import StudyError

LEASE = "autoprune.lease"
VALID_SECONDS = 120.0
"""How long the word of a process on another machine is believed; one on this machine is looked up."""
_RENEW_SECONDS = 30.0


@contextmanager
def hold(study: Study) -> Iterator[None]:
    """Holds the lease of a study, which a thread renews, and gives it back at the end.

    Two processes that start within milliseconds of each other may both get it: neither SQLite nor PostgreSQL offers a
    compare-and-set through Optuna's storage.

    Raises:
        StudyError: Another process that is alive holds it.
    """
    holder = study.user_attrs.get(LEASE)
    if holder and _alive(holder):
        raise StudyError(
            f"the study {study.study_name!r} is being run by process {holder['pid']} on {holder['host']};"
            " wait for it, or end it and search again"
        )
    mine = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "start": _start_of(os.getpid())}
    _write(study, mine)
    if study.user_attrs[LEASE]["id"] != mine["id"]:
        raise StudyError(f"another process has just begun to run the study {study.study_name!r}")
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(study, mine, ended), name="autoprune-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        study.set_user_attr(LEASE, None)


def is_running(study: Study) -> bool:
    """Whether a process that is alive holds the lease of a study."""
    holder = study.user_attrs.get(LEASE)
    return holder is not None and _alive(holder)


def _renew(study: Study, mine: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(_RENEW_SECONDS):
        _write(study, mine)


def _write(study: Study, mine: dict[str, Any]) -> None:
    study.set_user_attr(LEASE, {**mine, "until": time.time() + VALID_SECONDS})


def _alive(holder: dict[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        return bool(time.time() < holder["until"])
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
