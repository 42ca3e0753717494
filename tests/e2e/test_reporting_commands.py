"""The commands that tell what a search has found and why, as a user types them."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def front(searched: Any, commands: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(commands.run("front", "quick", "--json", cwd=searched[0]).out)
    return found


def test_a_front_member_is_explained_group_by_group(searched: Any, commands: Any, front: Any) -> None:
    trial = front["front"][0]["trial"]
    done = commands.run("explain", "quick", "--trial", str(trial), cwd=searched[0])
    assert done.status == 0, done.err
    assert f"quick, trial {trial}: validation accuracy" in done.out
    assert "\x1b" not in done.out
    data = json.loads(commands.run("explain", "quick", "--trial", str(trial), "--json", cwd=searched[0]).out)
    assert {g["group"]: g["width"] for g in data["groups"]} == front["front"][0]["widths"]
    assert data["total"] == front["front"][0]["macs"]
    assert all(g["down"] or g["up"] for g in data["groups"])
    assert sum(g["weight"] for g in data["groups"]) == pytest.approx(len(data["groups"]))  # learned from ten trials


def test_trials_are_put_side_by_side(searched: Any, commands: Any, front: Any) -> None:
    first, last = front["front"][0]["trial"], front["front"][-1]["trial"]
    done = commands.run("compare", "quick", str(first), str(last), cwd=searched[0])
    assert done.status == 0, done.err
    assert f"trial {first}" in done.out
    assert "differs most" in done.out
    data = json.loads(commands.run("compare", "quick", str(last), str(first), "--json", cwd=searched[0]).out)
    assert [t["trial"] for t in data["trials"]] == [last, first]
    assert [t["costs"]["macs"] for t in data["trials"]] == [front["front"][-1]["macs"], front["front"][0]["macs"]]


def test_the_report_is_one_file_at_the_place_that_is_printed(searched: Any, commands: Any, tmp_path: Path) -> None:
    done = commands.run("report", "quick", "--output", str(tmp_path / "r.html"), cwd=searched[0])
    assert done.status == 0, done.err
    assert done.out.strip() == str(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert text.rstrip().endswith("</html>")
    assert "name: quick" in text
    assert 'src="http' not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("explain", "quick", "--trial", "999"), "no finished trial 999"),
        (("explain", "quikc", "--trial", "1"), "did you mean 'quick'"),
        (("compare", "quick", "1"), "at least two different trials"),
        (("report", "nothing"), "no search 'nothing'"),
        (("report", "quick", "--output", "."), "is a folder"),
    ],
)
def test_what_cannot_be_told_is_refused_with_a_reason(
    searched: Any, commands: Any, arguments: tuple[str, ...], said: str
) -> None:
    done = commands.run(*arguments, cwd=searched[0])
    assert done.status == 2
    assert said in done.err
    assert "Traceback" not in done.err


def test_a_terminal_gets_a_picture_of_the_front_and_a_pipe_the_table_alone(searched: Any, commands: Any) -> None:
    assert "● front" not in commands.run("front", "quick", cwd=searched[0]).out
    reader, writer = pty.openpty()
    settings = {**os.environ, "COLUMNS": "110", "LINES": "50", "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "autoprune", "front", "quick"]
    process = subprocess.Popen(command, cwd=searched[0], env=settings, stdout=writer, stderr=subprocess.DEVNULL)
    os.close(writer)
    seen, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([reader], [], [], 0.2)[0]:
            try:
                seen += os.read(reader, 65536)
            except OSError:  # Linux says so when the other end is closed
                break
        elif process.poll() is not None:
            break
    os.close(reader)
    assert process.wait(30) == 0
    assert "● front" in seen.decode()
    assert "★ dense" in seen.decode()
