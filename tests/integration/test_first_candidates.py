"""The first candidates come before what only a finished search needs: the dense network's scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.coordinator.stored.search import read_search
from autoprune.errors import StudyError
from autoprune.network.workbench import Workbench

SCREEN = {"rung": "screen", "epochs": 0}


class Pair(nn.Module):
    """Two layers, whose class no space file could name."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x).relu())  # type: ignore[no-any-return]


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was evaluated, in this order: `dense` and the rungs of trials."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    done: list[str] = []
    evaluate, dense_result = Workbench.evaluate, Workbench.dense_result

    def evaluated(self: Workbench, policy: Any, fidelity: Any) -> Any:
        done.append(fidelity.rung)
        return evaluate(self, policy, fidelity)

    def scored(self: Workbench, fidelity: Any) -> Any:
        done.append("dense")
        return dense_result(self, fidelity)

    monkeypatch.setattr(Workbench, "evaluate", evaluated)
    monkeypatch.setattr(Workbench, "dense_result", scored)
    return done


def search(trials: int, first: dict[str, Any] = SCREEN) -> autoprune.coordinator.SearchOutcome:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator)
    data = {"train": (x[:200], (x[:200, 0] > 0).long()), "test": (x[200:], (x[200:, 0] > 0).long())}
    torch.manual_seed(0)
    ladder = [first, {"rung": "final", "epochs": 0.2, "trials": 1, "test": True}]
    settings = {"controls": 0, "ladder": ladder}
    recipe = {"precision": "float32", "batch_size": 32, "distillation": None}
    return autoprune.search(
        Pair(), data=data, budget={"macs": 0.6}, trials=trials, name="pair", search=settings, recipe=recipe
    )


def test_five_candidates_are_screened_before_the_dense_network_is_scored_once(order: list[str]) -> None:
    found = search(7)
    assert order == [*["screen"] * 5, "dense", *["screen"] * 2, "final"]
    assert found.view.dense.metrics.keys() >= {"val_accuracy", "test_accuracy", "latency_ms"}


def test_a_search_of_fewer_candidates_scores_the_dense_network_after_them(order: list[str]) -> None:
    assert search(2).view.front
    assert order == ["screen", "screen", "dense", "final"]


def test_the_dense_network_comes_first_where_latencies_are_compared_with_its_own(order: list[str]) -> None:
    search(2, {"rung": "screen", "epochs": 0.2})
    assert order[0] == "dense"


def test_a_search_that_was_stopped_before_scores_the_dense_network_when_it_goes_on(
    order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Workbench.evaluate

    def stopped(self: Workbench, policy: Any, fidelity: Any) -> Any:
        if len(order) == 3:
            raise KeyboardInterrupt
        return counted(self, policy, fidelity)

    with monkeypatch.context() as patched:
        patched.setattr(Workbench, "evaluate", stopped)
        with pytest.raises(KeyboardInterrupt):
            search(7)
    with pytest.raises(StudyError, match="has not begun yet"):
        read_search("pair", home=Path(".autoprune"))
    search(7)
    assert order == [*["screen"] * 3, "dense", *["screen"] * 4, "final"]
