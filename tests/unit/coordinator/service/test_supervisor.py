"""The supervisor: what dies or hangs is started again, everything ends with it, and there is one of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autoprune.coordinator.service import supervising
from autoprune.coordinator.service.children import TOKEN, Command
from autoprune.coordinator.service.supervising import Service, Supervisor, answers, beats, serving
from autoprune.coordinator.stored.service_state import read_service, service_folder
from autoprune.errors import StudyError
from autoprune.files import write_whole

SLEEP = "import time; print('ready', flush=True); time.sleep(60)"


class Stage:
    """A supervisor whose clock a test moves; real processes."""

    def __init__(self, folder: Path, checks: dict[str, Any], code: str = SLEEP) -> None:
        self.now = 0.0
        self.checks = checks
        self.said: list[str] = []
        program = [sys.executable, "-S", "-c", code]
        services = [
            Service(
                name,
                Command(program, dict(os.environ), folder),
                lambda name=name: self.checks[name],
                f"http://127.0.0.1/{name}",
                patience=2.0,
            )
            for name in checks
        ]
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.supervisor = Supervisor(services, folder, token="t", say=self.said.append, clock=lambda: self.now)
        self.supervisor._checker.start()

    def rows(self) -> dict[str, dict[str, Any]]:
        self.supervisor.step()
        return {row["name"]: row for row in json.loads((self.folder / "state.json").read_text())["services"]}

    def until(self, condition: Callable[[dict[str, dict[str, Any]]], bool]) -> dict[str, dict[str, Any]]:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            rows = self.rows()
            if condition(rows):
                return rows
            time.sleep(0.01)
        raise AssertionError(f"{rows}, {self.said}")

    def end(self) -> None:
        self.supervisor._over.set()
        self.supervisor._end(lambda: False)


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stage]]:
    monkeypatch.setattr(supervising, "_CHECK_SECONDS", 0.01)
    monkeypatch.setattr(supervising, "_PAUSE_SECONDS", 0.01)
    made: list[Stage] = []

    def make(checks: dict[str, Any], code: str = SLEEP) -> Stage:
        made.append(Stage(tmp_path / "service", checks, code))
        return made[-1]

    yield make
    for stage in made:
        stage.end()


def test_what_dies_is_started_again_and_later_each_time(stages: Callable[..., Stage]) -> None:
    stage = stages({"a": None, "b": None})
    rows = stage.until(lambda rows: all(row["state"] == "healthy" for row in rows.values()))
    other = rows["b"]["pid"]
    waits = []
    for restart in range(1, 4):
        os.kill(rows["a"]["pid"], signal.SIGKILL)
        rows = stage.until(lambda rows: rows["a"]["state"] == "waiting")
        assert rows["a"]["reason"].startswith("killed by signal 9")
        begun = stage.now
        while rows["a"]["state"] == "waiting":
            stage.now += 0.5
            rows = stage.rows()
        waits.append(stage.now - begun)
        rows = stage.until(lambda rows: rows["a"]["state"] == "healthy")
        assert rows["a"]["restarts"] == restart
    assert waits == [1.0, 2.0, 4.0]
    assert (rows["b"]["pid"], rows["b"]["restarts"]) == (other, 0)
    stage.now += 100.0  # steady: the next death is forgiven
    os.kill(rows["a"]["pid"], signal.SIGKILL)
    rows = stage.until(lambda rows: rows["a"]["restarts"] == 4)
    assert any(text.startswith("a: killed") and text.endswith("again in 0 s") for text in stage.said)


def test_what_hangs_is_killed_and_started_again_and_one_slow_answer_is_forgiven(stages: Callable[..., Stage]) -> None:
    stage = stages({"a": None})
    first = stage.until(lambda rows: rows["a"]["state"] == "healthy")["a"]["pid"]
    stage.checks["a"] = "does not answer"
    assert stage.until(lambda rows: rows["a"]["state"] == "failing")["a"]["reason"] == "does not answer"
    stage.checks["a"] = None
    rows = stage.until(lambda rows: rows["a"]["state"] == "healthy")
    assert (rows["a"]["pid"], rows["a"]["reason"]) == (first, "")
    stage.checks["a"] = "does not answer"
    stage.until(lambda rows: rows["a"]["state"] == "waiting")
    stage.checks["a"] = None
    stage.now += 5.0
    rows = stage.until(lambda rows: rows["a"]["state"] == "healthy")
    assert rows["a"]["pid"] != first


def test_what_never_answers_is_started_again_only_after_its_grace(stages: Callable[..., Stage]) -> None:
    stage = stages({"a": "does not answer"})
    first = stage.until(lambda rows: rows["a"]["pid"] is not None)["a"]["pid"]
    time.sleep(0.2)
    for _ in range(20):
        assert stage.rows()["a"]["pid"] == first
    stage.now += supervising.GRACE_SECONDS
    stage.until(lambda rows: rows["a"]["pid"] is None)
    stage.now += 1.0
    second = stage.until(lambda rows: rows["a"]["pid"] is not None)["a"]["pid"]
    stage.now += 1.5 * supervising.GRACE_SECONDS  # a machine may be that busy: the second start gets twice the time
    time.sleep(0.2)
    for _ in range(20):
        assert stage.rows()["a"]["pid"] == second
    stage.now += 0.5 * supervising.GRACE_SECONDS
    stage.until(lambda rows: rows["a"]["pid"] is None)


def test_what_a_process_prints_is_kept_and_stays_bounded(
    stages: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "_MOST_OUTPUT", 4_000)
    stage = stages({"a": None}, "for i in range(5000): print('line', i)")
    stage.until(lambda rows: rows["a"]["state"] == "waiting" and "line 4999" in rows["a"]["reason"])
    files = sorted(stage.folder.glob("a.out*"))
    assert [file.name for file in files] == ["a.out", "a.out.1"]
    assert all(file.stat().st_size <= 4_000 for file in files)
    assert files[0].read_text().endswith("line 4999\n")


def test_told_to_stop_it_ends_every_process_and_forgets_its_state(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "service", {"a": None, "b": None})
    stage.supervisor._over.set()
    pids = [row["pid"] for row in stage.rows().values()]
    stage.end()
    assert not (stage.folder / "state.json").exists()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_one_service_a_home_folder_and_nobody_is_told_of_one_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "_LOCK_SECONDS", 0.1)
    assert read_service(tmp_path) is None
    with serving(tmp_path) as held:
        found = read_service(tmp_path) or {}
        assert found["pid"] == os.getpid()
        assert held.token not in json.dumps(found)
        with pytest.raises(StudyError, match=f"runs on .* already: process {os.getpid()}"), serving(tmp_path):
            pass
    assert read_service(tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_what_a_killed_service_left_behind_is_ended_by_the_next_one(tmp_path: Path) -> None:
    with serving(tmp_path) as held:
        orphan = subprocess.Popen([sys.executable, "-S", "-c", SLEEP], env={**os.environ, TOKEN: held.token})
        assert orphan.poll() is None
        write_whole(service_folder(tmp_path) / "before.json", (service_folder(tmp_path) / "state.json").read_text())
    os.replace(service_folder(tmp_path) / "before.json", service_folder(tmp_path) / "state.json")
    with serving(tmp_path) as held:
        assert held.left == (orphan.pid,)
    assert orphan.wait() == -signal.SIGKILL


def test_a_page_that_nobody_serves_and_a_beat_that_stopped_are_ill(tmp_path: Path) -> None:
    assert "does not answer" in str(answers("http://127.0.0.1:9/", seconds=1.0)())
    check = beats(tmp_path / "beat", seconds=10.0)
    assert check() == "has not begun yet"
    (tmp_path / "beat").touch()
    assert check() is None
    os.utime(tmp_path / "beat", (0, 0))
    assert str(check()).startswith("has done nothing for ")
