"""Processes of the service: they end with their parent, leave nothing behind, and keep to their cores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autoprune.coordinator.service.children import TOKEN, Child, Command, end_all, kill_leftovers

# A program with a child of its own, whose process id it writes down.
FAMILY = """
import subprocess, sys, time, pathlib
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(60)
"""


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command(code: str, *arguments: object, folder: Path, **settings: object) -> Command:
    program = [sys.executable, "-S", "-c", code, *map(str, arguments)]
    return Command(program, {**os.environ, **settings.pop("env", {})}, folder, **settings)


def number_in(path: Path) -> int:
    assert wait_for(lambda: path.is_file() and path.read_text() != "")
    return int(path.read_text())


def test_the_exit_status_and_output_are_those_of_the_program(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        child = Child(command("import os; print(os.getcwd(), flush=True); raise SystemExit(3)", folder=tmp_path), out)
        assert wait_for(lambda: child.ended() is not None)
    assert child.ended() == 3
    assert (tmp_path / "out").read_text().strip() == str(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds a process to cores")
def test_a_program_sees_only_the_cores_that_it_was_given(tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    with (tmp_path / "out").open("wb") as out:
        child = Child(command("import os; print(os.sched_getaffinity(0))", folder=tmp_path, cpus=[core]), out)
        assert wait_for(lambda: child.ended() is not None)
    assert (tmp_path / "out").read_text().strip() == str({core})


def test_a_child_that_is_killed_leaves_no_child_of_its_own_behind(tmp_path: Path) -> None:
    child = Child(command(FAMILY, tmp_path / "pid", folder=tmp_path), subprocess.DEVNULL)
    grandchild = number_in(tmp_path / "pid")
    os.kill(child.pid, signal.SIGKILL)
    assert wait_for(lambda: child.ended() == -signal.SIGKILL)
    assert wait_for(lambda: not lives(grandchild))


def test_a_child_that_does_not_listen_is_killed_after_the_patience(tmp_path: Path) -> None:
    deaf = "import signal, sys, time, pathlib; signal.signal(15, signal.SIG_IGN);"
    deaf += "pathlib.Path(sys.argv[1]).write_text('1'); time.sleep(60)"
    child = Child(command(deaf, tmp_path / "ready", folder=tmp_path), subprocess.DEVNULL)
    number_in(tmp_path / "ready")
    end_all([child], patience=0.2)
    assert child.ended() == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    parent = (
        "import os, sys, time, pathlib; from autoprune.coordinator.service.children import Child, Command;"
        "child = Child(Command([sys.executable, '-S', '-c', 'import time; time.sleep(60)'], os.environ,"
        " pathlib.Path.cwd()), -3); pathlib.Path(sys.argv[1]).write_text(str(child.pid)); time.sleep(60)"
    )
    running = subprocess.Popen([sys.executable, "-c", parent, str(tmp_path / "pid")])
    child = number_in(tmp_path / "pid")
    assert lives(child)
    running.kill()
    running.wait()
    assert wait_for(lambda: not lives(child))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_what_a_killed_service_left_behind_is_found_by_its_token_and_nothing_else_is(tmp_path: Path) -> None:
    sleep = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    ours = subprocess.Popen(sleep, env={**os.environ, TOKEN: "abc"})
    other = subprocess.Popen(sleep, env={**os.environ, TOKEN: "abcd"})
    assert wait_for(lambda: b"time.sleep" in Path(f"/proc/{ours.pid}/cmdline").read_bytes())
    assert kill_leftovers("abc") == [ours.pid]
    assert ours.wait() == -signal.SIGKILL
    assert other.poll() is None
    other.kill()
    other.wait()
