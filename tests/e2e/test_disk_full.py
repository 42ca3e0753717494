"""A disk that is full or must not be written: one clear error, and a storage that is as good as before."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from autoprune.cli.disk import disk_fault, with_hint

Mount = Callable[[str], Path]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a disk of a given size; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "autoprune-test", str(folder)]
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("only root may mount a disk")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Writes a file that leaves no space."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(b"\0" * 4096)
    assert shutil.disk_usage(disk).free == 0
    return ballast


def copied(searched: Any, disk: Path) -> Path:
    """Returns a folder on `disk` with a finished search in it."""
    folder = disk / "work"
    shutil.copytree(searched[0], folder)
    return folder


def plain(done: Any, *words: str, status: int) -> None:
    """Checks that a command ended with one clear error."""
    assert done.status == status, done.err
    assert "Traceback" not in done.err
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("autoprune: ")
    for word in words:
        assert word in last


def test_exports_and_reports_leave_nothing_on_a_full_disk(searched: Any, commands: Any, small_disk: Mount) -> None:
    disk = small_disk("60m")
    fill(disk)
    before = sorted(disk.rglob("*"))
    plain(commands.run("report", "quick", "--output", disk / "r.html", cwd=searched[0]), "No space left", status=2)
    wish = ("export", "quick@smallest", "--format", "safetensors", "--output", disk / "out")
    plain(commands.run(*wish, cwd=searched[0]), "No space left", str(disk / "out"), status=2)
    assert [path for path in sorted(disk.rglob("*")) if path not in before and path.is_file()] == []


def test_a_home_on_a_full_disk_is_told_before_anything_slow_and_stays_readable(
    searched: Any, commands: Any, small_disk: Mount
) -> None:
    folder = copied(searched, small_disk("80m"))
    whole = commands.run("front", "quick", "--json", cwd=folder).out
    ballast = fill(folder.parent)
    done = commands.run("search", "space.yaml", "--workers", "1", "--set", "search.trials=30", cwd=folder)
    plain(done, "free some space", status=done.status)
    assert done.status in (2, 3)
    assert commands.run("front", "quick", "--json", cwd=folder).out == whole
    ballast.unlink()
    with closing(sqlite3.connect(folder / ".autoprune/optuna.db")) as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)


def test_a_home_that_must_not_be_written_is_told(searched: Any, commands: Any, small_disk: Mount) -> None:
    folder = copied(searched, small_disk("80m"))
    subprocess.run(["mount", "-o", "remount,ro", str(folder.parent)], check=True)
    done = commands.run("search", "space.yaml", "--workers", "1", cwd=folder)
    plain(done, "the home folder .autoprune cannot be written: Read-only file system", status=2)
    plain(commands.run("report", "quick", cwd=folder), "Read-only file system", status=2)
    plain(commands.run("export", "quick@smallest", cwd=folder), "Read-only file system", status=2)


@pytest.mark.slow
def test_a_search_that_fills_its_disk_goes_on_once_there_is_space(
    commands: Any, space_text: str, store_of: Any, small_disk: Mount, await_condition: Any
) -> None:
    disk = small_disk("20m")
    (disk / "space.yaml").write_text(space_text.replace("trials: 10", "trials: 30"))
    store = store_of(disk)
    command = ("search", "space.yaml", "--workers", "1")
    running = commands.start(*command, cwd=disk)
    assert await_condition(lambda: store.states()[("screen", "COMPLETE")] >= 5, seconds=240)
    ballast = fill(disk)
    plain(running.wait(), "free some space", "the same command goes on", status=3)
    kept = store.distinct()["screen"]
    assert kept >= 5

    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
    done = commands.run(*command, cwd=disk)
    assert done.status == 0, done.err
    assert store.distinct() == {"screen": 30, "tune": 5, "final": 4, "controls": 3}
    finished = [t for t in store.trials() if t["state"] == "COMPLETE"]
    assert {t["state"] for t in store.trials()} <= {"COMPLETE", "FAIL"}
    assert len(store.runs("trial")) >= len({t["user"]["identity"] for t in finished if t["rung"] == "screen"})
    for file in ("optuna.db", "mlflow.db"):
        assert store.rows(file, "pragma integrity_check") == [("ok",)]


# --- the words ---


def test_a_full_and_a_locked_place_are_told_with_what_to_do() -> None:
    assert disk_fault(OSError(errno.ENOSPC, "No space left on device", "a/b")) == (
        "cannot write a/b: No space left on device; free some space; nothing that was finished is lost, and the same"
        " command goes on",
        3,
    )
    text, status = disk_fault(OSError(errno.EROFS, "Read-only file system", "a/b")) or ("", 0)
    assert (text.startswith("cannot use a/b: Read-only file system; name another place"), status) == (True, 2)
    assert disk_fault(OSError(errno.ENOENT, "No such file or directory", "a")) is None
    assert disk_fault(TimeoutError("late")) is None


def test_only_a_message_about_a_full_disk_gets_the_hint() -> None:
    assert with_hint("the storage x cannot be used: database or disk is full").endswith("the same command goes on")
    assert with_hint("there is no study") == "there is no study"
