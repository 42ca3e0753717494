"""Searches on Ray: two nodes of which one is killed, the client server, Python; and tasks that die or hang there."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from autoprune.coordinator.stored.search import read_search
from autoprune.errors import InputError, TrialError
from autoprune.executors import Beat, Limits, RayExecutor, Share

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WAIT = 300
SPACE = """\
schema: 1
name: quick
model: {name: mlp, arguments: {in_features: 4, hidden: [24, 16]}}
data: {name: iris, validation: {source: train, fraction: 0.3}, calibration: 32}
budget: {macs: 0.6}
criteria: {choices: [l2, obs]}
recipe: {batch_size: 16, lr: 0.02, precision: float32, baseline: {epochs: 40, lr: 0.05}}
search:
  trials: 24
  controls: 0
  ladder:
    - {rung: screen, epochs: 0}
    - {rung: final, epochs: 20, trials: 6, test: true}
device: cpu
"""


def act(beat: Beat, kind: str, path: str = "") -> object:
    if path:
        with Path(path).open("a") as file:
            file.write(f"{os.getpid()}\n")
    if kind == "die":
        os._exit(7)
    if kind == "hang":
        time.sleep(1000)
    return kind


def factory(beat: Beat) -> Callable[..., object]:
    return partial(act, beat)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one processor each on this machine."""
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's own 15 starves them beside other work
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        made.add_node(num_cpus=1)
        yield made
    finally:
        made.shutdown()


def bare_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("AUTOPRUNE_", "MLFLOW_"))}


def test_a_search_on_two_nodes_ends_whole_after_one_of_them_is_killed(cluster: Any, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    command = [sys.executable, "-m", "autoprune", "search", "space.yaml", "--ray", cluster.address]
    kept = bare_environment()
    with (tmp_path / "err").open("w") as err:
        search = subprocess.Popen(command, cwd=tmp_path, env=kept, stderr=err, stdout=subprocess.DEVNULL)
        try:
            wait_for_trials(tmp_path / ".autoprune", 3, search)
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
            status = search.wait(WAIT)
        finally:
            search.kill()
            search.wait()
    assert status == 0, (tmp_path / "err").read_text()
    stored = read_search("quick", home=tmp_path / ".autoprune")
    states = Counter((rung, trial.state) for rung in stored.order for trial in stored.rungs[rung])
    assert states["screen", "complete"] >= 24
    assert states["final", "complete"] == 6
    assert {state for _, state in states} == {"complete"}
    for trial in stored.rungs["final"]:
        assert trial.result is not None
        assert json.loads((tmp_path / str(trial.result.model_path) / "policy.json").read_text())["policy"]


def wait_for_trials(home: Path, count: int, search: subprocess.Popen[bytes]) -> None:
    for _ in range(20 * WAIT):
        assert search.poll() is None, (home.parent / "err").read_text()
        if (home / "optuna.db").exists():
            try:
                with closing(sqlite3.connect(home / "optuna.db")) as connection:
                    (found,) = connection.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()
            except sqlite3.OperationalError:  # its tables are being made
                found = 0
            if found >= count:
                return
        time.sleep(0.05)
    raise AssertionError("the search did not begin")


TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
"""Ray's own default for clusters of one machine since 2.59; its client has to be told."""


@pytest.fixture
def client_server(tmp_path: Path) -> Iterator[str]:
    """The address of the client server of a cluster of this machine that no other command finds by itself."""
    pytest.importorskip("ray")
    pytest.importorskip("grpc", reason="Ray's client needs ray[client]")
    ports = []
    for _ in range(2):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            ports.append(int(one.getsockname()[1]))
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"),
        *("--node-ip-address=127.0.0.1", f"--port={ports[0]}", f"--ray-client-server-port={ports[1]}"),
        *("--include-dashboard=false", "--disable-usage-stats"),
    ]
    env = bare_environment() | TOKEN | {"RAY_worker_niceness": "0"}
    with (tmp_path / "ray.log").open("wb") as log:
        head = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            for _ in range(WAIT):
                assert head.poll() is None, (tmp_path / "ray.log").read_text()
                with suppress(OSError), socket.create_connection(("127.0.0.1", ports[1]), timeout=1):
                    break
                time.sleep(1)
            yield f"ray://127.0.0.1:{ports[1]}"
        finally:
            head.terminate()
            try:
                head.wait(60)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(head.pid, signal.SIGKILL)


