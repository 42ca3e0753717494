"""Kills a running search's processes at random moments and counts what was lost: `make chaos`.

A search of quick trials runs on two workers with PostgreSQL for its studies, another database of the same server for
MLflow, and MLflow's server in between. A kill is `kill -9` of a worker, of the coordinator, of every process of the
MLflow server, or of PostgreSQL; what was killed is started again after about a second. The moments are drawn over the
whole run: most when so many trials have finished, every fourth a random pause after the one before, so that starts and
recoveries are hit as well. The same search runs once undisturbed, on SQLite and without a server.

The sampler is `random`: its k-th proposal depends on the seed and k alone, so that both runs must measure the same
policies and find the same front. Samplers that learn propose by what has finished, in the order in which it finished:
with two workers two undisturbed runs of TPE differ already.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

NAME = "chaos"
TARGETS = ("worker", "coordinator", "mlflow", "postgres")
SPACE = f"""\
schema: 1
name: {NAME}
model: {{name: mlp, arguments: {{in_features: 64, hidden: [64, 48, 32], num_classes: 10}}}}
data: {{name: digits, validation: {{source: train, fraction: 0.3}}, calibration: 64}}
budget: {{macs: 0.6, front: [0.1, 0.6]}}
criteria: {{choices: [l2, obs], scope: layer}}
recipe: {{batch_size: 128, lr: 0.02, precision: float32, baseline: {{epochs: 15, lr: 0.05}}}}
search:
  trials: 200
  sampler: random
  controls: 0
  ladder:
    - {{rung: screen, epochs: 0}}
device: cpu
"""
"""A ladder of one rung stores each trial when it begins, so that kills find trials that are running."""


def environment(**own: str) -> dict[str, str]:
    """Returns the environment of a command: this one without settings that would reach the search."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AUTOPRUNE_", "MLFLOW_"))}
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "NO_COLOR": "1", "COLUMNS": "120"}
    return kept | quiet | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | own


@dataclass
class Command:
    """A process with everything that it starts, and how to start it again."""

    arguments: list[str]
    folder: Path
    log: Path
    env: dict[str, str]
    starts: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.starts += 1
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.arguments, cwd=self.folder, env=self.env, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def status(self) -> int | None:
        """The exit status; None while it runs or before it was started."""
        return self.process.poll() if self.process is not None else None

    def kill(self, *, whole: bool) -> bool:
        """Kills the process, or its whole session; returns whether there was something to kill."""
        if self.process is None or self.process.poll() is not None:
            return False
        if whole:
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait()
        return True


@dataclass
class Chaos:
    """One disturbed run and what was done to it."""

    folder: Path
    server: Any
    chance: random.Random
    trials: int
    seen: dict[str, tuple[str, tuple[float, ...]]] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    waking: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.studies = self.server.url("studies")
        port = _free_port()
        backend = self.server.url("mlflow")
        self.address = f"http://127.0.0.1:{port}"
        program = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", backend, "--workers", "1"]
        place = ["--port", str(port), "--artifacts-destination", str(self.folder / "artifacts")]
        self.mlflow = Command([*program, *place], self.folder, self.folder / "mlflow.log", environment())
        env = environment(MLFLOW_TRACKING_URI=self.address, AUTOPRUNE_STORAGE=self.studies)
        search = search_command(self.trials)
        self.coordinator = Command(search, self.folder, self.folder / "search.log", env)

    def look(self) -> int:
        """Reads the finished trials; notes each, and whether one that was finished before is gone or has changed."""
        found = finished(self.studies)
        self.changed += [key for key, value in self.seen.items() if found.get(key) != value]
        self.seen |= found
        return len({identity for identity, _ in found.values()})

    def strike(self, target: str) -> bool:
        """Kills one target; it is started again after a second or so. Returns whether there was something to kill."""
        if target == "postgres":
            self.server.kill()
            hit = True
        elif target == "worker":
            hit = kill_worker(self.coordinator, self.chance)
        else:
            command = self.mlflow if target == "mlflow" else self.coordinator
            hit = command.kill(whole=target == "mlflow")
        if hit:
            self.kills[target] += 1
            if target != "worker":  # the coordinator starts its workers itself
                self.waking.append((time.monotonic() + self.chance.uniform(0.5, 1.5), target))
        return hit

    def wake(self) -> None:
        """Starts again what was killed long enough ago, and a coordinator that ended with an error."""
        now = time.monotonic()
        due = [target for moment, target in self.waking if moment <= now]
        self.waking = [(moment, target) for moment, target in self.waking if moment > now]
        for target in due:
            if target == "postgres":
                self.server.start()
            else:
                (self.mlflow if target == "mlflow" else self.coordinator).start()
        if self.coordinator.status not in (None, 0, -signal.SIGKILL):
            time.sleep(1.0)
            self.coordinator.start()

    def down(self, target: str) -> bool:
        return any(name == target for _, name in self.waking)

    def run(self, kills: int, limit: float) -> float:
        """Runs the search to its end through so many kills; returns the seconds that it took."""
        begun = time.monotonic()
        self.mlflow.start()
        self.coordinator.start()
        plan = schedule(kills, self.trials, self.chance)
        upcoming = next(plan)
        armed: float | None = None
        done = 0
        while time.monotonic() - begun < limit:
            self.wake()
            if not self.down("postgres"):
                done = self.look()
            if upcoming is not None:
                threshold, pause = upcoming
                if armed is None and done >= threshold:
                    armed = time.monotonic() + pause
                if armed is not None and time.monotonic() >= armed:
                    up = [target for target in TARGETS if not self.down(target)]
                    if any(self.strike(target) for target in self.chance.sample(up, len(up))):
                        upcoming, armed = next(plan, None), None
                if self.coordinator.status == 0:  # done before the last kill: run again, it must repeat nothing
                    self.coordinator.start()
            elif self.coordinator.status == 0 and not self.waking:
                return time.monotonic() - begun
            time.sleep(0.05)
        raise TimeoutError(f"not done after {limit:.0f} s; see {self.folder}")

    def settle(self) -> int:
        """Runs the command again until MLflow has everything, as its last words ask for; returns how often."""
        times = 0
        while "records wait" in self.coordinator.log.read_text().rpartition("Next:")[0][-400:]:
            wait_for_http(self.address)
            times += 1
            self.coordinator.log.write_text("")
            self.coordinator.start()
            assert self.coordinator.process is not None
            if self.coordinator.process.wait(300) != 0 or times > 5:
                raise RuntimeError(self.coordinator.log.read_text()[-2000:])
        return times

    def close(self) -> None:
        self.coordinator.kill(whole=True)
        self.mlflow.kill(whole=True)


