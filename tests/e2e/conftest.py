"""What the end-to-end tests share: a small space, and processes that run the command line without importing it anew."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SPACE = """\
schema: 1
name: quick
model: {name: mlp, arguments: {in_features: 4, hidden: [24, 16]}}
data: {name: iris, validation: {source: train, fraction: 0.3}, calibration: 32}
budget: {macs: 0.6, params: 0.7, front: [0.1, 0.6]}
criteria: {choices: [l2, obs], scope: layer}
recipe: {batch_size: 16, lr: 0.02, precision: float32, baseline: {epochs: 40, lr: 0.05}}
search:
  trials: 10
  controls: 3
  ladder:
    - {rung: screen, epochs: 0}
    - {rung: tune, epochs: 2, trials: 5}
    - {rung: final, epochs: 3, trials: 4, test: true}
device: cpu
"""

# Imports what a search needs once, then runs each command in a fork: a real process, without seconds of imports.
_NURSERY = """
import json, os, signal, sys, threading, warnings
warnings.simplefilter("error")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mlflow, matplotlib.pyplot, plotly.graph_objects, plotly.io, pandas, sklearn.datasets
    import mlflow.store.tracking.sqlalchemy_store, optuna_dashboard._note, torch.export._trace
import autoprune.coordinator.running.session, autoprune.network.artifacts.export, autoprune.coordinator.api
from autoprune import cli
assert threading.active_count() == 1, threading.enumerate()
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        _, status = os.waitpid(order["wait"], 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(json.dumps(pid), flush=True)
        continue
    os.setsid()
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(order[name], flags, 0o644), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["autoprune", *order["args"]]
    code = 1
    try:
        cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
os._exit(0)
"""


@dataclass(frozen=True)
class Done:
    """A command that has ended: exit status (negative: the signal), stdout and stderr."""

    status: int
    out: str
    err: str


class Running:
    """A command that runs."""

    def __init__(self, commands: Commands, pid: int, out: Path, err: Path) -> None:
        self._commands = commands
        self.pid = pid
        self._out = out
        self._err = err

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.kill(self.pid, number)

    def wait(self) -> Done:
        status = self._commands.ask({"wait": self.pid})
        return Done(status, self._out.read_text(), self._err.read_text())


class Commands:
    """Runs `autoprune` commands."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._nursery = subprocess.Popen(
            [sys.executable, "-c", _NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment() | {"MPLBACKEND": "agg"},
        )
        self._ready = False

    def start(self, *arguments: object, cwd: Path, **env: str) -> Running:
        self._count += 1
        out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        order = {"args": [str(a) for a in arguments], "cwd": str(cwd), "env": environment() | env}
        order |= {"stdin": os.devnull, "stdout": str(out), "stderr": str(err)}
        return Running(self, self.ask(order), out, err)

    def ask(self, order: dict[str, Any]) -> int:
        """Sends an order and returns the number that answers it."""
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        if not self._ready:
            self._ready = json.loads(self._nursery.stdout.readline()) == "ready"
        self._nursery.stdin.write(json.dumps(order) + "\n")
        self._nursery.stdin.flush()
        return int(json.loads(self._nursery.stdout.readline()))

    def run(self, *arguments: object, cwd: Path, **env: str) -> Done:
        return self.start(*arguments, cwd=cwd, **env).wait()

    def close(self) -> None:
        assert self._nursery.stdin is not None
        self._nursery.stdin.close()
        self._nursery.wait(30)
        if self._nursery.stdout is not None:
            self._nursery.stdout.close()


def environment() -> dict[str, str]:
    """Returns the environment of a command: this one without settings that would reach the search."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AUTOPRUNE_", "MLFLOW_", "FORCE_COLOR"))}
    return kept | {"COLUMNS": "120", "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Runs commands in processes that need not import anything."""
    nursery = Commands(tmp_path_factory.mktemp("output"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory, commands: Commands) -> tuple[Path, Done]:
    """The folder of a finished search, run by the command that a user types, and what it printed."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "space.yaml").write_text(SPACE)
    command = [sys.executable, "-W", "error", "-m", "autoprune", "search", "space.yaml", "--workers", "1"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    return folder, Done(done.returncode, done.stdout, done.stderr)


class Store:
    """What the databases of a home folder hold, read with plain SQL: what is asserted is what is stored."""

    def __init__(self, folder: Path, name: str = "quick") -> None:
        self.home = folder / ".autoprune"
        self.name = name

    def rows(self, file: str, query: str, *values: object) -> list[tuple[Any, ...]]:
        path = self.home / file
        if not path.exists():
            return []
        with closing(sqlite3.connect(path, timeout=30)) as connection:
            return connection.execute(query, values).fetchall()

    def states(self) -> Counter[tuple[str, str]]:
        """Returns how many trials are in which state, by (rung, state)."""
        try:
            rows = self.rows(
                "optuna.db",
                "select study_name, state from trials join studies using (study_id) where study_name like ?",
                f"{self.name}.%",
            )
        except sqlite3.OperationalError:  # the tables are not made yet
            return Counter()
        return Counter((study.rpartition(".")[2], state) for study, state in rows)

    def trials(self) -> list[dict[str, Any]]:
        """Returns every trial with its attributes, objectives, parameters and constraints."""
        found = []
        for trial_id, number, state, study in self.rows(
            "optuna.db",
            "select trial_id, number, state, study_name from trials join studies using (study_id)"
            " where study_name like ? order by trial_id",
            f"{self.name}.%",
        ):
            read = "select key, value_json from {} where trial_id = ?"
            user = dict(self.rows("optuna.db", read.format("trial_user_attributes"), trial_id))
            system = dict(self.rows("optuna.db", read.format("trial_system_attributes"), trial_id))
            values = self.rows("optuna.db", "select value from trial_values where trial_id = ?", trial_id)
            names = self.rows("optuna.db", "select param_name from trial_params where trial_id = ?", trial_id)
            found.append(
                {
                    "study": study,
                    "rung": study.rpartition(".")[2],
                    "key": f"{study}/{number}",
                    "id": trial_id,
                    "state": state,
                    "user": {k: json.loads(v) for k, v in user.items()},
                    "system": {k: json.loads(v) for k, v in system.items()},
                    "values": [v for (v,) in values],
                    "params": {n for (n,) in names},
                }
            )
        return found

    def distinct(self) -> dict[str, int]:
        """Returns the number of distinct policies that were finished, by rung."""
        done = {(t["rung"], t["user"]["identity"]) for t in self.trials() if t["state"] == "COMPLETE"}
        return dict(Counter(rung for rung, _ in done))

    def runs(self, kind: str) -> list[dict[str, Any]]:
        """Returns every MLflow run of one kind of this search."""
        found = []
        for uuid, status in self.rows(
            "mlflow.db",
            "select r.run_uuid, status from runs r join tags k on k.run_uuid = r.run_uuid and k.key = 'kind'"
            " join tags s on s.run_uuid = r.run_uuid and s.key = 'autoprune.search' where k.value = ? and s.value = ?",
            kind,
            self.name,
        ):
            run: dict[str, Any] = {"id": uuid, "status": status}
            for table in ("tags", "params", "latest_metrics"):
                run[table] = dict(self.rows("mlflow.db", f"select key, value from {table} where run_uuid = ?", uuid))
            found.append(run)
        return found


def wait_for(condition: Any, *, seconds: float = 60.0) -> bool:
    """Waits until `condition()` holds; returns whether it came to hold."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return False


@pytest.fixture(scope="session")
def store_of() -> type[Store]:
    """Opens the databases of a folder."""
    return Store


@pytest.fixture(scope="session")
def await_condition() -> Any:
    """Waits for a condition."""
    return wait_for


@pytest.fixture(scope="session")
def space_text() -> str:
    """The small space's file."""
    return SPACE
