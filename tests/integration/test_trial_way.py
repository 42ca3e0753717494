"""The way of a trial through a search: what is computed and read for it, and how often."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autoprune
from autoprune import studies
from autoprune.coordinator.running.log import SearchLog
from autoprune.network.workbench import Workbench
from autoprune.policy import Policy
from autoprune.studies import records, retrying

LADDER = [{"rung": "screen"}, {"rung": "final", "epochs": 1, "trials": 3, "test": True}]


def numbers(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(count))
    return x, (x[:, :4].sum(1) > 0).long()


def test_a_trial_computes_its_selection_once_and_is_never_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    computed: Counter[str] = Counter()
    reads: list[str] = []
    events: list[tuple[studies.TrialFinished, list[str]]] = []
    selected, told = Workbench._selected, SearchLog.told

    def counted(bench: Workbench, policy: Policy) -> Any:
        computed[policy.id] += 1
        return selected(bench, policy)

    def seen(log: SearchLog, event: Any) -> None:
        if isinstance(event, studies.TrialFinished):
            events.append((event, list(reads)))
        reads.clear()
        told(log, event)

    def watched(module: Any, name: str) -> None:
        original = getattr(module, name)

        def read(*args: Any, **more: Any) -> Any:
            reads.append(name)
            return original(*args, **more)

        monkeypatch.setattr(module, name, read)

    monkeypatch.setattr(Workbench, "_selected", counted)
    monkeypatch.setattr(SearchLog, "told", seen)
    watched(records, "_read")
    watched(retrying, "frozen_trials")
    watched(retrying.RDBStorage, "get_trial")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    outcome = autoprune.search(
        model,
        data={"train": numbers(256), "val": numbers(128), "test": numbers(64)},
        budget={"macs": 0.6},
        trials=10,
        home=tmp_path,
        recipe={"precision": "float32", "batch_size": 64},
        search={"controls": 1, "ladder": LADDER},
    )
    assert len(events) >= 14
    assert set(computed.values()) == {1}
    assert len(computed) >= 10
    # The first trial of a rung comes after what its beginning reads.
    following = [
        found for (event, found), (before, _) in zip(events[1:], events, strict=False) if event.rung == before.rung
    ]
    assert following
    assert any(found for _, found in events), "what reads is seen"
    assert not any(following), following
    stored = outcome.stored.rungs
    for event, _ in events:
        (again,) = [trial for trial in stored[event.rung] if trial.number == event.trial.number]
        assert again == replace(event.trial, started=again.started, ended=again.ended)
