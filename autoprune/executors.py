"""Where evaluations run: in this process, or in a pool of local processes.

Decides how a task reaches a process and what happens when that process dies. Knows nothing of what is evaluated: an
executor is handed a function, or a factory of it, and calls it with the arguments of `submit`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol, Self

from autoprune.errors import AutopruneError, TrialError

ATTEMPTS = 2
"""How often a task may take its process down with it before it fails."""
_READY = b"ready"
_PATIENCE = 5.0
"""Seconds that a process has to end before it is killed."""


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


class InlineExecutor:
    """Calls the function in the caller's thread; the future is done when `submit` returns."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
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


@dataclass(slots=True)
class _Task:
    args: bytes
    future: Future[Any] = field(default_factory=Future)
    attempts: int = 0


class ProcessExecutor:
    """Calls the function in `workers` fresh processes, one thread of this process looking after each.

    Every process calls `factory` once, in itself, to obtain the function; `factory` also sets thread counts. We chose
    a process and a pipe for each slot over `concurrent.futures.ProcessPoolExecutor`: there one dead process breaks the
    pool and takes the tasks of all others with it, an error of the initialiser is lost, and workers outlive a parent
    that was killed.

    A task whose process dies is given to a new process once, then its future raises `TrialError`. An error of the
    factory comes out of every future as it is. The processes ignore Ctrl-C, which is the parent's to handle, and end
    with the parent however it ends. They are no daemons, so that a data loader may start processes of its own.
    """

    def __init__(self, factory: Callable[[], Callable[..., Any]], workers: int) -> None:
        if workers < 1:
            raise ValueError(f"an executor needs at least one worker, got {workers}")
        self._factory = pickle.dumps(factory)
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._open: set[Future[Any]] = set()
        self._slots = [_Slot(self._factory, self._tasks, self._closing) for _ in range(workers)]
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


class _DiedError(Exception):
    """The process at the other end of the pipe is gone; `ready` tells whether it had begun to work."""

    def __init__(self, how: str, *, ready: bool) -> None:
        super().__init__(how)
        self.ready = ready


class _Slot:
    """One process and the thread that feeds it."""

    def __init__(self, factory: bytes, tasks: queue.SimpleQueue[_Task | None], closing: threading.Event) -> None:
        self._factory = factory
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
        self._start()  # at once: imports take seconds
        while (task := self._tasks.get()) is not None:
            if task.future.set_running_or_notify_cancel():
                self._run(task)
        self._discard()

    def _run(self, task: _Task) -> None:
        while not self._closing.is_set():
            try:
                done, value = self._call(task.args)
            except _DiedError as death:
                if self._closing.is_set():
                    return
                task.attempts += 1
                if task.attempts >= ATTEMPTS:
                    task.future.set_exception(_last_death(death))
                    return
                continue
            if self._closing.is_set() and task.future.done():
                return
            if done:
                task.future.set_result(value)
            else:
                task.future.set_exception(value)
            return

    def _call(self, args: bytes) -> tuple[bool, Any]:
        """Returns (True, value) or (False, error)."""
        if self._pipe is None:
            self._start()
        pipe, process = self._pipe, self._process
        if pipe is None or process is None:  # closed meanwhile
            raise _DiedError("the executor is closed", ready=False)
        try:
            if not self._ready:
                _receive(pipe, process)
                self._ready = True
            pipe.send_bytes(args)
            reply = _receive(pipe, process)
        except (EOFError, OSError) as error:
            process.join()
            how, ready = _death(process.exitcode), self._ready
            self._discard()
            raise _DiedError(how, ready=ready) from error
        done, value = pickle.loads(reply)
        return bool(done), value

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        with self._lock:
            if self._closing.is_set():
                return
            process = context.Process(target=_work, args=(theirs, self._factory), name="autoprune-worker")
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


def _receive(pipe: Connection, process: multiprocessing.process.BaseProcess) -> bytes:
    """Returns the next message; a dead process is an `EOFError` even where another process still holds its end."""
    while not pipe.poll():
        wait([pipe, process.sentinel])
        if not process.is_alive() and not pipe.poll():
            raise EOFError
    return pipe.recv_bytes()


def _last_death(death: _DiedError) -> AutopruneError:
    if death.ready:
        return TrialError(f"the evaluating process died {ATTEMPTS} times: {death}")
    return AutopruneError(
        f"a worker process ended before it was ready ({death}); what it printed says why."
        " A script that starts workers must guard its main part by `if __name__ == '__main__':`"
    )


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"ended by {name}{hint}"
    return f"exit status {code}"


def _work(pipe: Connection, factory: bytes) -> None:
    """What a process does: obtains the function, then answers until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    function: Callable[..., Any] | None = None
    failure: Exception | None = None
    try:
        function = pickle.loads(factory)()
    except Exception as error:
        ours = isinstance(error, AutopruneError) and not isinstance(error, TrialError)
        failure = error if ours else _start_error(error)
    pipe.send_bytes(_READY)
    while True:
        try:
            args = pipe.recv_bytes()
        except EOFError:
            return
        reply: tuple[bool, Any]
        if function is None:
            reply = (False, failure)
        else:
            try:
                reply = (True, function(*pickle.loads(args)))
            except Exception as error:
                reply = (False, error)
        try:
            pipe.send_bytes(_pickled(reply))
        except BrokenPipeError:
            return


def _start_error(error: Exception) -> AutopruneError:
    return AutopruneError(f"a worker process could not start: {type(error).__name__}: {error}\n{_trace(error)}")


def _pickled(reply: tuple[bool, Any]) -> bytes:
    """Returns the reply as bytes; what does not survive pickling is replaced by an error that says so."""
    done, value = reply
    if not done:
        value.add_note(f"in a worker process:\n{_trace(value)}")
    try:
        data = pickle.dumps(reply)
        if not done:
            pickle.loads(data)  # an error whose constructor wants more than its message fails only here
    except Exception as error:
        what = f"{type(value).__name__}: {value}" if not done else f"a result of type {type(value).__name__}"
        kind = TrialError if isinstance(value, TrialError) else AutopruneError
        return pickle.dumps((False, kind(f"{what} (cannot be sent between processes: {error})")))
    return data


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
