"""The benchmark's own techniques do what their rows say."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoprune.network.models.building import build_model
from autoprune.network.models.zoo import LstmClassifier
from autoprune.network.surgery.twin import relative_error
from autoprune.network.training import regularisation

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "techniques.py"


@pytest.fixture
def techniques(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("STRENGTHS", "REGULARISERS"):
        monkeypatch.setattr(regularisation, name, dict(getattr(regularisation, name)))
    spec = importlib.util.spec_from_file_location("techniques", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "techniques", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["resnet20", "lstm"])
def test_full_rank_is_the_network_itself_and_half_of_it_is_cheaper(techniques: ModuleType, name: str) -> None:
    if name == "resnet20":
        model: nn.Module = build_model(name="resnet20", arguments={"in_channels": 1, "shortcut": "B"}).eval()
        x = torch.randn(2, 1, 8, 8)
    else:
        torch.manual_seed(0)
        model, x = LstmClassifier(in_features=8, hidden=16, layers=2).eval(), torch.randn(2, 8, 8)
    with torch.no_grad():
        dense = model(x)
        assert relative_error(techniques.low_rank(model, 1.0).eval()(x), dense) < 1e-4
        assert relative_error(techniques.low_rank(model, 0.5).eval()(x), dense) > 1e-3
    half, full = (techniques.count_macs(techniques.low_rank(model, part), (x,)) for part in (0.4, 1.0))
    assert half < 0.5 * full


def test_every_rectifier_is_capped_at_six(techniques: ModuleType) -> None:
    class Rectified(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(x) + torch.relu(x) + nn.ReLU(inplace=False)(x)

    x = torch.tensor([-1.0, 2.0, 9.0])
    assert techniques.Capped(Rectified())(x).tolist() == [0.0, 6.0, 18.0]
    assert Rectified()(x).tolist() == [0.0, 6.0, 27.0]


def test_the_textbook_penalties_shrink_every_weight(techniques: ModuleType) -> None:
    for power in (1, 2):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        before = model[0].weight.detach().clone()
        bias = model[0].bias.detach().clone()
        penalty = techniques._EveryWeight(SimpleNamespace(model=model), {}, 0.3, power=power)
        for step in range(5):
            penalty.shrink((step + 1) / 5, 5)
        assert (model[0].weight.abs() <= before.abs()).all()
        assert model[0].weight.abs().mean() < 0.9 * before.abs().mean()
        assert torch.equal(model[0].bias, bias)


def test_a_row_gives_accuracy_and_loss_at_both_targets(techniques: ModuleType) -> None:
    outcome = techniques.Outcome(0.5, 1.25, 0.4)
    techniques.TECHNIQUES["fixed"] = lambda setting, target, seed: replace(outcome, accuracy=0.5 + 0.1 * seed)
    cells = [cell.strip() for cell in techniques.row(SimpleNamespace(), "fixed", 3).strip("|").split("|")]
    assert cells[:7] == ["fixed", "0.40", "60.0 ± 10.0", "1.250", "0.40", "60.0 ± 10.0", "1.250"]
