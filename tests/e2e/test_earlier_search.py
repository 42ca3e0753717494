"""A search that version 0.1.0 stored, killed in the middle of its last rung, goes on and is read by today's code.

`tests/assets/search-0.1.0.tar.xz` holds its space file and its home folder: studies, models, caches and log.
"""

from __future__ import annotations

import json
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

NAME = "iris-mlp"
STORED = Path(__file__).parents[1] / "assets" / "search-0.1.0.tar.xz"
TRIALS = "select study_name, number, value from trials join studies using (study_id) join trial_values using (trial_id)"


def values(folder: Path) -> set[tuple[Any, ...]]:
    with closing(sqlite3.connect(folder / "home" / "optuna.db")) as connection:
        return set(connection.execute(TRIALS).fetchall())


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, commands: Any) -> tuple[Path, set[tuple[Any, ...]], Any]:
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(STORED) as archive:
        archive.extractall(folder, filter="data")
    before = values(folder)
    done = commands.run(
        "search", "iris.yaml", "--home", "home", cwd=folder, MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db"
    )
    return folder, before, done


def test_it_goes_on_where_it_stopped_and_repeats_nothing(resumed: Any) -> None:
    folder, before, done = resumed
    assert done.status == 0, done.err
    assert "final: 4 trials, 2 of them finished earlier" in done.err
    assert "training a baseline" not in done.err  # what was learnt is read from its cache
    assert "learning about" not in done.err
    assert before <= values(folder)


def test_its_front_is_shown_and_a_model_exported(resumed: Any, commands: Any) -> None:
    folder, _, _ = resumed
    shown = commands.run("front", NAME, "--home", "home", "--json", cwd=folder)
    assert shown.status == 0, shown.err
    trial = json.loads(shown.out)["front"][0]["trial"]
    done = commands.run("export", NAME, "--trial", trial, "--home", "home", "--output", "exported", cwd=folder)
    assert done.status == 0, done.err
    assert (folder / "exported" / "model.safetensors").is_file()


def test_a_trial_that_it_stored_is_reproduced_to_the_last_digit(resumed: Any, commands: Any) -> None:
    folder, _, _ = resumed
    with closing(sqlite3.connect(folder / "mlflow.db")) as connection:
        trial = ("autoprune.trial", f"{NAME}.final/0")
        runs = connection.execute("select run_uuid from tags where key = ? and value = ?", trial).fetchall()
    assert len(runs) == 1
    uri = f"sqlite:///{folder}/mlflow.db"
    done = commands.run("reproduce", runs[0][0], "--home", "home", cwd=folder, MLFLOW_TRACKING_URI=uri)
    assert done.status == 0, done.err
    assert done.out.rstrip().endswith("\nreproduced exactly")
