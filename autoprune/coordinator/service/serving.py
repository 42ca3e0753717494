"""`autoprune serve`: the MLflow server, the Optuna dashboard and the runner of the queue under one supervisor.

Decides which processes make up the service, with which settings, and what is refused before any is started. The runner
is a process like the others (`run_queue`), so that nothing it meets ends the service.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from autoprune import studies, tracking
from autoprune.coordinator.commands.dashboards import dashboard_command
from autoprune.coordinator.service.children import TOKEN, Command
from autoprune.coordinator.service.pages import open_page
from autoprune.coordinator.service.runner import SLICE_SECONDS, Runner, SearchProcesses, slots_of
from autoprune.coordinator.service.supervising import Held, Service, Supervisor, answers, beats, serving
from autoprune.coordinator.stored.places import STORAGE_ENV, make_home, storage_path
from autoprune.coordinator.stored.service_state import service_folder
from autoprune.errors import InputError
from autoprune.studies import Queue

Say = Callable[[str], None]
_BEAT = "runner.beat"
_BEAT_SECONDS = 120.0
_RUNNER_PATIENCE = 45.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class ServeOptions:
    """What `autoprune serve` may be told; ports are on this machine's loopback interface."""

    slots: int = 1
    slice_seconds: float = SLICE_SECONDS
    page_port: int = 8090
    dashboard_port: int = 8080


def serve(options: ServeOptions, *, home: Path, say: Say) -> None:
    """Runs the service until SIGTERM or SIGINT; a second one ends it at once.

    Raises:
        InputError: A port is taken, a setting is wrong, or other machines could come in without a login.
        StudyError: Another service runs on this home folder, or it cannot be written.
        TrackingError: `mlflow/server.env` cannot be read.
    """
    make_home(home)
    home = home.resolve()
    env = _absolute_storage(os.environ)
    server = tracking.server_plan(home, env)
    with serving(home) as held, _stops() as stops:
        if held.left:
            say(f"ended {len(held.left)} processes that a killed service had left behind")
        for name, host, port in (
            ("the status page (--port)", "127.0.0.1", options.page_port),
            ("the Optuna dashboard (--dashboard-port)", "127.0.0.1", options.dashboard_port),
            ("MLflow (MLFLOW_PORT)", server.host, server.port),
        ):
            _check_free(name, host, port)
        Queue(studies.open_storage(storage_path(home), say=say))  # the dashboard needs the tables
        services = _services(options, held, server, home=home, env=env)
        supervisor = Supervisor(services, service_folder(home), token=held.token, say=say)
        with open_page(home, options.page_port) as address:
            say(f"status: {address} or `autoprune status`; Ctrl-C ends the service, and searches go on when it is back")
            supervisor.run(lambda: stops.asked > 0, hurrying=lambda: stops.asked > 1)
    say("the service has ended")


def _services(
    options: ServeOptions, held: Held, server: tracking.ServerPlan, *, home: Path, env: Mapping[str, str]
) -> list[Service]:
    here, mark = Path.cwd(), {TOKEN: held.token}
    beat = service_folder(home) / _BEAT
    beat.unlink(missing_ok=True)
    board = f"http://127.0.0.1:{options.dashboard_port}"
    runner = [sys.executable, "-P", "-m", "autoprune", "run-queue", "--home", str(home)]
    runner += ["--slots", str(options.slots), "--slice", str(options.slice_seconds)]
    dashboard = dashboard_command(home, options.dashboard_port)  # may add a password to the environment
    secret = {name: os.environ[name] for name in ("PGPASSWORD",) if name in os.environ}
    return [
        Service(
            "mlflow",
            Command(server.command, {**server.env, **mark}, here),
            answers(f"{server.address}/health"),
            server.address,
        ),
        Service("dashboard", Command(dashboard, {**env, **secret, **mark}, here), answers(f"{board}/api/meta"), board),
        Service(
            "runner",
            Command(runner, {**env, **server.recording, **mark}, here),
            beats(beat, seconds=_BEAT_SECONDS),
            patience=_RUNNER_PATIENCE,
        ),
    ]


def run_queue(*, home: Path, slots: int, slice_seconds: float, say: Say) -> None:
    """Works through the queue of a home folder until SIGTERM or SIGINT.

    Raises:
        StudyError: Another runner that is alive holds the queue, or the storage cannot be used.
        StorageError: The storage has gone away for too long.
    """
    make_home(home)
    home = home.resolve()
    storage = studies.open_storage(storage_path(home), say=say)
    queue = Queue(storage)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    runner = Runner(
        queue,
        _Stored(storage),
        SearchProcesses(home, _absolute_storage(os.environ)),
        slots=slots_of(slots, cores=cores, gpus=os.environ.get("CUDA_VISIBLE_DEVICES")),
        slice_seconds=slice_seconds,
    )
    beat = service_folder(home) / _BEAT
    beat.parent.mkdir(parents=True, exist_ok=True)
    with _stops() as stops, queue.hold():
        runner.adopt()
        say(f"the runner works through the queue, {slots} at a time")
        while not stops.asked:
            runner.step()
            beat.touch()
            time.sleep(_POLL_SECONDS)
        runner.stop()


@dataclass(frozen=True)
class _Stored:
    """The searches as a storage tells of them."""

    storage: studies.LastingStorage

    def finished(self, name: str) -> int:
        """Returns how many trials a search has finished."""
        return studies.finished_trials(self.storage, name)

    def holder(self, name: str) -> str | None:
        """Returns who runs a search."""
        return studies.search_holder(self.storage, name)


@dataclass
class _Stops:
    """How often this process was asked to end."""

    asked: int = 0


@contextmanager
def _stops() -> Iterator[_Stops]:
    """Counts SIGTERM and SIGINT instead of dying of them."""
    stops = _Stops()

    def count(number: int, frame: object) -> None:
        stops.asked += 1

    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a service runs in the main thread: children end with the thread that started them")
    before = {number: signal.signal(number, count) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _absolute_storage(env: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment with a storage that is a file named in full: searches run in other directories."""
    named = env.get(STORAGE_ENV, "").strip()
    if not named or "://" in named:
        return dict(env)
    return {**env, STORAGE_ENV: str(Path(named).resolve())}


def _check_free(name: str, host: str, port: int) -> None:
    """Refuses a port that somebody else listens on.

    Raises:
        InputError: It is taken, or the interface is none of this machine's.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(place)
    except OSError as error:
        raise InputError(f"{name} cannot listen on {host}:{port}: {error.strerror or error}") from error
