"""The service as a user runs it: it survives the death of every process, and its searches end as if nothing was."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

RUNGS = {"screen": 10, "tune": 5, "final": 4, "controls": 3}
SLOWER = ("--set", "search.ladder.1.epochs=20", "--set", "search.ladder.2.epochs=20")
NAMES = ("first", "second")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Service:
    """`autoprune serve` in a folder, started and killed by a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / ".autoprune" / "service" / "state.json"
        page, board, mlflow = free_ports(3)
        self.page = f"http://127.0.0.1:{page}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AUTOPRUNE_", "MLFLOW_"))}
        self.env = {
            **kept,
            "AUTOPRUNE_PORT": str(page),
            "AUTOPRUNE_DASHBOARD_PORT": str(board),
            "MLFLOW_PORT": str(mlflow),
            "OMP_NUM_THREADS": "1",
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.output = folder / "serve.log"

    def start(self) -> None:
        with self.output.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "autoprune", "serve"],
                cwd=self.folder,
                env=self.env,
                stdout=out,
                stderr=out,
            )

    def document(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self.state.read_text())
        except FileNotFoundError:
            return {"services": []}
        return found

    def processes(self) -> list[int]:
        """Returns everything that the service has started and that lives."""
        mark = f"AUTOPRUNE_SERVICE={self.document().get('token')}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def states(self) -> dict[str, str]:
        return {row["name"]: row["state"] for row in self.document()["services"]}

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(90)


@pytest.fixture
def service(tmp_path: Path, space_text: str) -> Iterator[Service]:
    (tmp_path / "space.yaml").write_text(space_text)
    made = Service(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.end(signal.SIGKILL)
    for pid in made.processes():
        os.kill(pid, signal.SIGKILL)


def until(condition: Callable[[], Any], seconds: float, service: Service) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, service.output.read_text()[-3000:]
        time.sleep(0.2)


def get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=20) as answer:
        return str(answer.read().decode())


def check_whole(store: Any) -> None:
    """Checks that no trial was lost or repeated and that MLflow has one run of each."""
    trials = store.trials()
    assert store.distinct() == RUNGS
    assert {trial["state"] for trial in trials} <= {"COMPLETE", "FAIL"}
    assert all(trial["user"]["abandoned"] for trial in trials if trial["state"] == "FAIL")
    complete = [trial for trial in trials if trial["state"] == "COMPLETE"]
    fresh = [(t["rung"], t["user"]["identity"]) for t in complete if "reused" not in t["user"]]
    assert len(fresh) == len(set(fresh)) == sum(RUNGS.values())
    runs = store.runs("trial")
    assert sorted(run["tags"]["autoprune.trial"] for run in runs) == sorted(trial["key"] for trial in complete)
    assert {run["status"] for run in (*runs, *store.runs("search"))} == {"FINISHED"}


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_killed_in_the_middle_with_all_of_its_processes_the_service_goes_on_and_both_searches_finish(
    service: Service, commands: Any, store_of: Any
) -> None:
    stores = {name: store_of(service.folder, name) for name in NAMES}
    chance = random.Random(5)
    service.start()
    for name in NAMES:
        done = commands.run("submit", "space.yaml", "--name", name, *SLOWER, cwd=service.folder)
        assert done.status == 0, done.err

    def finished(name: str) -> int:
        return sum(count for (_, state), count in stores[name].states().items() if state == "COMPLETE")

    for name, wanted in (("first", 3), ("first", sum(RUNGS.values()) - 4), ("second", 12)):
        until(lambda name=name, wanted=wanted: finished(name) >= wanted, 600, service)
        assert service.process is not None
        victims = [service.process.pid, *service.processes()]
        assert len(victims) >= 5  # supervisor, MLflow, dashboard, runner, search
        chance.shuffle(victims)
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it ended with one of the others
                continue
        service.process.wait()
        until(lambda: not service.processes(), 30, service)
        status = commands.run("status", cwd=service.folder)
        assert "No service runs on this home folder" in status.out
        service.start()

    def jobs() -> dict[str, str]:
        done = commands.run("status", "--json", cwd=service.folder)
        return {job["name"]: job["state"] for job in json.loads(done.out)["jobs"]}

    until(lambda: set(jobs().values()) == {"done"}, 900, service)
    for store in stores.values():
        check_whole(store)
    until(lambda: set(service.states().values()) == {"healthy"}, 600, service)
    assert get(f"{service.page}/health") == "healthy\n"
    page = get(f"{service.page}/")
    assert all(name in page for name in NAMES)
    log = commands.run("logs", "second", cwd=service.folder)
    assert "points on the front" in log.out.splitlines()[-1]
    assert service.end() == 0
    assert not service.state.exists()
    until(lambda: not service.processes(), 20, service)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_each_process_that_dies_alone_is_started_again_and_the_search_finishes(
    service: Service, commands: Any, store_of: Any
) -> None:
    store = store_of(service.folder, "first")
    done = commands.run("submit", "space.yaml", "--name", "first", *SLOWER, cwd=service.folder)
    assert done.status == 0, done.err
    service.start()
    until(lambda: set(service.states().values()) == {"healthy"}, 600, service)
    for name in ("mlflow", "dashboard", "runner"):
        (pid,) = (row["pid"] for row in service.document()["services"] if row["name"] == name)
        os.kill(pid, signal.SIGKILL)
        until(lambda name=name: service.states()[name] != "healthy", 30, service)
    until(lambda: set(service.states().values()) == {"healthy"}, 600, service)
    restarts = {row["name"]: row["restarts"] for row in service.document()["services"]}
    assert all(count >= 1 for count in restarts.values()), restarts
    job: dict[str, Any] = {}

    def ended() -> bool:
        found = commands.run("status", "first", "--json", cwd=service.folder)
        job.update(json.loads(found.out)["jobs"][0])
        return job["state"] not in ("queued", "running")

    until(ended, 300, service)
    assert (job["state"], job["reason"]) == ("done", "")
    check_whole(store)
    second = commands.run("serve", cwd=service.folder)
    assert second.status == 2
    assert "a service runs on" in second.err
    assert service.end(signal.SIGINT) == 0
