"""Searches over masks from settings to saved models: the Python interface on a model of its own, and space files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autoprune
from autoprune.coordinator import (
    ExportWish,
    explain_trial,
    export_models,
    inspect_space,
    run_search,
    show_front,
    write_report,
)
from autoprune.coordinator.recording.records import Records
from autoprune.coordinator.stored.setup import Setup
from autoprune.errors import BudgetError, CheckpointError, PolicyError, TrackingError
from autoprune.network.artifacts.export import export
from autoprune.space import load_space

LADDER = [
    {"rung": "screen", "epochs": 0},
    {"rung": "tune", "epochs": 1, "trials": 3},
    {"rung": "final", "epochs": 2, "trials": 2, "seeds": 2, "test": True},
]


class Plain(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.outer = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.outer(F.relu(self.norm(self.stem(x)))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns noisy 8x8 images with horizontal or vertical stripes, and which."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (count,), generator=generator)
    bars = (torch.arange(8) % 2).float().expand(8, 8)
    x = torch.where(y[:, None, None] == 1, bars, bars.T)[:, None]
    return x + 0.3 * torch.randn(count, 1, 8, 8, generator=generator), y


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    network = Plain()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    x, y = stripes(256, 0)
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval()


@pytest.fixture(autouse=True)
def no_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A store that is away: these tests are about what the functions return."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)


def search(model: nn.Module, pruning: str, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "budget": {"params": 0.7},
        "criteria": ("l2", "taylor", "obs"),
        "recipe": {"batch_size": 32, "lr": 0.02, "precision": "float32"},
        "search": {"controls": 2, "ladder": LADDER},
    }
    data = {"train": stripes(192, 1), "test": stripes(64, 2)}
    return autoprune.search(model, data=data, trials=8, name="masks", pruning=pruning, **(settings | more))


@pytest.mark.parametrize("pruning", ["unstructured", "2:4"])
def test_a_search_over_masks_gives_models_whose_zeros_are_those_that_were_counted(
    model: nn.Module, pruning: str, tmp_path: Path
) -> None:
    outcome = search(model, pruning)
    assert "costs count non-zeros, and give no latency without a sparse kernel" in " ".join(outcome.text.split())
    point = outcome.front[-1]
    assert point.test_accuracy is not None
    folder = outcome.model_path(point.trial)
    document = json.loads((folder / "policy.json").read_text())
    assert document["pruning"] == pruning
    loaded = autoprune.load(folder, Plain)
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    nonzeros = {name: int(torch.count_nonzero(p)) for name, p in loaded.named_parameters() if p.ndim > 1}
    for name, width in point.widths.items():
        assert nonzeros[f"{name}.weight"] <= width, "fine-tuning with momentum and weight decay keeps the zeros"
        assert document["sparsity"][name]["nonzero"] == nonzeros[f"{name}.weight"]
    whole = sum(p.numel() for p in loaded.parameters() if p.ndim == 1)
    counted = sum(point.widths.get(name.removesuffix(".weight"), count) for name, count in nonzeros.items())
    assert point.costs["params"] == counted + whole == document["costs"]["params"]
    assert point.costs["params"] <= 0.7 * document["dense_costs"]["params"]
    if pruning == "2:4":
        assert set(point.widths) == {"outer", "head"}, "the stem reads a single channel"
        quads = (loaded.get_parameter("outer.weight") != 0).movedim(1, -1).reshape(-1, 4).sum(1)
        assert int(quads.max()) <= 2 or point.widths["outer"] == 16 * 8 * 9
    assert export(folder, tmp_path / "out", format="safetensors", factory=Plain)
    again = search(model, pruning)
    assert [p.trial for p in again.front] == [p.trial for p in outcome.front]


def test_trials_of_masks_are_explained_and_reported_with_their_caveat(model: nn.Module, tmp_path: Path) -> None:
    outcome = search(model, "unstructured", search={"controls": 0, "ladder": LADDER[:2]})
    trial = outcome.front[0].trial
    said, data = explain_trial("masks", home=Path(".autoprune"), trial=trial)
    assert "costs count non-zeros" in " ".join(said.split())
    assert {row["group"]: row["width"] for row in data["groups"]} == outcome.front[0].widths
    page = write_report("masks", home=Path(".autoprune"), output=tmp_path / "report.html").read_text()
    assert "costs count non-zeros" in page
    assert "weights removed (%)" in page
    assert "channels removed" not in page


def test_masks_and_activations_are_searched_together(model: nn.Module) -> None:
    ladder = [{"rung": "tune", "epochs": 1}]
    changes = {"activations": {"relu": ["hardswish"]}, "search": {"controls": 0, "ladder": ladder, "sampler": "random"}}
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    outcome = search(network, "unstructured", **changes)
    folder = outcome.model_path(outcome.front[0].trial)
    assert json.loads((folder / "policy.json").read_text())["activations"] == {"1": "hardswish"}
    again = autoprune.load(folder, lambda: nn.Sequential(*[type(m)(*a) for m, a in zip(network, SHAPES, strict=True)]))
    assert isinstance(again[1], nn.Hardswish)
    nonzero = int(torch.count_nonzero(again[0].weight))
    assert nonzero <= outcome.front[0].widths["0"]


SHAPES: tuple[tuple[Any, ...], ...] = ((1, 8, 3), (), (1,), (), (8, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pt2", "onnx"])
def test_a_masked_model_is_exported_with_its_zeros(model: nn.Module, name: str, tmp_path: Path) -> None:
    if name == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    outcome = search(model, "unstructured", search={"controls": 0, "ladder": LADDER[:2]})
    folder = outcome.model_path(outcome.front[0].trial)
    (path,) = export(folder, tmp_path / "out", format=name, factory=Plain)
    assert path.stat().st_size > 0
    if name == "pt2":
        stored = torch.export.load(path).module()
        wanted = {n: int(torch.count_nonzero(p)) for n, p in autoprune.load(folder, Plain).named_parameters()}
        assert {n: int(torch.count_nonzero(p)) for n, p in stored.named_parameters()} == wanted


def test_an_export_refuses_weights_whose_zeros_are_not_those_of_the_document(model: nn.Module, tmp_path: Path) -> None:
    outcome = search(model, "unstructured", search={"controls": 0, "ladder": LADDER[:2]})
    folder = outcome.model_path(outcome.front[0].trial)
    path = folder / "policy.json"
    document = json.loads(path.read_text())
    document["sparsity"]["head"]["nonzero"] += 1
    path.write_text(json.dumps(document))
    with pytest.raises(autoprune.AutopruneError, match=r"head.weight in .* non-zeros, its document says"):
        export(folder, tmp_path / "out", format="safetensors", factory=Plain)
    with pytest.raises(CheckpointError, match="does not belong"):
        autoprune.load(folder, lambda: nn.Linear(2, 2))


def test_a_budget_that_no_mask_meets_is_refused_with_the_least_possible(model: nn.Module) -> None:
    with pytest.raises(BudgetError, match=r"no policy meets the budget params: 0.2: the least possible is"):
        search(model, "2:4", budget={"params": 0.2})


@pytest.mark.parametrize("criterion", ["l2", "taylor", "obs"])
def test_prune_masks_the_asked_fraction_and_keeps_the_accuracy(model: nn.Module, criterion: str) -> None:
    net = autoprune.trace(model, torch.zeros(2, 1, 8, 8), pruning="unstructured")
    small = autoprune.prune(net, 0.6, criterion=criterion, calibration=[stripes(128, 5)])
    for group in net.groups:
        weight = small.get_parameter(f"{group.name}.weight")
        assert int((weight == 0).sum()) >= round(0.6 * group.size)
    x, y = stripes(256, 6)
    assert float((small(x).argmax(1) == y).float().mean()) > 0.9
    assert not any((p == 0).all() for p in model.parameters())


def test_prune_of_2_to_4_takes_one_half_or_nothing(model: nn.Module) -> None:
    net = autoprune.trace(model, torch.zeros(2, 1, 8, 8), pruning="2:4")
    small = autoprune.prune(net, {"outer": 0.5})
    assert int((small.get_parameter("outer.weight") != 0).sum()) == 16 * 8 * 9 // 2
    assert int((small.get_parameter("head.weight") == 0).sum()) == 0
    with pytest.raises(PolicyError, match=r"the ratio is 0\.5 or 0, got 0\.3"):
        autoprune.prune(net, 0.3)
    with pytest.raises(PolicyError, match="round_to counts channels"):
        autoprune.prune(net, 0.5, round_to=8)
    with pytest.raises(PolicyError, match="needs calibration batches"):
        autoprune.prune(net, 0.5, criterion="obs")
    for criterion in ("fpgm", "obs_greedy", "hessian", "hrank", "mine.scores:norms"):
        with pytest.raises(PolicyError, match=f"'{criterion}' does not rank single weights"):
            autoprune.prune(net, 0.5, criterion=criterion)
    with pytest.raises(PolicyError, match="masks keep at least one weight of 'outer'"):
        autoprune.prune(net, {"outer": 1.0})


ROOT = Path(__file__).parents[2]
QUICK = [
    "recipe.baseline.epochs=3",
    "data.calibration=64",
    "search.ladder.1.epochs=0.5",
    "search.ladder.1.trials=3",
    "search.ladder.2.epochs=0.5",
    "search.ladder.2.trials=2",
    "search.controls=2",
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "workers"), [("digits_unstructured", 2), ("digits_2to4", 1)])
def test_the_shipped_digits_spaces_run_from_settings_to_an_exported_model(
    name: str, workers: int, tmp_path: Path
) -> None:
    space = load_space(ROOT / "search_spaces" / f"{name}.yaml", overrides=QUICK, env={})
    outcome = run_search(space, home=tmp_path / "home", workers=workers, timeout=None, trials=6, summary=True)
    assert outcome.complete
    text = " ".join(outcome.text.split())
    assert "costs count non-zeros" in text
    assert "non-zeros MACs" in text  # the head of the layers' table
    trial = outcome.front[-1].trial
    assert trial is not None
    wish = ExportWish(space.name, trial, output=tmp_path / "out")
    export_models(wish, home=tmp_path / "home", say=lambda text: None)
    loaded = autoprune.load(tmp_path / "out")
    zeros = sum(int((p == 0).sum()) for p in loaded.parameters())
    total = sum(p.numel() for p in loaded.parameters())
    limit = 0.3 if space.pruning == "unstructured" else 0.75
    assert total - zeros <= limit * total
    said, data = show_front(space.name, home=tmp_path / "home", layers=trial)
    assert data["pruning"] == space.pruning
    assert said.count("costs count non-zeros") == 2
    seen, described = inspect_space(space, home=tmp_path / "home")
    assert "costs count non-zeros" in " ".join(seen.split())
    assert described["pruning"] == space.pruning


def test_mlflow_is_told_what_the_costs_of_masks_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[str] = []

    class Tracker:
        def __init__(self, *args: Any, description: str, **kwargs: Any) -> None:
            told.append(description)
            raise TrackingError("away")

    monkeypatch.setattr("autoprune.tracking.Tracker", Tracker)
    for pruning in ("channel", "2:4"):
        setup = Setup({"name": "m", "pruning": pruning}, at_hand=True, dense={}, scopes={})
        records = Records("m", setup, home=tmp_path, say=lambda text: None)
        records.close(5.0)
    assert "non-zeros" not in told[0]
    assert "Pruning 2:4: costs count non-zeros, and give no latency without a sparse kernel." in told[-1]
