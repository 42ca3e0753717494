"""Evaluations as tasks of a Ray cluster.

Decides what each task asks of the cluster, when one is killed, and when it is repeated. The factory is put into the
cluster's object store once; every process of the cluster reads it from there and makes its function once. Knows nothing
of what is evaluated.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from autoprune.errors import AutopruneError, InputError, MissingExtraError, TrialError
from autoprune.executors.base import Factory, Limits, Pulse, over
from autoprune.executors.processes import ATTEMPTS, GRACE
from autoprune.executors.worker import pickled, start_error

LOST = 20
"""How often a task may lose the node that it runs on: that is not the task's fault, and a cluster may shrink often."""
_CHECK = 1.0
"""Seconds between two looks at how long tasks have been running and silent."""
_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class Share:
    """What one evaluation takes of a node: processors and GPUs; a fraction of a GPU is shared with others."""

    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.cpus < float("inf") or not 0 <= self.gpus < float("inf"):
            raise InputError(f"an evaluation needs processors, got {self.cpus:g} and {self.gpus:g} GPUs")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise InputError(f"GPUs for an evaluation are a fraction of one or a whole number, got {self.gpus:g}")


@dataclass(slots=True, eq=False)
class _Task:
    args: bytes
    future: Future[Any] = field(default_factory=Future)
    token: str = ""
    ref: Any = None
    deaths: int = 0
    lost: int = 0
    killed: str = ""
    """Why this attempt was killed: `late`, `silent`, or empty."""


