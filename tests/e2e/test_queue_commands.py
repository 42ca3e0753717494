"""The commands of the queue without a service: what they say, what they refuse, and with which status."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def folder(tmp_path: Path, space_text: str) -> Path:
    (tmp_path / "space.yaml").write_text(space_text)
    return tmp_path


def test_a_search_is_submitted_shown_refused_twice_cancelled_and_submitted_again(folder: Path, commands: Any) -> None:
    submit = ("submit", "space.yaml", "--priority", 2, "--trials", 4, "--timeout", "30m", "--set", "seed=3")
    done = commands.run(*submit, cwd=folder)
    assert (done.status, done.out) == (0, "submitted: quick (job 0, priority 2)\n")
    again = commands.run(*submit, cwd=folder)
    assert (again.status, again.out) == (2, "")
    assert "the search 'quick' is queued already" in again.err
    shown = commands.run("status", cwd=folder)
    assert "1 search waits for `autoprune serve`" in shown.out
    (job,) = json.loads(commands.run("status", "quick", "--json", cwd=folder).out)["jobs"]
    wanted = {"state": "queued", "priority": 2, "trials": 4, "timeout": 1800.0, "directory": str(folder)}
    assert {key: job[key] for key in wanted} == wanted
    gone = commands.run("cancel", "quick", cwd=folder)
    assert (gone.status, gone.out) == (0, "quick: cancelled; it had not begun\n")
    assert "cancelled" in commands.run("status", cwd=folder).out
    assert commands.run("submit", "space.yaml", cwd=folder).out == "submitted: quick (job 1, priority 0)\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("status",), "there is no search in .autoprune yet"),
        (("cancel", "quick"), "there is no search in .autoprune yet"),
        (("logs", "quick"), "the search 'quick' has no log"),
        (("logs", "quick", "--follow"), "there is no search in .autoprune yet"),
        (("submit", "nowhere.yaml"), "there is no such file"),
        (("submit", "space.yaml", "--set", "checkpoint=gone.pt"), "there is no file 'gone.pt'"),
    ],
)
def test_what_is_not_there_is_told_with_status_2(
    folder: Path, commands: Any, arguments: tuple[str, ...], message: str
) -> None:
    done = commands.run(*arguments, cwd=folder)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert "Traceback" not in done.err


def test_an_unknown_name_is_told_with_the_nearest_one(folder: Path, commands: Any) -> None:
    commands.run("submit", "space.yaml", cwd=folder)
    for command in ("status", "cancel"):
        done = commands.run(command, "quikc", cwd=folder)
        assert done.status == 2
        assert "did you mean 'quick'?" in done.err


def test_a_service_refuses_a_port_that_is_taken_and_an_open_door(folder: Path, commands: Any) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = commands.run("serve", cwd=folder, MLFLOW_PORT=port)
    assert done.status == 2
    assert f"MLflow (MLFLOW_PORT) cannot listen on 127.0.0.1:{port}" in done.err
    done = commands.run("serve", cwd=folder, MLFLOW_HOST="0.0.0.0")
    assert done.status == 2
    assert "would let other machines in without a login" in done.err


def test_the_log_of_a_finished_search_is_read_as_text_and_as_it_is_stored(searched: Any, commands: Any) -> None:
    folder, _ = searched
    text = commands.run("logs", "quick", cwd=folder)
    assert text.status == 0
    assert "tune trial 0: val_accuracy" in text.out
    followed = commands.run("logs", "quick", "--follow", cwd=folder)
    assert followed.out == text.out
    entries = [json.loads(line) for line in commands.run("logs", "quick", "--json", cwd=folder).out.splitlines()]
    trials = [entry for entry in entries if entry["event"] == "trial_finished"]
    assert len(trials) == 22
    assert all({"trial", "rung", "executor", "time", "level"} <= set(entry) for entry in trials)
    assert entries[-1]["event"] == "search_finished"
    row = json.loads(commands.run("status", "quick", "--json", cwd=folder).out)["rows"][0]
    assert (row["state"], row["rung"], row["done"], row["total"]) == ("finished", "final", 4, 4)
