"""`autoprune profile` on a whole space: a table, JSON, and traces, without a study."""

import json
from pathlib import Path

from typer.testing import CliRunner

from autoprune.cli import app

SPACE = Path(__file__).parents[2] / "search_spaces" / "iris_mlp.yaml"
QUICK = ["--repeats", "1", "--steps", "2", "--set", "recipe.baseline.epochs=2"]


def test_a_profile_shows_preparation_and_both_kinds_of_trials_and_stores_no_study(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["profile", str(SPACE), "--home", str(tmp_path), "--json", *QUICK])
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert [row["stage"] for row in data["preparation"]] == ["data and model", "trace", "learning"]
    assert [trial["rung"] for trial in data["trials"]] == ["screen", "tune"]
    assert data["trials"][1]["steps"] == 2
    assert data["bookkeeping_seconds"] > 0
    assert all(Path(path).is_file() for path in data["traces"])
    assert len(data["traces"]) == 2
    assert not (tmp_path / "optuna.db").exists()


def test_a_space_that_does_not_exist_is_refused_with_status_two(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["profile", str(tmp_path / "none.yaml"), "--home", str(tmp_path)])
    assert done.exit_code == 2
    assert "none.yaml" in done.stderr
