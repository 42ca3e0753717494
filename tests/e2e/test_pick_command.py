"""From a finished search to a model on disk by the commands that a user types: pick, export, finetune, reproduce, sync.

Each test works on its own copy of a finished search; commands run in processes of their own.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

import autoprune


@pytest.fixture
def folder(searched: Any, tmp_path: Path) -> Path:
    """A copy of a finished search; its MLflow artifacts stay where they were written."""
    shutil.copytree(searched[0] / ".autoprune", tmp_path / ".autoprune")
    return tmp_path


def change(folder: Path, statement: str, *values: object) -> None:
    """Does to the MLflow store what a person does by clicking."""
    with sqlite3.connect(folder / ".autoprune/mlflow.db", timeout=30) as connection:
        assert connection.execute(statement, values).rowcount == 1


def version_of(folder: Path, trial: int) -> int:
    with sqlite3.connect(folder / ".autoprune/mlflow.db") as connection:
        query = "select version from model_version_tags where key = 'trial' and value = ?"
        return int(connection.execute(query, (str(trial),)).fetchone()[0])


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return autoprune.load(folder).state_dict()


def same(a: Path, b: Path) -> bool:
    """Whether two folders hold the very same model."""
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def front_of(commands: Any, folder: Path) -> list[dict[str, Any]]:
    return list(json.loads(commands.run("front", "quick", "--json", cwd=folder).out)["front"])


def model_of(folder: Path, trial: int) -> Path:
    """The saved model of a final trial, as MLflow's record of it says."""
    with sqlite3.connect(folder / ".autoprune/mlflow.db") as connection:
        query = "select i.value from tags i join tags o using (run_uuid) join tags r using (run_uuid)"
        query += (
            " where i.key = 'identity' and o.key = 'origin' and o.value = ? and r.key = 'rung' and r.value = 'final'"
        )
        (identity,) = connection.execute(query, (str(trial),)).fetchone()
    return folder / ".autoprune/models/quick" / f"final-{identity}"


def test_a_pick_by_wish_is_exported_with_its_card_and_trained_longer(commands: Any, folder: Path) -> None:
    front = front_of(commands, folder)
    done = commands.run("pick", "quick", "--min-accuracy", "0.5", cwd=folder)
    assert (done.status, done.out) == (0, f"picked: quick, trial {front[0]['trial']}\n")
    assert "has the alias picked" in done.err
    done = commands.run("export", "quick", "--evaluate", cwd=folder)
    assert done.status == 0, done.err
    target = folder / f"exports/quick-{front[0]['trial']}"
    assert [Path(line).name for line in done.out.splitlines()] == ["model.safetensors", "policy.json", "README.md"]
    assert same(target, model_of(folder, front[0]["trial"]))
    card = (target / "README.md").read_text()
    for part in ("## Dense and pruned", "| measured latency |", "## By class, val (36 samples)", "setosa", '"recipe"'):
        assert part in card
    done = commands.run("finetune", "quick@picked", "--epochs", "2", cwd=folder)
    assert done.status == 0, done.err
    assert f"trial {front[0]['trial']}, trained 2 epochs longer" in done.out
    assert commands.run("export", "quick@finetuned", "--output", "longer", cwd=folder).status == 0
    before, after = state_of(target), state_of(folder / "longer")
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert not same(target, folder / "longer")
    assert "fine-tuned from" in (folder / "longer/README.md").read_text()


def test_what_is_picked_in_the_ui_is_exported(commands: Any, folder: Path) -> None:
    small, large = (point["trial"] for point in front_of(commands, folder))
    insert = "insert into registered_model_aliases (alias, version, name, workspace) values ('picked', ?, ?, 'default')"
    change(folder, insert, version_of(folder, large), "autoprune-quick")
    assert commands.run("export", "quick", "--output", "a", cwd=folder).status == 0
    assert same(folder / "a", model_of(folder, large))
    with sqlite3.connect(folder / ".autoprune/mlflow.db") as connection:
        query = "select run_uuid from tags where key = 'autoprune.trial' and value like 'quick.final/%' and run_uuid in"
        query += " (select run_uuid from tags where key = 'origin' and value = ?)"
        (run,) = connection.execute(query, (str(small),)).fetchone()
    change(folder, "insert into tags (key, value, run_uuid) values ('pick', 'true', ?)", run)
    done = commands.run("export", "quick", "--output", "b", cwd=folder)
    assert done.status == 2
    assert "several models are picked" in done.err
    assert not (folder / "b").exists()
    done = commands.run("export", "quick", cwd=folder)
    assert done.status == 0, done.err
    assert sorted(path.name for path in (folder / "exports").iterdir()) == sorted([f"quick-{small}", f"quick-{large}"])
    assert same(folder / f"exports/quick-{small}", model_of(folder, small))


