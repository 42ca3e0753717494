"""Depth, width and activations searched together, from a model to a front, to a model on disk and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import autoprune
from autoprune.coordinator import explain_trial, write_report
from autoprune.network.models.building import build_model
from autoprune.network.surgery.stand_ins import Absent

SETTINGS = {
    "recipe": {"batch_size": 64, "lr": 0.02, "precision": "float32", "distillation": None},
    "groups": {"blocks": True},
    "activations": {"relu": ["relu", "relu6"], "scope": "stage"},
    "search": {
        "controls": 0,
        "sampler": "random",
        "ladder": [{"rung": "screen", "epochs": 0}, {"rung": "tune", "epochs": 0.5, "trials": 4}],
    },
}


@pytest.fixture(scope="module")
def data() -> dict[str, tuple[Tensor, Tensor]]:
    digits = load_digits()
    x = torch.from_numpy(digits.images.astype(np.float32))[:, None] / 16.0
    y = torch.from_numpy(digits.target.astype(np.int64))
    return {"train": (x[:800], y[:800]), "val": (x[800:1200], y[800:1200]), "test": (x[1200:1400], y[1200:1400])}


@pytest.fixture(scope="module")
def model(data: dict[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """A ResNet-20 that has learnt the digits in a few passes."""
    torch.manual_seed(0)
    network = build_model(name="resnet20", num_classes=10, arguments={"in_channels": 1})
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    x, y = data["train"]
    for _ in range(6):
        for batch in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(network(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return network.eval()


@pytest.mark.slow
def test_a_search_with_blocks_and_activations_lowers_the_depth_and_its_models_come_back(
    model: nn.Module, data: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    outcome = autoprune.search(
        model, data=data, budget={"macs": 0.35}, criteria=["l2"], trials=12, home=tmp_path / "home", **SETTINGS
    )
    emptied = next(p for p in outcome.front if p.trial is not None)
    said, why = explain_trial(outcome.stored.name, home=tmp_path / "home", trial=int(emptied.trial or 0))
    assert {row["group"]: row["width"] for row in why["groups"]} == dict(emptied.widths)
    page = write_report(outcome.stored.name, home=tmp_path / "home", output=tmp_path / "report.html")
    assert "relu6" in said + page.read_text()
    tuned = [shown.result for shown in outcome.stored.shown()]
    screened = [t.result for t in outcome.stored.rungs["screen"] if t.result is not None]
    shallow = [r for r in screened if 0 in r.widths.values()]
    assert shallow, "a budget of 0.35 with nine blocks is met by blocks that go in some candidates"
    assert all(r.policy.choices[g].ratio == 1.0 for r in shallow for g, w in r.widths.items() if w == 0)
    assert len({tuple(r.policy.activations.values()) for r in screened}) > 1
    assert set(screened[0].policy.activations) == {"stage1/relu", "stage2/relu", "stage3/relu"}
    for point in outcome.front:
        result = next(r for r in tuned if r.widths == point.widths)
        again = autoprune.load(outcome.model_path(int(point.trial or 0)), lambda: _dense())
        absent = [name for name, module in again.named_modules() if isinstance(module, Absent)]
        assert absent == [name for name in result.widths if result.widths[name] == 0]
        with torch.no_grad():
            accuracy = (again(data["val"][0]).argmax(1) == data["val"][1]).float().mean()
        assert float(accuracy) == pytest.approx(result.metrics["val_accuracy"], abs=0.03)


def _dense() -> nn.Module:
    return build_model(name="resnet20", num_classes=10, arguments={"in_channels": 1})
