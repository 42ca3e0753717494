"""What happens inside a worker process: it obtains the function once, then answers until its pipe ends.

Decides what is sent back, and that a worker never outlives its parent. Must not know how its parent reacts.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

from autoprune.errors import AutopruneError, TrialError
from autoprune.executors.base import Pulse

NO_MEMORY = 112
"""Exit status of a process that found no memory before it was ready."""
READY = b"ready"
BEAT = b"beat"
"""A sign of progress; every other message is the pickled reply to a task."""


def work(pipe: Connection, factory: bytes, timeout: float | None) -> None:
    """What a process does from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pulse = Pulse(timeout, lambda: pipe.send_bytes(BEAT))
    function: Callable[..., Any] | None = None
    failure: Exception | None = None
    try:
        function = pickle.loads(factory)(pulse)
    except MemoryError:
        raise SystemExit(NO_MEMORY) from None  # another start may find some
    except Exception as error:
        failure = start_error(error)
    pipe.send_bytes(READY)
    while True:
        try:
            args = pipe.recv_bytes()
        except EOFError:
            return
        reply: tuple[bool, Any]
        if function is None:
            reply = (False, failure)
        else:
            pulse.begin()
            try:
                reply = (True, function(*pickle.loads(args)))
            except Exception as error:
                reply = (False, error)
        try:
            pipe.send_bytes(pickled(reply))
        except BrokenPipeError:
            return


def start_error(error: Exception) -> AutopruneError:
    """Returns what is raised for every task where the function could not be made: what stops a search, as it is."""
    if isinstance(error, AutopruneError) and not isinstance(error, TrialError):
        return error
    return AutopruneError(f"a worker process could not start: {type(error).__name__}: {error}\n{trace_of(error)}")


def pickled(reply: tuple[bool, Any]) -> bytes:
    """Returns the reply as bytes; what does not survive pickling is replaced by an error that says so."""
    done, value = reply
    if not done:
        value.add_note(f"in a worker process:\n{trace_of(value)}")
    try:
        data = pickle.dumps(reply)
        if not done:
            pickle.loads(data)  # an error whose constructor wants more than its message fails only here
    except Exception as error:
        what = f"{type(value).__name__}: {value}" if not done else f"a result of type {type(value).__name__}"
        kind = TrialError if isinstance(value, TrialError) else AutopruneError
        return pickle.dumps((False, kind(f"{what} (cannot be sent between processes: {error})")))
    return data


def trace_of(error: BaseException) -> str:
    """Returns the whole traceback of an error as text."""
    return "".join(traceback.format_exception(error))


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