def test_without_a_pick_the_command_says_how_to_pick(commands: Any, folder: Path) -> None:
    done = commands.run("export", "quick", cwd=folder)
    assert done.status == 2
    assert "no model of quick is picked" in done.err
    assert "autoprune pick quick --knee" in done.err
    done = commands.run("export", "quick@knea", cwd=folder)
    assert done.status == 2
    assert "no alias" in done.err or "has the alias 'knea'" in done.err
    assert "knee" in done.err


def test_a_recorded_trial_is_reproduced_to_the_last_digit(commands: Any, folder: Path) -> None:
    with sqlite3.connect(folder / ".autoprune/mlflow.db") as connection:
        query = "select run_uuid from tags where key = 'rung' and value = ? limit 1"
        runs = [connection.execute(query, (rung,)).fetchone()[0] for rung in ("final", "controls")]
    for run in runs:
        done = commands.run("reproduce", run, cwd=folder)
        assert done.status == 0, done.out + done.err
        assert re.search(r"val_loss +recorded [\d.]+ +now [\d.]+ +equal", done.out)
        assert done.out.endswith("the same channels are kept\nreproduced exactly\n")
    change(folder, "update latest_metrics set value = 0.123 where key = 'val_accuracy' and run_uuid = ?", runs[0])
    done = commands.run("reproduce", runs[0], cwd=folder)
    assert done.status == 1
    assert "not reproduced exactly" in done.out
    done = commands.run("reproduce", "deadbeef", cwd=folder)
    assert done.status == 2
    assert "there is no run 'deadbeef'" in done.err


def test_a_search_that_mlflow_never_saw_is_recorded_later_once(
    commands: Any, folder: Path, store_of: Any, tmp_path: Path
) -> None:
    before = {kind: len(store_of(folder).runs(kind)) for kind in ("trial", "search")}
    (folder / ".autoprune/mlflow.db").unlink()
    for name in ("mlflow.db-wal", "mlflow.db-shm"):
        (folder / ".autoprune" / name).unlink(missing_ok=True)
    trial = front_of(commands, folder)[0]["trial"]
    done = commands.run("pick", "quick", "--trial", trial, cwd=folder)
    assert done.status == 0
    assert "MLflow is away; the pick is kept with the study" in done.err
    assert commands.run("export", "quick", cwd=folder).status == 0
    for _ in range(2):
        done = commands.run("sync", "quick", cwd=folder)
        assert done.status == 0, done.err
        assert re.search(r"2 models of the front, .*; picked: quick\.final/\d", done.out)
        assert {kind: len(store_of(folder).runs(kind)) for kind in ("trial", "search")} == before
    rows = store_of(folder).rows("mlflow.db", "select alias from registered_model_aliases")
    assert {"picked", "smallest", "most-accurate"} == {alias for (alias,) in rows}
    assert len(store_of(folder).rows("mlflow.db", "select version from model_versions")) == 2


def test_a_server_that_is_away_is_a_clear_error_of_sync_and_delays_nothing_else(commands: Any, folder: Path) -> None:
    away = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = commands.run("sync", "quick", cwd=folder, **away)
    assert done.status == 3
    assert "MLflow is away" in done.err
    trial = front_of(commands, folder)[0]["trial"]
    assert commands.run("pick", "quick", "--trial", trial, cwd=folder, **away).status == 0
    assert commands.run("export", "quick@picked", "--output", "out", cwd=folder, **away).status == 0
    assert same(folder / "out", model_of(folder, trial))
