"""The live line of a running search: one line a rung, on stderr.

Decides what is shown while a search runs, live on a terminal and sparingly in a file. Must not know the search: it is
told by plain calls.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from autoprune.objective import ACCURACY
from autoprune.pareto import Point, front_indices
from autoprune.report import units

_QUIET_SECONDS = 30.0


@dataclass
class _Rung:
    """What a line shows: `done` of `total` trials are measured. Another trial takes the place of a failed one."""

    name: str
    total: int
    before: int
    done: int
    started: float
    failed: int = 0
    best: float = -math.inf
    points: list[Point] = field(default_factory=list)

    def left(self, now: float) -> float | None:
        """Seconds that the rung still takes at the speed so far; trials of an earlier call tell nothing."""
        fresh = self.done - self.before
        return (now - self.started) / fresh * (self.total - self.done) if fresh > 0 else None


class Progress:
    """Shows how a search goes on; a context manager.

    On a terminal each rung is a line that moves. Elsewhere a rung writes a line when it starts and when it ends, and
    one about every 30 seconds in between.
    """

    def __init__(
        self,
        *,
        file: TextIO | None = None,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        """Makes the display; nothing is written yet.

        Args:
            file: Where it goes: stderr by default.
            live: Whether lines move; by default where `file` is a terminal.
            clock: Seconds, for the time left.
            on_note: Is told every sentence as well, for instance to log it.
        """
        self.objective = ACCURACY
        """What `val_accuracy` is: a search of another metric says so before its first rung."""
        self._console = Console(file=file or sys.stderr, soft_wrap=True, highlight=False)
        self._live = self._console.is_terminal if live is None else live
        self._clock = clock
        self._on_note = on_note
        self._said: set[str] = set()
        self._bars: Bars | None = None
        self._task: int | None = None
        self._rung: _Rung | None = None
        self._last = -math.inf

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def rung_started(self, name: str, *, total: int, done: int = 0) -> None:
        """Opens a rung's line: `done` of its `total` trials were finished by an earlier call."""
        now = self._clock()
        self._rung = _Rung(name, total, done, done, now)
        self._last = now
        if not self._live:
            had = f", {done} of them finished earlier" if done else ""
            self._console.print(f"{name}: {total} trials{had}", markup=False)
            return
        if self._bars is None:
            text = TextColumn("{task.fields[text]}", markup=False)
            self._bars = Bars(
                TextColumn("{task.description}", markup=False), BarColumn(24), text, console=self._console
            )
            self._bars.start()
        self._task = self._bars.add_task(_padded(name), total=max(total, 1), completed=done, text=self._text())

    def trial_finished(self, *, val_accuracy: float | None, cost: float | None, known: bool = False) -> None:
        """Counts a trial: as done where it was measured, as failed otherwise.

        Args:
            val_accuracy: A fraction of 1, or the value of an own metric; `None` for a trial that failed.
            cost: Its primary cost, in any unit that is the same for the whole rung; `None` for a trial that failed.
            known: Whether the trial was finished by an earlier call and is already counted in `done`.
        """
        rung = self._open()
        if val_accuracy is None or cost is None:
            rung.failed += 1
        else:
            rung.best = max(rung.best, val_accuracy)
            rung.points.append((1.0 - val_accuracy, cost))
            rung.done += 0 if known else 1
        self._show()

    def rung_finished(self) -> None:
        """Closes the rung's line and leaves its result standing."""
        rung = self._open()
        spent = units.seconds(self._clock() - rung.started)
        text = f"{self._text(final=True)}, {spent}"
        if self._bars is not None and self._task is not None:
            self._bars.update(self._bars.tasks[self._task].id, completed=max(rung.total, 1), text=text)
            self._bars.refresh()
        else:
            self._console.print(f"{rung.name}: finished: {text}", markup=False)
        self._rung = None

    def note(self, text: str, *, passed_on: bool = True) -> None:
        """Writes a sentence above the live line; with `passed_on` whoever asked for sentences is told as well."""
        console = self._bars.console if self._bars is not None else self._console
        console.print(text, markup=False)
        if passed_on and self._on_note is not None:
            self._on_note(text)

    def note_once(self, texts: Iterable[str]) -> None:
        """Writes those of the sentences that were not written by this method before."""
        for text in texts:
            if text not in self._said:
                self._said.add(text)
                self.note(text)

    def close(self) -> None:
        """Stops the live line; safe to call twice."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        self._rung = None

    def _open(self) -> _Rung:
        if self._rung is None:
            raise RuntimeError("no rung is running")
        return self._rung

    def _show(self) -> None:
        rung, now = self._open(), self._clock()
        if self._bars is not None and self._task is not None:
            self._bars.update(self._bars.tasks[self._task].id, completed=rung.done, text=self._text())
        elif now - self._last >= _QUIET_SECONDS:
            self._last = now
            self._console.print(f"{rung.name}: {self._text()}", markup=False)

    def _text(self, *, final: bool = False) -> str:
        rung = self._open()
        parts = [f"{rung.done}/{rung.total} trials"]
        if math.isfinite(rung.best):
            front = len(front_indices(rung.points))
            own = self.objective
            parts += [f"best {own.label('val')} {own.text(rung.best)}{own.hint}", f"front {front}"]
        if rung.failed:
            parts.append(f"{rung.failed} failed")
        left = rung.left(self._clock())
        if not final and left is not None and rung.done < rung.total:
            parts.append(f"{units.seconds(left)} left")
        return ", ".join(parts)


def _padded(name: str) -> str:
    return f"{name:<8}"
