"""What every executor promises, the limits of an evaluation, and the executor that runs in the caller's thread.

Decides how an evaluation tells that it makes progress, and how one that runs for too long is ended from within. Must
not know how processes are started or watched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from autoprune.errors import AutopruneError, TrialError

Beat = Callable[[], None]
"""An evaluation calls it whenever it has made progress; it may raise `TrialError` where the time limit is over."""
Factory = Callable[[Beat], Callable[..., Any]]
"""Makes the function that evaluates, once in each process."""
INTERVAL = 1.0
"""Seconds between two signs of progress that are passed on."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long one task may run, and how long it may go without a sign of progress; both in seconds, None: for ever.

    A task over `timeout` fails at once. One that is silent for longer than `silence` hangs: its process is killed and
    the task is given to a new one once.
    """

    timeout: float | None = None
    silence: float | None = None

    def __post_init__(self) -> None:
        for name in ("timeout", "silence"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")


class Executor(Protocol):
    """Runs one function on many arguments.

    `submit` returns at once or, where nothing runs beside the caller, when the result is there. It may be called from
    several threads. `close` ends everything that still runs and may be called twice; futures that are not done by then
    are cancelled.
    """

    @property
    def workers(self) -> int:
        """How many tasks run side by side."""

    def submit(self, *args: Any) -> Future[Any]:
        """Asks for the function's value at `args`."""

    def close(self) -> None:
        """Ends the executor."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Pulse:
    """Passes on the signs of progress of one task after another, and ends a task that has run for too long.

    It ends a task only when that makes progress: what hangs has to be killed from outside.
    """

    def __init__(self, timeout: float | None, send: Callable[[], None] | None = None) -> None:
        self._timeout = timeout
        self._send = send
        self._sent = 0.0
        self._end: float | None = None

    def begin(self) -> None:
        """Starts the clock of the next task."""
        self._sent = time.monotonic()
        self._end = None if self._timeout is None else self._sent + self._timeout

    def __call__(self) -> None:
        """Tells of progress.

        Raises:
            TrialError: The task's time is over.
        """
        now = time.monotonic()
        if self._end is not None and self._timeout is not None and now >= self._end:
            raise over(self._timeout)
        if self._send is not None and now - self._sent >= INTERVAL:
            self._sent = now
            self._send()


def over(timeout: float) -> TrialError:
    """Returns the error of a task that ran for too long."""
    return TrialError(f"the evaluation took longer than its limit of {timeout:g} s")


class InlineExecutor:
    """Calls the function in the caller's thread; the future is done when `submit` returns.

    Caught is what Python raises as an `Exception`: an error of the function, `MemoryError`, an allocation that torch
    refuses. A task that is over its time limit fails at its next sign of progress. Not caught is what ends or stops
    the process itself: a fault in native code (SIGSEGV, SIGABRT after a corrupted heap), the system's killer for want
    of memory (SIGKILL), `os._exit`, a call that never returns. That happens to the caller, a limit of silence has no
    effect, and a heap that was damaged without a crash stays damaged for all later tasks. `ProcessExecutor` with one
    worker isolates.
    """

    def __init__(self, factory: Factory, limits: Limits | None = None) -> None:
        self._pulse = Pulse(None if limits is None else limits.timeout)
        self._function = factory(self._pulse)
        self._closed = False

    @property
    def workers(self) -> int:
        """One: the caller."""
        return 1

    def submit(self, *args: Any) -> Future[Any]:
        """Calls the function. `KeyboardInterrupt` and its like are raised here, every other error by the future.

        Raises:
            AutopruneError: The executor is closed.
        """
        if self._closed:
            raise AutopruneError("the executor is closed")
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self._pulse.begin()
        try:
            value = self._function(*args)
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(value)
        return future

    def close(self) -> None:
        """Refuses further tasks."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
