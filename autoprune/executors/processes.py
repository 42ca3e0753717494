"""A pool of local processes: how a task reaches one, and what happens when it dies, hangs or takes too long.

Decides when a process is killed, when a task is repeated, and which environment each process sees. Knows nothing of
what is evaluated.
"""

from __future__ import annotations

import atexit
import errno
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self

from autoprune.errors import AutopruneError, TrialError
from autoprune.executors.base import Factory, Limits, over
from autoprune.executors.worker import BEAT, NO_MEMORY, work

ATTEMPTS = 2
"""How often a task may take its process down with it, or hang, before it fails."""
PAUSES = (5.0, 60.0)
"""Seconds before a process is started anew that was killed, or for which there was no memory, before it was ready: a
machine that is short of memory for a minute ends no search. One more such death ends what it was started for."""
START = 600.0
"""Seconds that a process has to become ready: it imports, and reads what it evaluates."""
GRACE = 3.0
"""Seconds beyond its time limit that a task has to end by itself before its process is killed."""
_PATIENCE = 5.0
"""Seconds that a process has to end before it is killed."""
_MEANINGS = {
    "SIGABRT": "a fault in native code such as a damaged heap",
    "SIGBUS": "a fault in native code, or a mapped file or shared memory without room",
    "SIGFPE": "a fault in native code: whole numbers divided by zero",
    "SIGILL": "native code for another kind of processor",
    "SIGKILL": "perhaps for want of memory",
    "SIGSEGV": "a fault in native code: memory that is not its own",
}
"""What ends a process by these signals, as a rule."""
_AT_ONCE = (0.0,) * (ATTEMPTS - 1)
_ENVIRONMENT = threading.Lock()


@dataclass(slots=True)
class _Task:
    args: bytes
    future: Future[Any] = field(default_factory=Future)


