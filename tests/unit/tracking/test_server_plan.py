"""How the tracking server is started, and who is let in."""

from __future__ import annotations

import importlib.util
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from autoprune.errors import InputError, MissingExtraError
from autoprune.tracking import is_loopback, local_address, server_plan

LOGIN = {
    "AUTOPRUNE_MLFLOW_AUTH": "basic-auth",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "k",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "geheim",
}


def plan(tmp_path: Path, **env: str) -> Any:
    return server_plan(tmp_path / "home", env, directory=tmp_path)


def test_without_settings_it_listens_on_loopback_and_searches_write_its_file_themselves(tmp_path: Path) -> None:
    found = plan(tmp_path)
    assert (found.host, found.port, found.address) == ("127.0.0.1", 5000, "http://127.0.0.1:5000")
    assert found.env["MLFLOW_WORKERS"] == "1"
    assert found.recording["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/home/mlflow.db"
    assert found.env["MLFLOW_ARTIFACTS_DESTINATION"] == f"{tmp_path}/home/artifacts"


def test_the_environment_wins_over_the_file_of_settings(tmp_path: Path) -> None:
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "server.env").write_text(
        "MLFLOW_PORT=6000\nMLFLOW_BACKEND_STORE_URI=sqlite:///mlflow/data/mlflow.db\n"
        "MLFLOW_ARTIFACTS_DESTINATION=mlflow/data/artifacts\n"
    )
    found = plan(tmp_path, MLFLOW_PORT="6001")
    assert found.port == 6001
    assert found.recording["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow/data/mlflow.db"
    assert found.env["MLFLOW_ARTIFACTS_DESTINATION"] == f"{tmp_path}/mlflow/data/artifacts"


def test_searches_write_to_another_database_through_the_server_and_no_password_is_on_its_command_line(
    tmp_path: Path,
) -> None:
    found = plan(tmp_path, MLFLOW_BACKEND_STORE_URI="postgresql://me:geheim@db/mlflow")
    assert found.recording["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert "geheim" not in " ".join(found.command)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "build-machine", ""])
def test_an_interface_that_others_reach_is_refused_without_a_login(tmp_path: Path, host: str) -> None:
    with pytest.raises(InputError, match="would let other machines in without a login"):
        plan(tmp_path, MLFLOW_HOST=host)


def test_with_a_login_any_interface_will_do_and_searches_log_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    found = plan(tmp_path, MLFLOW_HOST="0.0.0.0", **LOGIN)
    assert found.command[-2:] == ("--app-name", "basic-auth")
    assert found.address == "http://127.0.0.1:5000"
    assert found.recording["MLFLOW_TRACKING_USERNAME"] == "admin"
    assert found.recording["MLFLOW_TRACKING_PASSWORD"] == "geheim"
    assert "geheim" not in " ".join(found.command)


@pytest.mark.parametrize("missing", ["MLFLOW_FLASK_SERVER_SECRET_KEY", "MLFLOW_AUTH_ADMIN_PASSWORD"])
def test_a_login_that_cannot_work_is_refused_with_what_is_missing(tmp_path: Path, missing: str) -> None:
    with pytest.raises(InputError, match=f"needs {missing}"):
        plan(tmp_path, **{name: value for name, value in LOGIN.items() if name != missing})


def test_an_unknown_login_and_one_whose_package_is_not_installed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="AUTOPRUNE_MLFLOW_AUTH=none is unknown; valid: basic-auth"):
        plan(tmp_path, AUTOPRUNE_MLFLOW_AUTH="none")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mlflow\[auth\]'"):
        plan(tmp_path, **LOGIN)


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1", ""])
def test_what_is_no_port_is_refused(tmp_path: Path, port: str) -> None:
    with pytest.raises(InputError, match="is no port"):
        plan(tmp_path, MLFLOW_PORT=port)


def test_loopback_and_local_addresses() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost", "[::1]"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.com", ""))
    assert local_address("0.0.0.0", 5) == "http://127.0.0.1:5"
    assert local_address("::1", 5) == "http://[::1]:5"


@pytest.mark.slow
def test_a_new_store_has_its_tables_before_the_server_begins(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    code = "import sys; from autoprune.tracking import prepare_store; prepare_store(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, f"sqlite:///{path}"], check=True)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("select count(*) from experiments").fetchone() is not None


@pytest.mark.parametrize("value", ["true", "TRUE", "1"])
def test_the_checks_of_host_and_origin_stay_on(tmp_path: Path, value: str) -> None:
    with pytest.raises(InputError, match="turns off MLflow's checks of host and origin"):
        plan(tmp_path, MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE=value)