def schedule(kills: int, trials: int, chance: random.Random) -> Iterator[tuple[int, float]]:
    """Yields (finished trials to wait for, then seconds to wait) for each kill."""
    thresholds = sorted(chance.randrange(trials) for _ in range(kills - kills // 4))
    moments = [(threshold, chance.uniform(0.0, 0.5)) for threshold in thresholds]
    for _ in range(kills // 4):
        place = chance.randrange(1, len(moments))
        moments.insert(place, (moments[place - 1][0], chance.uniform(0.1, 12.0)))
    yield from moments


def search_command(trials: int) -> list[str]:
    return [sys.executable, "-m", "autoprune", "search", "space.yaml", "--workers", "2", "--trials", str(trials)]


def kill_worker(coordinator: Command, chance: random.Random) -> bool:
    """Kills one of the coordinator's evaluating processes."""
    if coordinator.process is None:
        return False
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == coordinator.process.pid and b"spawn_main" in command:
                found.append(int(entry.name))
    if found:
        os.kill(chance.choice(found), signal.SIGKILL)
    return bool(found)


def rows_of(url: str, query: str) -> list[tuple[Any, ...]]:
    import sqlalchemy

    engine = sqlalchemy.create_engine(url)
    try:
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sqlalchemy.text(query))]
    except (sqlalchemy.exc.ProgrammingError, sqlalchemy.exc.OperationalError) as error:
        if "no such table" in str(error) or "does not exist" in str(error):
            return []  # not made yet
        raise
    finally:
        engine.dispose()


def finished(url: str) -> dict[str, tuple[str, tuple[float, ...]]]:
    """Returns identity and objectives of every finished trial, by study and number, as the database holds them."""
    rows = rows_of(
        url,
        "select study_name, number, objective, value, value_json from trials join studies using (study_id)"
        " join trial_values using (trial_id) join trial_user_attributes using (trial_id)"
        " where state = 'COMPLETE' and key = 'identity' order by trial_id, objective",
    )
    found: dict[str, tuple[str, tuple[float, ...]]] = {}
    for study, number, _, value, identity in rows:
        key = f"{study}/{number}"
        found[key] = (json.loads(identity), (*found.get(key, ("", ()))[1], value))
    return found


def wait_for_http(address: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"{address} does not answer")


def front_of(folder: Path, env: dict[str, str]) -> set[tuple[float, int]]:
    """Returns accuracy and cost of every point of a search's front; trials' numbers depend on the order."""
    command = [sys.executable, "-m", "autoprune", "front", NAME, "--json"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    return {(point["val_accuracy"], point["macs"]) for point in json.loads(done.stdout)["front"]}


def undisturbed(folder: Path, trials: int) -> tuple[dict[str, tuple[float, ...]], set[tuple[float, int]], float]:
    """Runs the same search alone; returns the objectives by identity, the front and the seconds."""
    folder.mkdir()
    (folder / "space.yaml").write_text(SPACE)
    begun = time.monotonic()
    done = subprocess.run(search_command(trials), cwd=folder, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    took = time.monotonic() - begun
    values = dict(finished(f"sqlite:///{folder}/.autoprune/optuna.db").values())
    return values, front_of(folder, environment()), took


def measure(trials: int, kills: int, seed: int, *, limit: float = 1800.0) -> dict[str, Any]:
    """Runs both searches and returns what was counted."""
    root = Path(tempfile.mkdtemp(prefix="autoprune-chaos-"))
    server = load("postgres_server", Path(__file__).parents[1] / "postgres_server.py").PostgresServer()
    folder = root / "disturbed"
    folder.mkdir()
    (folder / "space.yaml").write_text(SPACE)
    chaos = Chaos(folder, server, random.Random(seed), trials)
    try:
        values, front, alone = undisturbed(root / "undisturbed", trials)
        took = chaos.run(kills, limit)
        again = chaos.settle()
        chaos.look()
        states = rows_of(chaos.studies, "select state, number, study_name from trials join studies using (study_id)")
        kept = finished(chaos.studies)
        reused = rows_of(chaos.studies, "select trial_id from trial_user_attributes where key = 'reused'")
        abandoned = rows_of(chaos.studies, "select trial_id from trial_user_attributes where key = 'abandoned'")
        runs = Counter(key for key, _ in rows_of(server.url("mlflow"), _RUNS))
        open_runs = [key for key, status in rows_of(server.url("mlflow"), _RUNS) if status == "RUNNING"]
        expected = {f"{study}/{number}" for state, number, study in states if state == "COMPLETE"}
        result = {
            "trials": trials,
            "kills": sum(chaos.kills.values()),
            **{f"kills of {name}": chaos.kills[name] for name in TARGETS},
            "starts of the coordinator": chaos.coordinator.starts,
            "runs of the command that only recorded": again,
            "distinct finished": len({identity for identity, _ in kept.values()}),
            "lost or changed": len(set(chaos.changed)),
            "repeated": len(kept) - len(reused) - len({identity for identity, _ in kept.values()}),
            "still running": sum(state == "RUNNING" for state, *_ in states),
            "failed": sum(state == "FAIL" for state, *_ in states) - len(abandoned),
            "abandoned and begun again": len(abandoned),
            "missing in MLflow": len(expected - runs.keys()),
            "several runs in MLflow": sum(count > 1 for count in runs.values()),
            "runs of no finished trial": len(runs.keys() - expected),
            "runs left open": len(open_runs),
            "same policies and results": dict(kept.values()) == values,
            "same front": front_of(folder, chaos.coordinator.env) == front,
            "points of the front": len(front),
            "seconds": round(took),
            "seconds undisturbed": round(alone),
            "postgres": server.version,
            "seed": seed,
        }
    finally:
        chaos.close()
        server.close()
    shutil.rmtree(root)
    return result


_RUNS = (
    "select t.value, r.status from runs r join tags t on t.run_uuid = r.run_uuid and t.key = 'autoprune.trial'"
    " where r.lifecycle_stage = 'active'"
)

ZERO = (
    "lost or changed",
    "repeated",
    "still running",
    "failed",
    "missing in MLflow",
    "several runs in MLflow",
    "runs of no finished trial",
    "runs left open",
)


def faults(result: dict[str, Any]) -> list[str]:
    """Returns what must not be."""
    found = [f"{name}: {result[name]}" for name in ZERO if result[name]]
    found += [f"{name}: no" for name in ("same policies and results", "same front") if not result[name]]
    if result["distinct finished"] != result["trials"]:
        found.append(f"distinct finished: {result['distinct finished']} of {result['trials']}")
    return found


def document(results: list[dict[str, Any]]) -> str:
    """Returns the results as Markdown, one column a run."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "optuna", "mlflow", "psycopg", "sqlalchemy"))
    first = results[0]
    rows = {name: [_word(result[name]) for result in results] for name in first if name not in ("postgres", "seed")}
    lines = [
        "# A search whose processes are killed",
        "",
        f"`make chaos`: {first['trials']} quick trials on 2 workers, {first['kills']} times `kill -9`. What each kill",
        "is, when they come, and why the sampler is `random`: the head of `tests/benchmarks/chaos.py`.",
        "",
        f"| | {' | '.join('seed ' + str(result['seed']) for result in results)} |",
        "|---" * (len(results) + 1) + "|",
        *(f"| {name} | {' | '.join(values)} |" for name, values in rows.items()),
        "",
        f"{len(os.sched_getaffinity(0))} cores of {processor()} (shared with other work), Python"
        f" {platform.python_version()}, {versions}, {first['postgres']}.",
        "",
    ]
    return "\n".join(lines)


def _word(value: object) -> str:
    return {True: "yes", False: "**no**"}[value] if isinstance(value, bool) else str(value)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def load(name: str, path: Path) -> Any:
    """Loads a module of the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="a run for each")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    chosen = parser.parse_args()
    results = []
    for seed in chosen.seeds:
        results.append(measure(chosen.trials, chosen.kills, seed))
        print(json.dumps(results[-1], indent=1), flush=True)
        for fault in faults(results[-1]):
            print(f"FAULT {fault}", file=sys.stderr)
    if chosen.output:
        chosen.output.write_text(document(results), encoding="utf-8")
    return 1 if any(faults(result) for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