class ProcessExecutor:
    """Calls the function in `workers` fresh processes, one thread of this process looking after each.

    Every process calls `factory` once, in itself, to obtain the function; `factory` also sets thread counts. We chose
    a process and a pipe for each slot over `concurrent.futures.ProcessPoolExecutor`: there one dead process breaks the
    pool and takes the tasks of all others with it, an error of the initialiser is lost, and workers outlive a parent
    that was killed.

    A process that dies before it is ready is started again: after each of `PAUSES` where the system killed it or had
    no memory for it, immediately and once where it ended by itself; then the future raises `AutopruneError`. A task
    whose process dies, or makes no progress for `limits.silence` seconds, is given to a new process once, then its
    future raises `TrialError`; one that runs for longer than `limits.timeout` seconds fails at once. An error of the
    factory comes out of every future as it is. The processes ignore Ctrl-C, which is the parent's to handle, and
    end with the parent however it ends. They are no daemons, so that a data loader may start processes of its own.
    `environments` holds what each process sees beside the parent's environment from its very start on, such as which
    GPU is its own; where there are fewer than processes, they are dealt in turn.
    """

    def __init__(
        self,
        factory: Factory,
        workers: int,
        *,
        limits: Limits | None = None,
        environments: Sequence[Mapping[str, str]] = (),
    ) -> None:
        if workers < 1:
            raise ValueError(f"an executor needs at least one worker, got {workers}")
        start = _Start(pickle.dumps(factory), limits or Limits())
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._open: set[Future[Any]] = set()
        own = [environments[i % len(environments)] if environments else {} for i in range(workers)]
        self._slots = [_Slot(start, self._tasks, self._closing, environment) for environment in own]
        atexit.register(self.close)

    @property
    def workers(self) -> int:
        """The number of processes."""
        return len(self._slots)

    def submit(self, *args: Any) -> Future[Any]:
        """Asks for the function's value at `args`, which must be picklable.

        Raises:
            AutopruneError: The executor is closed.
        """
        task = _Task(pickle.dumps(args))
        with self._lock:
            if self._closing.is_set():
                raise AutopruneError("the executor is closed")
            self._open.add(task.future)
            self._tasks.put(task)
        task.future.add_done_callback(self._open.discard)
        return task.future

    def close(self) -> None:
        """Ends every process at once, whatever it does, and cancels what is not done."""
        with self._lock:
            first = not self._closing.is_set()
            self._closing.set()
        if not first:
            return
        atexit.unregister(self.close)
        for future in list(self._open):
            future.cancel()  # before the threads see them
        for _ in self._slots:
            self._tasks.put(None)
        for slot in self._slots:
            slot.terminate()
        for slot in self._slots:
            slot.join()
        for future in list(self._open):
            if not future.done():
                future.set_exception(AutopruneError("the executor was closed before the task was done"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Start:
    """What every process of an executor is started with."""

    factory: bytes
    limits: Limits


class _LostError(Exception):
    """The process at the other end of the pipe is gone or had to be killed, with what it was working on.

    `error` is what the task fails with once it was repeated after each of `pauses`, in seconds. `ready` is False where
    the process had not begun with it; such losses are counted for themselves.
    """

    def __init__(self, error: AutopruneError, *, pauses: Sequence[float] = (), ready: bool = True) -> None:
        super().__init__(str(error))
        self.error = error
        self.pauses = pauses
        self.ready = ready


class _SilentError(Exception):
    """A process made no progress for too long."""


class _Slot:
    """One process and the thread that feeds it."""

    def __init__(
        self,
        start: _Start,
        tasks: queue.SimpleQueue[_Task | None],
        closing: threading.Event,
        environment: Mapping[str, str],
    ) -> None:
        self._factory = start.factory
        self._limits = start.limits
        self._environment = environment
        self._tasks = tasks
        self._closing = closing
        self._lock = threading.Lock()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._ready = False
        self._thread = threading.Thread(target=self._serve, name="autoprune-slot", daemon=True)
        self._thread.start()

    def terminate(self) -> None:
        """Ends the process; the thread notices and ends as well. Called after `closing` is set."""
        with self._lock:
            if self._process is not None and self._process.is_alive():
                self._process.terminate()

    def join(self) -> None:
        """Waits until thread and process have ended, and kills a process that does not end."""
        self._thread.join(_PATIENCE)
        with self._lock:
            process = self._process
        if process is not None:
            process.join(_PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()

    def _serve(self) -> None:
        with suppress(OSError):  # the first task tells what is wrong
            self._start()  # at once: imports take seconds
        while (task := self._tasks.get()) is not None:
            if task.future.set_running_or_notify_cancel():
                self._run(task)
        self._discard()

    def _run(self, task: _Task) -> None:
        losses = {True: 0, False: 0}
        while not self._closing.is_set():
            try:
                done, value = self._call(task.args)
            except _LostError as lost:
                if self._closing.is_set():
                    return
                count = losses[lost.ready]
                if count >= len(lost.pauses):
                    task.future.set_exception(lost.error)
                    return
                self._closing.wait(lost.pauses[count])
                losses[lost.ready] += 1
                continue
            if self._closing.is_set() and task.future.done():
                return
            if done:
                task.future.set_result(value)
            else:
                task.future.set_exception(value)
            return

    def _call(self, args: bytes) -> tuple[bool, Any]:
        """Returns (True, value) or (False, error).

        Raises:
            _LostError: The process died or was killed; the next call starts another one.
        """
        if self._pipe is None:
            try:
                self._start()
            except OSError as error:
                text = f"a worker process could not be started: {error}"
                pauses: Sequence[float] = PAUSES if error.errno in (errno.ENOMEM, errno.EAGAIN) else ()
                raise _LostError(AutopruneError(text), pauses=pauses, ready=False) from error
        pipe, process, limits = self._pipe, self._process, self._limits
        if pipe is None or process is None:  # closed meanwhile
            raise _LostError(AutopruneError("the executor is closed"))
        try:
            if not self._ready:
                _receive(pipe, process, Limits(START))
                self._ready = True
            pipe.send_bytes(args)
            reply = _receive(pipe, process, limits)
        except (EOFError, OSError) as error:  # a time limit is an OSError too: TimeoutError
            late, ready = isinstance(error, TimeoutError), self._ready
            if late:
                process.kill()
            process.join()
            code = process.exitcode
            self._discard()
            if late:
                raise _overdue(limits, ready=ready) from error
            wanting = not ready and code is not None and (code < 0 or code == NO_MEMORY)
            pauses = PAUSES if wanting else _AT_ONCE
            raise _LostError(_last_death(_death(code), ready=ready), pauses=pauses, ready=ready) from error
        except _SilentError as error:
            process.kill()
            self._discard()
            text = f"the evaluation made no progress for {limits.silence:g} s, {ATTEMPTS} times"
            raise _LostError(TrialError(text), pauses=_AT_ONCE) from error
        done, value = pickle.loads(reply)
        return bool(done), value

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        with self._lock:
            if self._closing.is_set():
                return
            args = (theirs, self._factory, self._limits.timeout)
            process = context.Process(target=work, args=args, name="autoprune-worker")
            with _seen(self._environment):
                process.start()
            self._pipe, self._process, self._ready = ours, process, False
        theirs.close()  # so that the pipe ends when the process ends

    def _discard(self) -> None:
        with self._lock:
            pipe, self._pipe = self._pipe, None
            process = self._process
        if pipe is not None:
            pipe.close()  # an idle process ends at the end of its pipe
        if process is not None:
            process.join(_PATIENCE)


@contextmanager
def _seen(environment: Mapping[str, str]) -> Iterator[None]:
    """Lets a process that is started within see `environment` from its first instruction on.

    A process cannot do so for itself: what its main script imports may already have asked CUDA for its devices.
    """
    if not environment:
        yield
        return
    with _ENVIRONMENT:
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _receive(pipe: Connection, process: multiprocessing.process.BaseProcess, limits: Limits) -> bytes:
    """Returns the next message that is no sign of progress.

    Raises:
        EOFError: The process is dead, even where another process still holds its end of the pipe.
        TimeoutError: The message is overdue by `limits.timeout`.
        _SilentError: There was no sign of progress for `limits.silence` seconds.
    """
    begun = heard = time.monotonic()
    while True:
        if pipe.poll():
            message = pipe.recv_bytes()
            if message != BEAT:
                return message
            heard = time.monotonic()
            continue
        now = time.monotonic()
        ends = [] if limits.timeout is None else [begun + limits.timeout + GRACE]
        ends += [] if limits.silence is None else [heard + limits.silence]
        left = min(ends) - now if ends else None
        if left is not None and left <= 0:
            if limits.timeout is not None and now >= begun + limits.timeout + GRACE:
                raise TimeoutError
            raise _SilentError
        wait([pipe, process.sentinel], left)
        if not process.is_alive() and not pipe.poll():
            raise EOFError


def _overdue(limits: Limits, *, ready: bool) -> _LostError:
    if ready and limits.timeout is not None:
        return _LostError(over(limits.timeout))
    return _LostError(AutopruneError(f"a worker process was not ready after {START:g} s"))


def _last_death(how: str, *, ready: bool) -> AutopruneError:
    if ready:
        return TrialError(f"the evaluating process died {ATTEMPTS} times: {how}")
    return AutopruneError(
        f"a worker process ended before it was ready ({how}); what it printed says why."
        " A script that starts workers must guard its main part by `if __name__ == '__main__':`"
    )


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return killed_by(-code)
    return "no memory left" if code == NO_MEMORY else f"exit status {code}"


def killed_by(number: int) -> str:
    """Returns the name of the signal that ended a process, and what that mostly means."""
    try:
        name = signal.Signals(number).name
    except ValueError:  # one of the real-time signals between the first and the last, which have no names
        return f"killed by signal {number}"
    meaning = _MEANINGS.get(name)
    return f"killed by {name}" + (f", {meaning}" if meaning else "")
