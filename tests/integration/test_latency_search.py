"""A search under a limit on latency: the table is measured first, kept, and decides; what is measured is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import autoprune
from autoprune.cli import app
from autoprune.cost import LATENCY
from autoprune.errors import SpaceError, StudyError

LADDER = [
    {"rung": "screen", "epochs": 0},
    {"rung": "tune", "epochs": 0.5, "trials": 3},
    {"rung": "final", "epochs": 0.5, "trials": 2, "test": True},
]


@pytest.fixture(autouse=True)
def no_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)


def data() -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (240,), generator=generator)
    return {"train": (y[:, None, None, None] + 0.3 * torch.randn(240, 1, 16, 16, generator=generator), y)}


def model() -> nn.Module:
    """Returns a network whose time is that of its convolutions, not that of calling them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 2),
    )  # fmt: skip


def run(home: Path, **settings: Any) -> Any:
    recipe = {"batch_size": 32, "precision": "float32"}
    search = {"controls": 1, "ladder": LADDER}
    arguments: dict[str, Any] = {
        "data": data(), "budget": {"latency": 0.9}, "trials": 5, "name": "fast", "home": home,
        "recipe": recipe, "search": search, "criteria": ("l2",), **settings,
    }  # fmt: skip
    return autoprune.search(model(), **arguments)


def test_a_search_under_a_limit_on_latency_keeps_to_the_table_and_tells_what_was_measured(tmp_path: Path) -> None:
    outcome = run(tmp_path / "home", latency={"batch": 2, "threads": 1})
    view, stored = outcome.view, outcome.stored
    assert view.primary == LATENCY
    assert view.limits[LATENCY] == int(0.9 * view.dense.costs[LATENCY] + 1e-6)
    for point in outcome.front:
        assert point.costs[LATENCY] <= view.limits[LATENCY]
        assert point.metrics["latency_predicted_ms"] == point.costs[LATENCY] / 1e6
        assert point.metrics["latency_least_ms"] <= point.metrics["latency_ms"]
    members = {point.trial for point in outcome.front}
    assert set(stored.measured) == {
        "dense", *(f"final-{s.result.identity}" for s in stored.shown() if s.number in members)
    }  # fmt: skip
    facts = stored.facts["latency"]
    assert facts.items() >= {"batch": 2, "dtype": "float32", "threads": 1, "device": "cpu"}.items()
    assert "Latency: batch 2, float32, cpu, 1 thread." in outcome.text
    assert "measured" in outcome.text

    (table,) = (tmp_path / "home" / "cache").glob("latency-*.json")
    before = table.read_text(), stored.measured
    again = run(tmp_path / "home", latency={"batch": 2, "threads": 1})
    assert (table.read_text(), again.stored.measured) == before
    assert again.text.splitlines()[:4] == outcome.text.splitlines()[:4]
    # Another table is another problem.
    changed = json.loads(before[0])
    changed["surfaces"][0]["values"] = [changed["surfaces"][0]["values"][0] + 1000]
    table.write_text(json.dumps(changed))
    with pytest.raises(StudyError, match=r"differs in .*latency_table"):
        run(tmp_path / "home", latency={"batch": 2, "threads": 1})


def test_conditions_of_latency_decide_a_study_only_where_latency_is_limited(tmp_path: Path) -> None:
    run(tmp_path / "home", budget={"macs": 0.8})
    assert not list((tmp_path / "home" / "cache").glob("latency-*"))
    run(tmp_path / "home", budget={"macs": 0.8}, latency={"batch": 4})
    with pytest.raises(SpaceError, match="is the same limit as `latency`"):
        run(tmp_path / "home", budget={"latency": 0.8, "latency_ms": 4})


def test_the_command_measures_a_table_once_and_prints_it_as_text_and_json(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(
        "schema: 1\nname: fast-mlp\ndata: {name: iris}\n"
        "model: {name: mlp, arguments: {in_features: 4, hidden: [16, 8]}}\n"
    )
    arguments = ["latency", str(space), "--home", str(tmp_path / "home")]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert "fast-mlp: latency on cpu, batch 1, float32, 1 thread" in first.stdout
    assert "Median error on the networks held out:" in first.stdout
    assert CliRunner().invoke(app, arguments).stdout == first.stdout
    data = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert {row["held_out"] for row in data["networks"]} == {True, False}
    other = CliRunner().invoke(app, [*arguments, "--set", "latency.batch=8", "--json"])
    assert json.loads(other.stdout)["conditions"]["batch"] == 8
    assert len(list((tmp_path / "home" / "cache").glob("latency-*.json"))) == 2
    wrong = CliRunner().invoke(app, [*arguments, "--set", "latency.batch=0"])
    assert wrong.exit_code == 2
    assert "latency.batch" in wrong.stderr