class RayExecutor:
    """Calls the function in tasks of a Ray cluster, `workers` at a time.

    A task whose process dies, or makes no progress for `limits.silence` seconds, is run once more, then its future
    raises `TrialError`; one that runs for longer than `limits.timeout` seconds fails at once. A task that loses its
    node is run again elsewhere, up to `LOST` times. Waiting for a place in the cluster counts as neither. An error of
    the factory comes out of every future as it is.

    Args:
        factory: Makes the function, once in each process of the cluster that runs a task.
        address: `local` starts a cluster of this machine that ends with the executor; `auto` is the one that was
            started here by `ray start`; any other is the address of one, `ray://host:port` of its client server.
        workers: Tasks at a time; None: as many as the cluster has room for.
        share: What each task takes of a node.
        limits: How long tasks may run and be silent.
        receive: Applied here, by a thread, to what a task returned.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: There is no cluster at the address, or it has no node with room for one task.
    """

    def __init__(
        self,
        factory: Factory,
        address: str,
        *,
        workers: int | None = None,
        share: Share | None = None,
        limits: Limits | None = None,
        receive: Callable[[Any], Any] | None = None,
    ) -> None:
        self._ray = _installed()
        self._limits = limits or Limits()
        self._receive = receive
        self._connected = _connect(self._ray, address)
        self._lock = threading.Lock()
        self._closed = False
        self._asked: Any = None
        self._tasks: set[_Task] = set()
        self._ended: queue.SimpleQueue[tuple[_Task, Any] | None] = queue.SimpleQueue()
        try:
            share = share or Share()
            self._workers = workers or _room(self._ray.cluster_resources(), share)
            self._held = self._ray.put(factory)
            self._key = uuid.uuid4().hex
            # A process that computes on a GPU ends with its task (Ray's own default): the next one may get another GPU.
            options = {
                "num_cpus": share.cpus,
                "num_gpus": share.gpus,
                "max_retries": 0,
                "max_calls": int(share.gpus > 0),
            }
            self._run = self._ray.remote(**options)(_run)
            watched = self._limits != Limits()
            self._heard = self._ray.remote(num_cpus=0, max_restarts=-1)(Heard).remote() if watched else None
        except BaseException:
            self._disconnect()
            raise
        self._thread = threading.Thread(target=self._serve, name="autoprune-ray", daemon=True)
        self._thread.start()

    @property
    def workers(self) -> int:
        """How many tasks run side by side."""
        return self._workers

    def submit(self, *args: Any) -> Future[Any]:
        """Asks for the function's value at `args`, which must be picklable.

        Raises:
            AutopruneError: The executor is closed.
        """
        task = _Task(pickle.dumps(args))
        task.future.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                raise AutopruneError("the executor is closed")
            self._tasks.add(task)
        self._send(task)
        return task.future

    def close(self) -> None:
        """Cancels every task, and leaves the cluster; one that this executor started ends."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._ended.put(None)
        self._thread.join(_PATIENCE)
        for task in list(self._tasks):
            self._kill(task)
            if not task.future.done():
                task.future.set_exception(AutopruneError("the executor was closed before the task was done"))
        self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- the cluster ---

    def _disconnect(self) -> None:
        if self._connected:
            self._ray.shutdown()

    def _send(self, task: _Task) -> None:
        """Gives a task to the cluster, under a new token: what an attempt before said counts no more."""
        task.token, task.killed = uuid.uuid4().hex, ""
        timeout = self._limits.timeout
        task.ref = self._run.remote(
            [self._held, self._heard], self._key, token=task.token, timeout=timeout, args=task.args
        )
        task.ref.future().add_done_callback(lambda done: self._ended.put((task, done)))

    def _kill(self, task: _Task) -> None:
        try:
            self._ray.cancel(task.ref, force=True)
        except (ValueError, self._ray.exceptions.RayError) as error:  # it has just ended
            logging.getLogger(__name__).debug("not cancelled: %s", error)

    def _serve(self) -> None:
        """Answers what ends, and looks after what runs, until the executor is closed."""
        looked = time.monotonic()
        while True:
            try:
                ended = self._ended.get(timeout=_CHECK)
                if ended is None:
                    return
                self._settle(*ended)
            except queue.Empty:
                pass
            if self._heard is not None and time.monotonic() >= looked + _CHECK:
                self._look()
                looked = time.monotonic()

    def _settle(self, task: _Task, done: Any) -> None:
        if self._closed:
            return
        error = done.exception()
        if error is not None:
            failure = self._judged(task, error)
            if failure is None:
                self._send(task)
                return
            value: Any = failure
        else:
            ok, value = pickle.loads(done.result())
            if ok and self._receive is not None:
                try:
                    value = self._receive(value)
                except Exception as problem:
                    ok, value = False, problem
        self._tasks.discard(task)
        if error is None and ok:
            task.future.set_result(value)
        else:
            task.future.set_exception(value)

    def _judged(self, task: _Task, error: BaseException) -> AutopruneError | None:
        """Returns what a task fails with whose attempt ended by itself; None: it is tried again."""
        kinds = self._ray.exceptions
        limits = self._limits
        if task.killed == "late":
            return over(limits.timeout or 0.0)
        if task.killed == "silent":
            task.deaths += 1
            text = f"the evaluation made no progress for {limits.silence:g} s, {ATTEMPTS} times"
            return TrialError(text) if task.deaths >= ATTEMPTS else None
        if isinstance(error, kinds.NodeDiedError | kinds.ObjectLostError):
            task.lost += 1
            lost = f"its node was lost {LOST} times: {_line(error)}"
            return TrialError(lost) if task.lost >= LOST else None
        if isinstance(error, kinds.WorkerCrashedError | kinds.OutOfMemoryError):
            task.deaths += 1
            text = f"the evaluating process died {ATTEMPTS} times: {_line(error)}{_cause(error, kinds)}"
            return TrialError(text) if task.deaths >= ATTEMPTS else None
        return AutopruneError(f"Ray could not run an evaluation: {type(error).__name__}: {_line(error)}")

    def _look(self) -> None:
        """Kills tasks that run for too long, or hang."""
        assert self._heard is not None
        if self._asked is None:
            self._asked = self._heard.ages.remote()
            return
        if not self._ray.wait([self._asked], timeout=0)[0]:  # the actor is on its way: results must not wait for it
            return
        asked, self._asked = self._asked, None
        try:
            heard = self._ray.get(asked)
        except self._ray.exceptions.RayError:
            return  # its node was lost: Ray starts another one
        limits = self._limits
        for task in list(self._tasks):
            if task.killed or task.token not in heard:  # it waits for a place
                continue
            running, silent = heard[task.token]
            if limits.timeout is not None and running > limits.timeout + GRACE:
                task.killed = "late"
            elif limits.silence is not None and silent > limits.silence:
                task.killed = "silent"
            if task.killed:
                self._kill(task)


class Heard:
    """An actor that remembers when each running task began and was last heard."""

    def __init__(self) -> None:
        self._times: dict[str, list[float]] = {}

    def beat(self, token: str) -> None:
        """Notes a sign of progress; the first one is the beginning."""
        now = time.monotonic()
        self._times.setdefault(token, [now, now])[1] = now

    def end(self, token: str) -> None:
        """Forgets a task."""
        self._times.pop(token, None)

    def ages(self) -> dict[str, tuple[float, float]]:
        """Returns the seconds since each running task began, and since it was last heard."""
        now = time.monotonic()
        return {token: (now - begun, now - last) for token, (begun, last) in self._times.items()}


_MADE: dict[str, Any] = {}
"""In a process of the cluster: the function, or why it could not be made, and its pulse, by executor."""


class _Voice:
    """Tells the actor about whichever task runs in this process."""

    def __init__(self, heard: Any) -> None:
        self._heard = heard
        self.token = ""

    def __call__(self) -> None:
        if self._heard is not None:
            self._heard.beat.remote(self.token)

    def end(self) -> None:
        if self._heard is not None:
            self._heard.end.remote(self.token)


def _run(held: list[Any], key: str, *, token: str, timeout: float | None, args: bytes) -> bytes:
    """What a process of the cluster does for a task: returns (True, value) or (False, error), pickled."""
    if key not in _MADE:
        _MADE.clear()  # of an executor before this one
        _MADE[key] = _made(held, timeout)
    function, pulse, voice = _MADE[key]
    if isinstance(function, Exception):
        return pickled((False, function))
    voice.token = token
    voice()
    pulse.begin()
    try:
        return pickled((True, function(*pickle.loads(args))))
    except Exception as error:
        return pickled((False, error))
    finally:
        voice.end()


def _made(held: list[Any], timeout: float | None) -> tuple[Any, Pulse, _Voice]:
    import ray

    voice = _Voice(held[1])
    pulse = Pulse(timeout, voice)
    try:
        return ray.get(held[0])(pulse), pulse, voice
    except Exception as error:
        return start_error(error), pulse, voice


def _installed() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"Ray is not installed ({error}): pip install 'autoprune[ray]'") from error
    return ray


def _connect(ray: Any, address: str) -> bool:
    """Joins the cluster at `address`; returns whether it is to be left at the end."""
    if ray.is_initialized():
        return False
    if address not in ("local", "auto"):
        _reach(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options["include_dashboard"] = False
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 starves evaluations beside any other work
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        if address == "auto":
            hint = "start one by `ray start --head`, or give its address, or use --ray local"
            raise InputError(f"no Ray cluster was found here: {hint} ({_line(error)})") from error
        if address == "local":
            raise AutopruneError(f"Ray could not be started here: {_line(error)}") from error
        token = "; where it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" * address.startswith("ray://")
        raise InputError(f"the Ray cluster at {address!r} cannot be reached: {_line(error)}{token}") from error
    return True


def _reach(address: str) -> None:
    """Refuses an address at which nobody answers: Ray itself would try for minutes, and may then end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"a Ray cluster's address is local, auto, HOST:PORT or ray://HOST:PORT, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"the Ray cluster at {address!r} cannot be reached: {error}") from error


def _room(resources: dict[str, float], share: Share) -> int:
    """Returns how many tasks the cluster holds at a time."""
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    room = int(cpus / share.cpus)
    if share.gpus:
        room = min(room, int(gpus / share.gpus + 1e-9))
    if room < 1:
        raise InputError(
            f"the Ray cluster has {cpus:g} processors and {gpus:g} GPUs: no room for an evaluation, which takes"
            f" {share.cpus:g} and {share.gpus:g}"
        )
    return room


def _cause(error: BaseException, kinds: Any) -> str:
    """Returns what a death may mean of which Ray tells no signal; where it has no memory left, it says so itself."""
    if isinstance(error, kinds.OutOfMemoryError):
        return ""
    return " (Ray does not tell the signal: a fault in native code, or killed for want of memory)"


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
