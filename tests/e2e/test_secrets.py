"""A password in an address is used, and stands nowhere afterwards: no file, no database, no output."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PASSWORD = "correct-horse-battery"
OPTIONS = (
    "--trials",
    "4",
    "--workers",
    "1",
    "--set",
    "search.ladder=[{rung: screen}, {rung: tune, epochs: 1, trials: 3}]",
    "--set",
    "search.controls=0",
)


def holders(*folders: Path) -> list[str]:
    """Returns the files that hold the password."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if PASSWORD.encode() in path.read_bytes()]


def test_a_password_of_a_tracking_server_that_is_away_is_not_shown(commands: Any, tmp_path: Path) -> None:
    done = commands.run("reproduce", "0" * 32, cwd=tmp_path, MLFLOW_TRACKING_URI=f"http://anna:{PASSWORD}@127.0.0.1:9")
    assert done.status == 3
    assert "anna:***@127.0.0.1:9" in done.err
    assert PASSWORD not in done.out + done.err


@pytest.mark.slow
def test_a_search_whose_tracking_server_is_away_keeps_its_password_to_itself(
    commands: Any, space_text: str, tmp_path: Path
) -> None:
    (tmp_path / "space.yaml").write_text(space_text)
    away = {"MLFLOW_TRACKING_URI": f"http://anna:{PASSWORD}@127.0.0.1:9"}
    done = commands.run("search", "space.yaml", *OPTIONS, cwd=tmp_path, **away)
    assert done.status == 0
    assert PASSWORD not in done.out + done.err
    assert holders(tmp_path) == []


@pytest.mark.parametrize("option", ["--storage", "AUTOPRUNE_STORAGE"])
def test_a_password_of_a_database_that_is_away_is_shown_nowhere(
    option: str, commands: Any, space_text: str, tmp_path: Path
) -> None:
    (tmp_path / "space.yaml").write_text(space_text)
    url = f"postgresql://anna:{PASSWORD}@127.0.0.1:9/studies"
    given = ("--storage", url) if option == "--storage" else ()
    env = {} if given else {option: url}
    for arguments in (("search", "space.yaml"), ("front", "quick"), ("dashboard",)):
        done = commands.run(*arguments, *given, cwd=tmp_path, **env)
        assert done.status == 2
        assert PASSWORD not in done.out + done.err
        assert "Traceback" not in done.err
    assert holders(tmp_path) == []


def test_a_space_whose_values_hold_a_password_is_refused(commands: Any, space_text: str, tmp_path: Path) -> None:
    hidden = "model={name: mlp, arguments: {in_features: 4, source: '${SOURCE}'}}"
    (tmp_path / "space.yaml").write_text(space_text)
    address = {"SOURCE": f"postgresql://anna:{PASSWORD}@db/weights"}
    done = commands.run("search", "space.yaml", "--set", hidden, cwd=tmp_path, **address)
    assert done.status == 2
    assert "model.arguments.source: an address with a password would be stored" in done.err
    assert PASSWORD not in done.out + done.err


@pytest.fixture
def server(tmp_path: Path) -> Iterator[int]:
    """An MLflow server on a free port; its store is in `tmp_path/server`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    folder = tmp_path / "server"
    folder.mkdir()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder)]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@pytest.mark.slow
def test_a_password_that_logs_in_is_stored_nowhere(server: int, commands: Any, space_text: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "space.yaml").write_text(space_text)
    uri = f"http://anna:{PASSWORD}@127.0.0.1:{server}"
    outputs = [
        commands.run(*arguments, cwd=work, MLFLOW_TRACKING_URI=uri)
        for arguments in (
            ("search", "space.yaml", *OPTIONS),
            ("report", "quick"),
            ("pick", "quick", "--max-macs", "1.0"),
            ("export", "quick"),
            ("sync", "quick"),
            ("front", "quick", "--json"),
        )
    ]
    for done in outputs:
        assert done.status == 0, done.err
        assert PASSWORD not in done.out + done.err
    assert f"http://127.0.0.1:{server}/#/" in outputs[0].out, "the links work without the password"
    assert b"quick" in (tmp_path / "server/mlflow.db").read_bytes()
    assert holders(work, tmp_path / "server") == []
