"""MLflow's server with logins, started as `autoprune serve` starts it: who has no password reads and writes nothing."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoprune.tracking import ServerPlan, server_plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("flask_wtf") is None, reason="mlflow[auth] is not installed"),
]
WAIT = 300
PASSWORD = "a-long-password-of-the-test"
REPOSITORY = Path(__file__).parents[2]
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=10"


def settings(port: int) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AUTOPRUNE_", "MLFLOW_"))}
    return kept | {
        "MLFLOW_PORT": str(port),
        "AUTOPRUNE_MLFLOW_AUTH": "basic-auth",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "signs-the-sessions-of-a-test",
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPlan]:
    folder = tmp_path_factory.mktemp("logins")
    (folder / "mlflow").mkdir()
    for name in ("server.env", "basic_auth.ini"):
        shutil.copy(REPOSITORY / "mlflow" / name, folder / "mlflow")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
    plan = server_plan(folder / ".autoprune", settings(port), directory=folder)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            plan.command, cwd=folder, env=dict(plan.env), stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_for(plan, process, folder / "log")
            yield plan
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(plan: ServerPlan, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(2 * WAIT):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{plan.address}/health", timeout=30):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def status(plan: ServerPlan, path: str, user: str = "", password: str = "", **headers: str) -> int:
    """Returns what the server answers to a request."""
    if user:
        headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    request = urllib.request.Request(plan.address + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=WAIT) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    ("user", "password"),
    [("", ""), ("admin", "guessed"), ("admin", "password1234"), ("admin", "password"), ("nobody", PASSWORD)],
    ids=["no login", "a wrong password", "MLflow's own password", "an older one", "an unknown user"],
)
def test_who_has_no_password_reads_nothing(server: ServerPlan, user: str, password: str) -> None:
    assert status(server, SEARCH, user, password) == 401
    assert status(server, "/", user, password) == 401
    assert status(server, "/api/2.0/mlflow-artifacts/artifacts", user, password) in (401, 404)


def test_the_administrator_comes_in_with_the_password_of_the_environment(server: ServerPlan) -> None:
    assert status(server, SEARCH, "admin", PASSWORD) == 200


def test_another_host_and_another_origin_are_refused_in_spite_of_the_password(server: ServerPlan) -> None:
    assert status(server, SEARCH, "admin", PASSWORD, Host="evil.example") == 403
    request = urllib.request.Request(
        f"{server.address}/api/2.0/mlflow/experiments/create",
        data=json.dumps({"name": "planted"}).encode(),
        headers={
            "Authorization": "Basic " + base64.b64encode(f"admin:{PASSWORD}".encode()).decode(),
            "Content-Type": "application/json",
            "Origin": "http://evil.example",
        },
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=WAIT)
    assert caught.value.code == 403
    caught.value.close()


def test_what_a_search_is_given_lets_it_record_and_its_absence_does_not(
    server: ServerPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(MlflowException, match="not authenticated"):
        MlflowClient(tracking_uri=server.address).create_experiment("anonymous")
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, server.recording[name])
    client = MlflowClient(tracking_uri=server.address)
    experiment = client.create_experiment("known")
    run = client.create_run(experiment)
    client.log_metric(run.info.run_id, "val_accuracy", 0.5)
    assert client.get_run(run.info.run_id).data.metrics == {"val_accuracy": 0.5}
    assert PASSWORD not in " ".join(server.command)