def test_a_search_through_the_client_server_of_a_cluster_with_a_token_ends_whole(
    client_server: str, tmp_path: Path
) -> None:
    (tmp_path / "space.yaml").write_text(SPACE.replace("trials: 24", "trials: 8").replace("trials: 6", "trials: 2"))
    command = [sys.executable, "-m", "autoprune", "search", "space.yaml", "--ray", client_server]
    done = subprocess.run(
        command, cwd=tmp_path, env=bare_environment() | TOKEN, capture_output=True, text=True, timeout=3 * WAIT
    )
    assert done.returncode == 0, done.stderr
    stored = read_search("quick", home=tmp_path / ".autoprune")
    counts = Counter((rung, trial.state) for rung in stored.order for trial in stored.rungs[rung])
    assert counts == {("screen", "complete"): 8, ("final", "complete"): 2}
    for trial in stored.rungs["final"]:  # models came back from the cluster
        assert trial.result is not None
        assert (tmp_path / str(trial.result.model_path) / "model.safetensors").is_file()


SCRIPT = """\
import torch
import autoprune
from nets import Net, quarters

result = autoprune.search(
    Net(), data={{"train": quarters(200), "test": quarters(64)}}, budget={{"macs": 0.6}}, trials=6, name="script",
    ray="{address}", workers=2, recipe={{"batch_size": 32, "precision": "float32"}}, device="cpu",
    search={{"controls": 0, "ladder": [{{"rung": "screen", "epochs": 0}}]}},
)
assert result.complete and result.front
print(len(result.front), "points")
"""
MODULE = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x):
        return self.layers(x)


def quarters(count):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(count))
    return x, (x[:, 0] * x[:, 1] > 0).long()
"""


def test_a_search_from_python_runs_on_a_cluster(cluster: Any, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(MODULE)
    (tmp_path / "script.py").write_text(SCRIPT.format(address=cluster.address))
    env = bare_environment() | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=3 * WAIT
    )
    assert done.returncode == 0, done.stderr
    assert "points" in done.stdout
    log = (tmp_path / ".autoprune" / "logs" / "script.jsonl").read_text()
    assert '"executor": "ray"' in log


def test_a_task_that_dies_or_hangs_twice_on_the_cluster_fails_alone(cluster: Any, tmp_path: Path) -> None:
    died, hung = tmp_path / "died", tmp_path / "hung"
    with RayExecutor(factory, cluster.address, limits=Limits(silence=5.0)) as executor:
        assert executor.workers == 2
        deadly, hanging = executor.submit("die", str(died)), executor.submit("hang", str(hung))
        with pytest.raises(TrialError, match=r"died 2 times: .* \(Ray does not tell the signal: a fault"):
            deadly.result(timeout=WAIT)
        with pytest.raises(TrialError, match="no progress for 5 s, 2 times"):
            hanging.result(timeout=WAIT)
        assert executor.submit("fine").result(timeout=WAIT) == "fine"
    assert [len(path.read_text().splitlines()) for path in (died, hung)] == [2, 2]


def test_a_cluster_without_room_for_one_task_is_refused(cluster: Any) -> None:
    with pytest.raises(InputError, match=r"2 processors and 0 GPUs: no room for an evaluation, which takes 1 and 0\.5"):
        RayExecutor(factory, cluster.address, share=Share(gpus=0.5))


def test_an_address_without_a_cluster_is_refused_with_what_to_do() -> None:
    pytest.importorskip("ray")
    with pytest.raises(InputError, match="no Ray cluster was found here: start one by `ray start --head`"):
        RayExecutor(factory, "auto")
    with pytest.raises(InputError, match="HOST:PORT or ray://HOST:PORT, got 'somewhere'"):
        RayExecutor(factory, "somewhere")
    with pytest.raises(InputError, match=r"the Ray cluster at '127\.0\.0\.1:9' cannot be reached"):
        RayExecutor(factory, "127.0.0.1:9")
