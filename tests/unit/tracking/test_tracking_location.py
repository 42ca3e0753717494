"""Where the tracking store lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoprune.errors import TrackingError
from autoprune.tracking.location import artifact_root, resolve_uri, server_settings, sqlite_path, ui_address

REPOSITORY = Path(__file__).parents[3]


def write_settings(directory: Path, text: str) -> None:
    (directory / "mlflow").mkdir(exist_ok=True)
    (directory / "mlflow" / "server.env").write_text(text, encoding="utf-8")


def test_the_environment_wins_over_the_servers_settings(tmp_path: Path) -> None:
    write_settings(tmp_path, "MLFLOW_BACKEND_STORE_URI=sqlite:///mlflow/data/mlflow.db\n")
    env = {"MLFLOW_TRACKING_URI": "http://tracker:5000"}
    assert resolve_uri(tmp_path / "home", env, directory=tmp_path) == "http://tracker:5000"


def test_the_servers_settings_win_over_home_and_are_relative_to_the_working_directory(tmp_path: Path) -> None:
    write_settings(tmp_path, "# where\nMLFLOW_BACKEND_STORE_URI='sqlite:///mlflow/data/mlflow.db?timeout=5' # here\n")
    uri = resolve_uri(tmp_path / "home", {}, directory=tmp_path)
    assert uri == f"sqlite:///{tmp_path}/mlflow/data/mlflow.db?timeout=5"
    assert (tmp_path / "mlflow" / "data").is_dir()
    assert artifact_root(uri, home=tmp_path) == tmp_path / "mlflow" / "data" / "artifacts"


def test_without_settings_the_store_is_a_file_under_home(tmp_path: Path) -> None:
    uri = resolve_uri(Path("state"), {"MLFLOW_TRACKING_URI": " "}, directory=tmp_path)
    assert sqlite_path(uri) == tmp_path / "state" / "mlflow.db"
    assert (tmp_path / "state").is_dir()


def test_a_folder_that_cannot_be_made_is_a_tracking_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="cannot make the folder"):
        resolve_uri(tmp_path / "file" / "home", {}, directory=tmp_path)


@pytest.mark.parametrize("line", ["just words", "A='open", "1A=2", "A=b c"])
def test_a_line_that_is_no_assignment_is_named(tmp_path: Path, line: str) -> None:
    write_settings(tmp_path, f"# comment\n{line}\n")
    with pytest.raises(TrackingError, match=r"server\.env, line 2"):
        server_settings(tmp_path)


def test_a_server_address_has_no_artifact_root_of_ours(tmp_path: Path) -> None:
    assert artifact_root("http://tracker:5000", home=tmp_path) is None


def test_files_of_a_database_that_is_written_directly_lie_where_its_server_looks(tmp_path: Path) -> None:
    uri, home = "postgresql+psycopg://me@db/mlflow", Path("state")
    assert artifact_root(uri, home=home, directory=tmp_path) == tmp_path / "state" / "artifacts"
    write_settings(tmp_path, "MLFLOW_ARTIFACTS_DESTINATION=mlflow/data/artifacts\n")
    assert artifact_root(uri, home=home, directory=tmp_path) == tmp_path / "mlflow" / "data" / "artifacts"
    write_settings(tmp_path, "MLFLOW_ARTIFACTS_DESTINATION=s3://bucket/models\n")
    with pytest.raises(TrackingError, match="set MLFLOW_TRACKING_URI"):
        artifact_root(uri, home=home, directory=tmp_path)


def test_the_environment_names_the_database_before_the_settings_do(tmp_path: Path) -> None:
    write_settings(tmp_path, "MLFLOW_BACKEND_STORE_URI=sqlite:///mlflow/data/mlflow.db\n")
    env = {"MLFLOW_BACKEND_STORE_URI": "postgres://me@db/mlflow"}
    assert resolve_uri(tmp_path, env, directory=tmp_path) == "postgresql+psycopg://me@db/mlflow"
    env["MLFLOW_TRACKING_URI"] = "http://tracker:5000"
    assert resolve_uri(tmp_path, env, directory=tmp_path) == "http://tracker:5000"


def test_the_pages_lie_at_the_server_or_where_make_starts_it(tmp_path: Path) -> None:
    assert ui_address("https://tracker:5000/", directory=tmp_path) == "https://tracker:5000"
    assert ui_address("sqlite:///x.db", directory=tmp_path) == "http://127.0.0.1:5000"
    write_settings(tmp_path, "export MLFLOW_PORT=5050\n")
    assert ui_address("sqlite:///x.db", directory=tmp_path) == "http://127.0.0.1:5050"


def test_the_shipped_settings_are_read_and_keep_to_this_machine() -> None:
    settings = server_settings(REPOSITORY)
    assert settings["MLFLOW_HOST"] == "127.0.0.1"
    assert settings["MLFLOW_WORKERS"] == "1"
    assert settings["MLFLOW_BACKEND_STORE_URI"] == "sqlite:///mlflow/data/mlflow.db"
    assert settings["MLFLOW_ARTIFACTS_DESTINATION"] == "mlflow/data/artifacts"
    assert settings["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
