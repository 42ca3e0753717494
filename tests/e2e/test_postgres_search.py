"""A search with its studies and its records in PostgreSQL, without an MLflow server: the commands that a team types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_folders_share_the_studies_and_the_records_of_one_server(
    postgres_server: Any, commands: Any, space_text: str, tmp_path: Path
) -> None:
    studies, records = postgres_server.url("team_studies"), postgres_server.url("team_mlflow")
    plain = studies.replace("postgresql+psycopg://", "postgresql://")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "space.yaml").write_text(space_text)
    env = {"MLFLOW_BACKEND_STORE_URI": records}
    search = ("search", "space.yaml", "--workers", "1")

    refused = commands.run(*search, "--storage", plain, cwd=first, MLFLOW_BACKEND_STORE_URI=plain)
    assert refused.status == 2
    assert "need databases of their own" in refused.err

    done = commands.run(*search, "--storage", plain, cwd=first, **env)
    assert done.status == 0, done.err
    assert "records wait" not in done.out
    assert not (first / ".autoprune" / "optuna.db").exists()
    assert not (first / ".autoprune" / "mlflow.db").exists()
    assert not (first / "mlruns").exists()
    assert list((first / ".autoprune" / "artifacts").rglob("front.html"))

    env["AUTOPRUNE_STORAGE"] = studies
    front = commands.run("front", "quick", "--json", cwd=second, **env)
    assert front.status == 0, front.err
    assert json.loads(front.out)["front"]
    again = commands.run("sync", "quick", cwd=first, **env)
    assert again.status == 0, again.err
    missing = commands.run("front", "other", cwd=second, **env)
    assert missing.status == 2
    assert "there is no search 'other'" in missing.err

    postgres_server.kill()
    away = commands.run("front", "quick", cwd=second, **env)
    postgres_server.start()
    assert away.status == 2
    assert "cannot use postgresql+psycopg://autoprune@127.0.0.1" in away.err
    assert "Traceback" not in away.err
