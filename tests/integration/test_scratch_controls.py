"""Points of the front that are trained from random weights stand among the controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autoprune
from autoprune import studies
from autoprune.coordinator.commands.syncing import sync_search
from autoprune.coordinator.recording.notes import write_notes
from autoprune.coordinator.running import session
from autoprune.coordinator.running.log import SearchLog
from autoprune.network import workbench
from autoprune.network.training.scratch import forget

LADDER = [
    {"rung": "screen", "epochs": 0},
    {"rung": "final", "epochs": 1, "trials": 4, "test": True},
]


def clouds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns points around four corners, and which corner."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (count,), generator=generator)
    centres = torch.stack([1.0 - 2.0 * (y % 2), 1.0 - 2.0 * (y // 2)], 1)
    x = torch.cat([centres, torch.zeros(count, 4)], 1)
    return x + 0.4 * torch.randn(count, 6, generator=generator), y


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    x, y = clouds(256, 0)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network


@pytest.fixture(autouse=True)
def no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is away: these tests are about what a search measures."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")


def search(model: nn.Module, home: Path, **settings: Any) -> autoprune.SearchOutcome:
    return autoprune.search(
        model,
        data={"train": clouds(256, 1), "test": clouds(128, 2)},
        budget={"macs": 0.5},
        trials=8,
        home=home,
        **{"recipe": {"lr": 0.001, "precision": "float32"}, "search": {"controls": 3, "ladder": LADDER}, **settings},
    )


def test_scratch_trains_points_of_the_front_anew_and_shows_what_their_weights_were_worth(
    model: nn.Module, tmp_path: Path
) -> None:
    settings = {"search": {"controls": 3, "scratch": 2, "ladder": LADDER}}
    result = search(model, tmp_path, **settings)
    names = [control.origin for control in result.view.controls]
    assert {"uniform l2", "global l2"} <= set(names)
    fresh = [control for control in result.view.controls if control.origin.endswith("from scratch")]
    assert len(fresh) == min(2, len(result.front))
    twins = {f"trial {point.trial} from scratch": point for point in result.front}
    for control in fresh:
        twin = twins[control.origin]
        assert control.widths == twin.widths
        assert control.costs == twin.costs
        assert control.val_accuracy < twin.val_accuracy - 0.1, "one short epoch teaches random weights little"
        assert "val_accuracy_recalibrated" not in control.metrics
        assert control.test_accuracy is not None
    assert "from scratch" in result.text
    assert "95 % intervals by parametric bootstrap over" in result.text
    again = search(model, tmp_path, **settings)
    assert [(c.origin, c.val_accuracy) for c in again.view.controls] == [
        (c.origin, c.val_accuracy) for c in result.view.controls
    ]


def test_every_seed_of_a_scratch_run_begins_with_weights_of_its_own(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, Tensor]] = []

    def seen(network: nn.Module, seed: int) -> None:
        forget(network, seed)
        drawn.append((seed, next(network.parameters()).detach().clone()))

    monkeypatch.setattr(workbench, "forget", seen)
    ladder = [LADDER[0], {**LADDER[1], "trials": 2, "seeds": 3}]
    result = search(model, tmp_path, search={"controls": 0, "scratch": 1, "ladder": ladder}, seed=5)
    assert [seed for seed, _ in drawn] == [5, 6, 7]
    assert len({weights.flatten()[0].item() for _, weights in drawn}) == 3
    fresh = next(control for control in result.view.controls if control.origin.endswith("from scratch"))
    assert fresh.metrics["val_accuracy_spread"] > 0


def test_the_search_is_held_from_its_first_trial_until_it_is_recorded(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, str | None] = {}
    told = SearchLog.told

    def watch(where: str) -> None:
        storage = studies.open_storage(tmp_path / "optuna.db", create=False)
        held[where] = studies.search_holder(storage, "model")
        with pytest.raises(autoprune.StudyError, match="a process is running the search"):
            sync_search("model", home=tmp_path, say=print)

    def seen(log: SearchLog, event: Any) -> None:
        told(log, event)
        if isinstance(event, studies.TrialFinished) and event.rung not in held:
            watch(event.rung)

    def noted(*args: Any) -> None:
        watch("recording")
        write_notes(*args)

    monkeypatch.setattr(SearchLog, "told", seen)
    monkeypatch.setattr(session, "write_notes", noted)
    search(model, tmp_path, search={"controls": 1, "scratch": 1, "ladder": LADDER}, name="model")
    assert set(held) == {"screen", "final", "controls", "scratch", "recording"}
    assert None not in held.values()
    storage = studies.open_storage(tmp_path / "optuna.db", create=False)
    assert studies.search_holder(storage, "model") is None
    state = studies.search_state(storage, "model", side=("controls", "scratch"))
    assert (state.state, state.rung) == ("finished", "final")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"search": {"scratch": 1, "ladder": LADDER[:1]}}, "needs epochs"),
        ({"search": {"scratch": 1, "ladder": LADDER}, "pruning": "unstructured"}, "only pruning: channel is"),
        (
            {"search": {"scratch": 1, "ladder": LADDER}, "recipe": {"schedule": {"kind": "iterative"}}},
            "no weights to prune in stages",
        ),
        ({"search": {"ladder": [{"rung": "scratch"}]}}, "choose another name"),
    ],
)
def test_what_cannot_be_trained_from_scratch_is_refused(
    changes: dict[str, Any], words: str, model: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(autoprune.InputError, match=words):
        search(model, tmp_path, **changes)
