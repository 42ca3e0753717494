"""Processes that a service starts and ends: each leads a group of its own, and nothing of the group is left behind.

Decides how a child is started, asked to end, and cleared away. Knows nothing of what it does. A child is started from
the main thread: the kernel tells it of the death of the thread that started it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

TOKEN = "AUTOPRUNE_SERVICE"
"""Environment variable that marks what a service has started, down to grandchildren."""
_LAUNCHER = str(Path(__file__).with_name("launching.py"))


@dataclass(frozen=True)
class Command:
    """A program to start: in `directory`, with exactly the environment `env`, on the cores `cpus` (None: all)."""

    arguments: Sequence[str]
    env: Mapping[str, str]
    directory: Path
    cpus: Sequence[int] | None = None


class Child:
    """A running program."""

    def __init__(self, command: Command, output: IO[bytes] | int) -> None:
        """Starts the program; stdout and stderr go to `output`.

        Raises:
            OSError: The directory is missing.
        """
        cpus = "-" if command.cpus is None else ",".join(map(str, command.cpus))
        self._cleared = False
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", _LAUNCHER, str(os.getpid()), cpus, *command.arguments],
            cwd=command.directory,
            env=dict(command.env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Its process id, which is the id of its group too."""
        return self.process.pid

    def ended(self) -> int | None:
        """Returns its exit status (negative: the signal) and clears away what is left of its group; None: it runs."""
        status = self.process.poll()
        if status is not None:
            self._kill_group()
            self._cleared = True
        return status

    def ask(self) -> None:
        """Asks it to end."""
        with suppress(ProcessLookupError):
            self.process.terminate()

    def kill(self) -> None:
        """Ends it and its group at once."""
        self._kill_group()
        self.process.wait()
        self._cleared = True

    def _kill_group(self) -> None:
        if self._cleared:  # its number may belong to somebody else by now
            return
        with suppress(ProcessLookupError, PermissionError):  # macOS says EPERM of a group of zombies
            os.killpg(self.process.pid, signal.SIGKILL)


def end_all(children: Sequence[Child], *, patience: float, hurrying: Callable[[], bool] = lambda: False) -> None:
    """Asks children to end, waits for up to `patience` seconds or until `hurrying()`, and kills what is left."""
    for child in children:
        child.ask()
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and not hurrying() and any(child.ended() is None for child in children):
        time.sleep(0.05)
    for child in children:
        child.kill()


def kill_leftovers(token: str) -> list[int]:
    """Kills what a service that was killed left behind, told by its token; returns the process ids.

    Looks into /proc; where there is none (macOS) nothing is found.
    """
    mark = f"{TOKEN}={token}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        if int(entry.name) == os.getpid():
            continue
        try:
            marked = mark in (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or belongs to somebody else
            continue
        if marked:
            with suppress(ProcessLookupError):
                os.kill(int(entry.name), signal.SIGKILL)
                found.append(int(entry.name))
    return found
