"""A search that is killed, interrupted or run twice at once loses and repeats nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

RUNGS = {"screen": 10, "tune": 5, "final": 4, "controls": 3}
SEARCH = ("search", "space.yaml", "--name", "killed", "--workers")
# Longer trials, so that a signal finds something in flight.
SLOWER = ("--set", "search.ladder.1.epochs=20", "--set", "search.ladder.2.epochs=20")


@pytest.fixture
def folder(searched: Any, tmp_path: Path) -> Path:
    """A folder with a trained baseline and an MLflow store that holds another search."""
    copy = tmp_path / "copy"
    shutil.copytree(searched[0], copy)
    return copy


def finished(store: Any) -> int:
    return sum(count for (_, state), count in store.states().items() if state == "COMPLETE")


def kept_results(store: Any) -> dict[str, Any]:
    return {t["key"]: t["user"]["result"] for t in store.trials() if t["state"] == "COMPLETE"}


def check_whole(store: Any) -> None:
    """Checks that a search which was stopped and resumed is as good as one that never stopped."""
    trials = store.trials()
    assert store.distinct() == RUNGS
    assert {trial["state"] for trial in trials} <= {"COMPLETE", "FAIL"}
    left = [trial for trial in trials if trial["state"] == "FAIL"]
    assert all(trial["user"]["abandoned"] for trial in left)
    complete = [trial for trial in trials if trial["state"] == "COMPLETE"]
    fresh = [(t["rung"], t["user"]["identity"]) for t in complete if "reused" not in t["user"]]
    assert len(fresh) == len(set(fresh)) == sum(RUNGS.values())
    runs = store.runs("trial")
    assert sorted(run["tags"]["autoprune.trial"] for run in runs) == sorted(trial["key"] for trial in complete)
    assert {run["status"] for run in (*runs, *store.runs("search"))} == {"FINISHED"}
    assert len(store.runs("search")) == 1
    for trial in complete:
        assert all(value <= 0 for value in trial["system"]["constraints"])
    shown = {t["user"]["origin"] for t in complete if t["rung"] == "final"}
    assert sum(run["tags"]["pareto"] == "true" for run in runs) <= len(shown)
    assert any(run["tags"]["pareto"] == "true" for run in runs)


def test_killed_at_three_random_moments_a_search_ends_as_if_it_never_was(
    folder: Path, commands: Any, store_of: Any, await_condition: Any
) -> None:
    store = store_of(folder, "killed")
    chance = random.Random(3)
    known: dict[str, Any] = {}
    for least in (1, sum(RUNGS.values()) // 2, sum(RUNGS.values()) - 3):
        running = commands.start(*SEARCH, "1", *SLOWER, cwd=folder)
        wanted = chance.randint(least, least + 3)
        assert await_condition(lambda wanted=wanted: finished(store) >= wanted)
        running.signal(signal.SIGKILL)
        assert running.wait().status in (-signal.SIGKILL, 0)
        found = kept_results(store)
        assert known.items() <= found.items()  # nothing that was finished changes
        known = found
    done = commands.run(*SEARCH, "1", *SLOWER, cwd=folder)
    assert done.status == 0, done.err
    assert known.items() <= kept_results(store).items()
    check_whole(store)
    again = commands.run(*SEARCH, "1", *SLOWER, cwd=folder)
    assert again.status == 0
    check_whole(store)
    front = json.loads(commands.run("front", "killed", "--json", cwd=folder).out)["front"]
    for point in front:
        assert commands.run("export", "killed", "--trial", point["trial"], cwd=folder).status == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_again_and_again_from_the_first_second_on_a_search_ends_whole(
    seed: int, commands: Any, store_of: Any, space_text: str, tmp_path: Path
) -> None:
    (tmp_path / "space.yaml").write_text(space_text)
    store = store_of(tmp_path, "killed")
    chance = random.Random(seed)
    workers = 1 + seed % 2
    for _ in range(8):
        running = commands.start(*SEARCH, workers, *SLOWER, cwd=tmp_path)
        time.sleep(chance.uniform(0.05, 12.0 if workers > 1 else 6.0))
        running.signal(signal.SIGKILL)
        assert running.wait().status in (-signal.SIGKILL, 0)
    done = commands.run(*SEARCH, workers, *SLOWER, cwd=tmp_path)
    assert done.status == 0, done.err
    check_whole(store)


def test_interrupted_a_search_ends_with_status_130_and_goes_on_later(
    folder: Path, commands: Any, store_of: Any, await_condition: Any
) -> None:
    store = store_of(folder, "killed")
    running = commands.start(*SEARCH, "1", *SLOWER, cwd=folder)
    assert await_condition(lambda: finished(store) >= RUNGS["screen"] + 2)
    running.signal(signal.SIGINT)
    done = running.wait()
    assert (done.status, done.out) == (130, "")
    assert "interrupted; the same command resumes where it stopped" in done.err
    assert "Traceback" not in done.err
    assert [run["status"] for run in store.runs("search")] == ["KILLED"]
    before = finished(store)
    done = commands.run(*SEARCH, "1", *SLOWER, cwd=folder)
    assert done.status == 0, done.err
    assert "10 of them finished earlier" in done.err
    check_whole(store)
    assert finished(store) > before


def test_interrupted_with_two_workers_a_search_leaves_no_process_behind_and_goes_on_with_one(
    folder: Path, commands: Any, store_of: Any, await_condition: Any
) -> None:
    store = store_of(folder, "killed")
    running = commands.start(*SEARCH, "2", *SLOWER, cwd=folder)
    assert await_condition(lambda: finished(store) >= RUNGS["screen"] + 1)
    assert len(session_of(running.pid)) >= 3
    running.signal(signal.SIGINT)
    done = running.wait()
    assert done.status == 130, done.err
    assert "Traceback" not in done.err
    assert await_condition(lambda: not session_of(running.pid), seconds=20)
    done = commands.run(*SEARCH, "1", *SLOWER, cwd=folder)
    assert done.status == 0, done.err
    check_whole(store)


def test_killed_while_its_workers_start_a_search_leaves_no_process_behind(
    folder: Path, commands: Any, await_condition: Any
) -> None:
    running = commands.start(*SEARCH, "2", *SLOWER, cwd=folder)
    assert await_condition(lambda: len(session_of(running.pid)) >= 3)
    running.signal(signal.SIGKILL)
    running.wait()
    assert await_condition(lambda: not session_of(running.pid), seconds=20)


def test_a_second_process_is_refused_while_the_first_runs_and_not_once_it_was_killed(
    folder: Path, commands: Any, store_of: Any, await_condition: Any
) -> None:
    search = (*SEARCH, "1", "--set", "search.ladder.1.epochs=500")
    store = store_of(folder, "killed")
    running = commands.start(*search, cwd=folder)
    assert await_condition(lambda: finished(store) >= RUNGS["screen"])
    done = commands.run(*search, cwd=folder)
    assert (done.status, done.out) == (2, "")
    assert f"by process {running.pid}" in done.err
    running.signal(signal.SIGKILL)
    assert running.wait().status == -signal.SIGKILL
    done = commands.run(*search, "--timeout", "0.01", cwd=folder)
    assert done.status == 0, done.err


def session_of(pid: int) -> list[int]:
    """Returns the living processes of the session that `pid` leads."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                state, _, _, session = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:4]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(session) == pid and state != "Z":
                found.append(int(entry))
    return found
