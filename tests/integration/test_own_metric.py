"""A search by a metric of the user's own, of any size and sign: what people see has its name, and no percent sign."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autoprune
from autoprune import studies
from autoprune.coordinator import Wish, pick, show_front, show_status, write_report
from autoprune.coordinator.commands.explaining import compare_trials, explain_trial
from autoprune.coordinator.commands.finetuning import Finetuned
from autoprune.coordinator.commands.picking import Pick
from autoprune.coordinator.recording.registering import candidates, version_tags
from autoprune.coordinator.running.log import read_log
from autoprune.coordinator.stored.background import pack, unpack
from autoprune.network.artifacts.saved import read_document
from autoprune.objective import ACCURACY, Objective
from autoprune.policy import Choice, Policy
from autoprune.report.card import Card, card_markdown
from autoprune.report.markdown import front_markdown, search_markdown, version_markdown
from autoprune.report.status_page import status_page
from autoprune.results import Fidelity, TrialResult

LADDER = [
    {"rung": "screen", "epochs": 0},
    {"rung": "tune", "epochs": 1, "trials": 4},
    {"rung": "final", "epochs": 1, "trials": 3, "seeds": 2, "test": True},
]


@pytest.fixture(autouse=True)
def no_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)


class Heights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(1)  # type: ignore[no-any-return]


def table(count: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(3))
    return x, 20 + 3 * x[:, 0] - 2 * x[:, 1] + x[:, 2].abs()


def negative_mae(output: Tensor, target: Tensor) -> Tensor:
    """Of heights in hundredths of what they are: values such as -192.4."""
    return -1000 * (output - target).abs().mean()


def credit(output: Tensor, target: Tensor) -> Tensor:
    """Values such as 1924."""
    return 2000 - 100 * (output - target).abs().mean()


def tiny(output: Tensor, target: Tensor) -> Tensor:
    return -1e-6 * (output - target).abs().mean()


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    x, y = table(400)
    torch.manual_seed(0)
    network = Heights()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(500):
        optimizer.zero_grad()
        F.mse_loss(network(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval()


def run(dense: nn.Module, metric: Any) -> Any:
    x, y = table(400)
    return autoprune.search(
        dense,
        data={"train": (x[:300], y[:300]), "test": (x[300:], y[300:])},
        budget={"params": 0.7, "front": [0.1, 0.7]},
        trials=8,
        name="heights",
        criteria=("l2", "obs"),
        loss=F.mse_loss,
        metric=metric,
        recipe={"batch_size": 32, "lr": 0.01, "precision": "float32"},
        search={"controls": 2, "ladder": LADDER},
        device="cpu",
    )


def said(text: str, value: float, objective: Objective) -> bool:
    """Whether a text has this number as an own metric, and never as a percentage."""
    numbers = [objective.text(value, digits) for digits in (1, 2)]
    wrong = [f"{number}%" for number in numbers] + [f"{100 * value:.{digits}f}%" for digits in (0, 1, 2)]
    assert not [number for number in wrong if number in text and abs(value) > 1]
    assert "0.0%" not in text  # what a tiny number would be
    assert "accuracy" not in re.sub(r"`?(val|test)_accuracy`?|accuracy-", "", text)
    assert "val acc" not in text.replace("val_acc", "")
    return any(number in text for number in numbers)


@pytest.mark.parametrize("metric", [negative_mae, credit, tiny], ids=lambda metric: str(metric.__name__))
def test_everything_that_people_see_has_the_name_and_the_value_of_an_own_metric(
    dense: nn.Module, metric: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(dense, metric)
    name, own = metric.__name__, Objective(metric.__name__, percent=False)
    view, home = result.view, Path(".autoprune")
    assert view.objective == own
    assert result.complete
    assert result.front
    best = result.front[-1]
    worst = own.worst(view.dense.val_accuracy)
    assert view.reference == (1.0 - worst, 1.0)
    assert view.dense.val_accuracy > worst

    # While it runs, and at its end.
    told = capsys.readouterr().err
    assert told.count(f"`{name}` is maximised: higher is better.") == 1
    assert re.search(rf"final: finished: .*best val {name} .* \(higher is better\), front", told)
    assert said(told, max(p.val_accuracy for p in view.trials), own)
    for text in (result.text, show_front("heights", home=home)[0]):
        assert said(text, best.val_accuracy, own)
        assert f"val {name}" in text
        assert f"test {name}" in text
        assert f"`{name}` is maximised: higher is better." in text
        assert f"reference point: val {name} {own.text(worst)}" in " ".join(text.split())
    assert any(f"val {name} " in line for line in read_log(home, "heights"))
    plot = autoprune.report.plot_front(view)
    assert plot.startswith(f"val {name} (higher is better)\n")
    assert "%" not in "".join(line.split("│")[0] for line in plot.splitlines()[:-2])
    assert len({line.index(mark) for line in plot.splitlines() for mark in "│└" if mark in line[:20]}) == 1

    # The report and its figures.
    page = write_report("heights", home=home).read_text(encoding="utf-8")
    body, figures = page.split("<body>")[1].split("<script")[0], page[page.rindex('<script type="application/json"') :]
    assert said(body, best.val_accuracy, own)
    assert f"The highest {name} (trial" in body
    assert f"`{name}` is maximised: higher is better." in body
    assert f"<title>heights: {name} against complexity</title>" in page
    assert f"{name} (higher is better): validation, and test" in page
    figure = json.loads(autoprune.report.front_figure(view).to_json())
    assert "ticksuffix" not in figure["layout"]["yaxis"] or not figure["layout"]["yaxis"]["ticksuffix"]
    drawn = {trace["name"]: trace for trace in figure["data"]}
    assert f"front, test {name}" in drawn
    assert figures
    assert autoprune.report.front_png(view, tmp_path / "front.png").stat().st_size > 1000

    # What goes to MLflow and to the Optuna dashboard.
    links: dict[int, str] = {}
    for text in (
        front_markdown(view, links),
        search_markdown(view, links=links, pages={}, picture=None, commands="") + own.text(best.val_accuracy),
        version_markdown(view, best, address="models:/m/1", export="e"),
    ):
        assert said(text, best.val_accuracy, own)
        assert f"val {name}" in text
    assert "(higher is better)" in version_markdown(view, best, address="models:/m/1", export="e")
    tags = [version_tags(view, member) for member in candidates(result.stored, view)]
    assert own.text(best.val_accuracy) in [tag["val_accuracy"] for tag in tags]
    storage = studies.open_storage(home / "optuna.db")
    study = studies.load_rung(storage, "heights", "final")
    assert study.metric_names == [f"1 - val {name}", "params_fraction"]
    attrs = study._storage.get_study_system_attrs(study._study_id)
    notes = [str(value) for key, value in attrs.items() if ":note_str:" in key]
    assert any(f"Objectives: 1 - validation {name} and params" in note and "higher is better" in note for note in notes)
    assert any(f"final validation {name} {own.text(best.val_accuracy, 2)}" in note for note in notes)
    assert all("validation accuracy" not in note for note in notes)
    finished = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    assert all(t.user_attrs[f"val {name}"] == t.user_attrs["result"]["metrics"]["val_accuracy"] for t in finished)

    # The commands.
    text = compare_trials("heights", home=home, trials=[p.trial for p in view.trials][:2])[0]
    assert f"val {name} (higher is better)" in text
    assert said(text, view.trials[0].val_accuracy, own)
    text = explain_trial("heights", home=home, trial=best.trial)[0]
    assert f"validation {name} {own.text(best.val_accuracy)} (dense" in text
    assert "(higher is better)" in text
    text, status = show_status(home)
    assert f"{name} {own.text(max(p.val_accuracy for p in view.trials))}" in text
    assert status["searches"][0]["objective"] == own.to_json()
    assert f"<td class=n>{name} " in status_page(status)
    document = read_document(result.model_path(best.trial))
    card = card_markdown(Card("heights", document, view.dense.metrics, files=(), objective=result.stored.objective))
    assert said(card, best.val_accuracy, own)
    assert f"validation {name} (higher is better)." in card
    least = min(p.val_accuracy for p in view.front)
    chosen = pick("heights", Wish(accuracy=least - 1e-6 * abs(least)), home=home, say=print)
    assert chosen.trial == view.front[0].trial

    # Machine-readable output keeps its columns.
    data = show_front("heights", home=home)[1]
    assert data["objective"] == own.to_json()
    assert data["front"][-1]["val_accuracy"] == best.val_accuracy


def test_searches_of_earlier_versions_read_as_accuracy_or_as_a_metric_without_a_name(dense: nn.Module) -> None:
    result = run(dense, credit)
    packed = pack(result.stored.background)
    assert unpack(packed).objective == Objective("credit", percent=False)
    del packed["objective"]
    assert unpack(packed).objective == Objective("metric", percent=False)
    assert unpack({**packed, "accuracy": True}).objective == ACCURACY
    assert replace(result.stored, background=None).objective == ACCURACY


def test_training_longer_tells_an_own_metric_as_it_is_and_an_accuracy_in_percent(tmp_path: Path) -> None:
    policy = Policy({"layer": Choice("l2", 0.5)})
    metrics = {"val_accuracy_before": 0.9, "val_accuracy": 0.931, "test_accuracy": 0.92}
    result = TrialResult(policy, "id", Fidelity("finetune", epochs=2), {"layer": 5}, {}, metrics)
    trained = Finetuned(tmp_path, 1, Pick("s", "s.tune/3", 3, "tune", tmp_path), result, recorded=True)
    assert "validation accuracy 90.00% before, 93.10% after (+3.10 points)\n  test accuracy 92.00%\n" in trained.text
    own = replace(trained, objective=Objective("r2", percent=False))
    assert "validation r2 0.90000 before, 0.93100 after (+0.03100) (higher is better)\n" in own.text
    assert "test r2 0.92000\n" in own.text
    assert "%" not in own.text
