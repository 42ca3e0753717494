"""The service of a home folder, as the file of its state tells.

Decides how a reader finds out whether one runs.
"""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path
from typing import IO, Any

# --- what others read ---

STATE = "state.json"
LOCK = "lock"


def service_folder(home: Path) -> Path:
    """Returns the folder of a service's own files."""
    return home / "service"


def read_service(home: Path) -> dict[str, Any] | None:
    """Returns the service of a home folder: its process, and how each of its services is; None where none runs."""
    folder = service_folder(home)
    try:
        with (folder / LOCK).open() as lock:
            if locked(lock, patience=0.0, shared=True):
                return None
        found: dict[str, Any] = json.loads((folder / STATE).read_text())
    except OSError:  # there never was one, it has just ended, or it belongs to somebody else
        return None
    return {key: value for key, value in found.items() if key != "token"}


def locked(file: IO[str], *, patience: float, shared: bool = False) -> bool:
    """Takes the lock of a file, which the kernel gives back when this process ends; returns whether it could."""
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        else:
            return True
