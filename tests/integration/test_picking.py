"""Which model a wish, a name or an alias means, and where a pick is kept while MLflow is away."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from autoprune.coordinator.commands import picking
from autoprune.coordinator.commands.picking import (
    Pick,
    Wish,
    chosen_trial,
    of_key,
    of_trial,
    pick,
    resolve,
    split_reference,
)
from autoprune.coordinator.recording.registering import aliases_of, candidates
from autoprune.coordinator.stored.display import view_of
from autoprune.coordinator.stored.search import StoredSearch
from autoprune.cost import COSTS
from autoprune.errors import BudgetError, InputError, StudyError, TrackingError
from autoprune.objective import Objective
from autoprune.policy import Choice, Policy
from autoprune.report import SearchView
from autoprune.results import Fidelity, TrialResult
from autoprune.studies import StoredTrial, read_pick

TUNE, FINAL = Fidelity("tune", epochs=2), Fidelity("final", epochs=4, test=True)


def trial(number: int, width: int, accuracy: float, fidelity: Fidelity, origin: str | int = "sampler") -> StoredTrial:
    policy = Policy({"layer": Choice("l2", 1 - width / 10)})
    metrics = {"val_accuracy": accuracy, "latency_ms": width / 2}
    costs = dict.fromkeys(COSTS, 100 * width)
    path = f"elsewhere/{fidelity.rung}-{width}"
    result = TrialResult(policy, f"w{width}", fidelity, {"layer": width}, costs, metrics, model_path=path)
    return StoredTrial(number, "complete", policy, f"w{width}", origin, "uniform l2", result)


TUNED = (trial(0, 5, 0.9, TUNE), trial(1, 2, 0.8, TUNE), trial(2, 3, 0.88, TUNE), trial(3, 6, 0.5, TUNE))
FINALS = (trial(0, 2, 0.82, FINAL, 1), trial(1, 5, 0.95, FINAL, 0), trial(2, 3, 0.93, FINAL, 2))


@pytest.fixture
def search(tmp_path: Path) -> StoredSearch:
    """A finished search: front 1 (20 %), 2 (30 %, the knee) and 0 (50 %); the models of the front were kept."""
    facts = {
        "primary": "macs",
        "sizes": {"layer": 10},
        "dense_costs": dict.fromkeys(COSTS, 1000),
        "dense_metrics": {"val_accuracy": 0.97},
        "limits": {"macs": 600},
        "reference": [1.0, 1.0],
        "rungs": [{"rung": "tune", "test": False}, {"rung": "final", "test": True}],
    }
    for name in ("final-2", "final-5", "final-3", "tune-5"):
        folder = tmp_path / "models/s" / name
        folder.mkdir(parents=True)
        (folder / "policy.json").write_text(json.dumps({"input_shape": [4], "origin": {}}))
    return StoredSearch("s", facts, {"tune": TUNED, "final": FINALS}, tmp_path)


@pytest.fixture
def view(search: StoredSearch) -> SearchView:
    return view_of(search)


@pytest.mark.parametrize(
    ("wish", "number"),
    [
        (Wish(trial=17), 17),
        (Wish(knee=True), 2),
        (Wish(limits={"macs": "0.4"}), 2),
        (Wish(limits={"macs": "40%", "params": "250"}), 1),
        (Wish(limits={"macs": "500"}), 0),
        (Wish(latency_ms=1.5), 2),
        (Wish(accuracy=0.9), 2),
        (Wish(accuracy=0.8), 1),
        (Wish(limits={"macs": "0.5"}, accuracy=0.9), 0),
        (Wish(limits={"size": "0.25kB"}), 1),
    ],
)
def test_a_wish_chooses_the_most_accurate_point_within_it_or_the_smallest_that_is_accurate_enough(
    wish: Wish, number: int, view: SearchView
) -> None:
    assert chosen_trial(view, wish) == number


def test_a_wish_that_no_point_meets_shows_how_near_the_front_comes(view: SearchView) -> None:
    with pytest.raises(
        StudyError, match=r"no point .* has macs <= 0\.1, latency <= 2 ms.*trial 1: accuracy 0\.8200, 0\.2"
    ):
        chosen_trial(view, Wish(limits={"macs": "0.1"}, latency_ms=2))
    with pytest.raises(StudyError, match=r"accuracy >= 0\.99"):
        chosen_trial(view, Wish(accuracy=0.99))
    with pytest.raises(BudgetError, match="cannot read the budget 'much'"):
        chosen_trial(view, Wish(limits={"macs": "much"}))


def test_a_front_of_two_points_has_no_knee(search: StoredSearch) -> None:
    small = view_of(replace(search, rungs={"tune": TUNED, "final": FINALS[:2]}))
    with pytest.raises(StudyError, match="fewer than three points"):
        chosen_trial(small, Wish(knee=True))


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"trial": 1, "knee": True},
        {"knee": True, "latency_ms": 1.0},
        {"accuracy": float("inf")},
        {"latency_ms": 0.0},
        {"latency_ms": float("nan")},
        {"accuracy": float("nan")},
    ],
)
def test_a_wish_that_says_nothing_or_two_things_or_nonsense_is_refused(wish: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Wish(**wish)


@pytest.mark.parametrize("accuracy", [90.0, 0.0, -1.0])
def test_an_accuracy_that_is_no_fraction_is_refused(accuracy: float, view: SearchView) -> None:
    with pytest.raises(InputError, match=r"an accuracy is a fraction in \(0, 1\], got"):
        chosen_trial(view, Wish(accuracy=accuracy))


def test_the_least_value_of_an_own_metric_is_compared_as_it_is(view: SearchView) -> None:
    own = replace(
        view,
        objective=Objective("negative_mae", percent=False),
        trials=tuple(replace(p, val_accuracy=-1000 * (1 - p.val_accuracy)) for p in view.trials),
    )
    assert chosen_trial(own, Wish(accuracy=-70.001)) == 2
    assert chosen_trial(own, Wish(accuracy=-180.001)) == 1
    with pytest.raises(StudyError, match=r"negative_mae >= 5\. .*negative_mae -50\.00.*\(higher is better\)"):
        chosen_trial(own, Wish(accuracy=5))


def test_a_latency_that_was_not_measured_meets_no_limit(search: StoredSearch) -> None:
    view = view_of(search)
    blind = replace(view, trials=tuple(replace(p, metrics={}) for p in view.trials))
    with pytest.raises(StudyError, match="latency"):
        chosen_trial(blind, Wish(latency_ms=100))


def test_references_are_a_name_and_perhaps_an_alias() -> None:
    assert split_reference("digits") == ("digits", None)
    assert split_reference("digits@knee") == ("digits", "knee")
    for text in ("", "@knee", "digits@"):
        with pytest.raises(InputError, match="NAME or NAME@alias"):
            split_reference(text)


def test_the_aliases_name_the_ends_of_the_front_and_its_knee(search: StoredSearch, view: SearchView) -> None:
    members = candidates(search, view)
    assert [member.point.trial for member in members] == [1, 2, 0]
    assert aliases_of(view, members) == {"smallest": "s.final/0", "most-accurate": "s.final/1", "knee": "s.final/2"}
    assert aliases_of(view, members[:1]) == {"smallest": "s.final/0", "most-accurate": None, "knee": None}


def test_a_trial_and_a_run_mean_the_very_model_that_they_name(search: StoredSearch, tmp_path: Path) -> None:
    models = tmp_path / "models/s"
    assert of_trial(search, 0) == Pick("s", "s.final/1", 0, "final", models / "final-5")
    assert of_key(search, "s.final/1") == of_trial(search, 0)
    tuned = of_key(search, "s.tune/0")
    assert (tuned.folder, tuned.trial, tuned.label) == (models / "tune-5", 0, "tune-0")
    with pytest.raises(StudyError, match="weights of tune trial 1 of s were not kept"):
        of_key(search, "s.tune/1")
    with pytest.raises(StudyError, match=r"no finished trial s[.]final/9: was it searched elsewhere"):
        of_key(search, "s.final/9")


class Registry:
    """MLflow's side: what is picked there, or that it is away."""

    def __init__(self) -> None:
        self.away = True
        self.keys: list[str] = []

    def reader(self, home: Path) -> Registry:
        if self.away:
            raise TrackingError("nobody there")
        return self

    def registry(self, name: str) -> Registry:
        return self

    def picked(self, experiment: str, search: str) -> dict[str, str]:
        return dict.fromkeys(self.keys, "run")

    def trial_run(self, experiment: str, key: str) -> str:
        return "run"

    def choose(self, experiment: str, key: str, run_id: str | None) -> str:
        self.keys = [key]
        return f"{key} chosen"


@pytest.fixture
def mlflow(search: StoredSearch, monkeypatch: pytest.MonkeyPatch) -> Registry:
    store = Registry()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    monkeypatch.setattr(picking, "read_search", lambda name, home: search)
    monkeypatch.setattr(picking, "_first_study", lambda home, name: study)
    monkeypatch.setattr(picking, "reader_of", store.reader)
    store.study = study  # type: ignore[attr-defined]
    return store


def test_a_pick_made_while_mlflow_is_away_holds_and_is_handed_over_once_it_is_back(
    mlflow: Registry, tmp_path: Path
) -> None:
    said: list[str] = []
    assert pick("s", Wish(knee=True), home=tmp_path, say=said.append).trial == 2
    assert "MLflow is away" in said[-1]
    assert [found.trial for found in resolve("s", home=tmp_path, trial=None, say=said.append)] == [2]
    mlflow.away = False
    assert [found.trial for found in resolve("s@picked", home=tmp_path, trial=None, say=said.append)] == [2]
    assert said[-1] == "s.final/2 chosen"
    assert mlflow.keys == ["s.final/2"]


def test_what_was_picked_in_the_ui_holds_over_what_the_study_remembers(mlflow: Registry, tmp_path: Path) -> None:
    mlflow.away = False
    pick("s", Wish(knee=True), home=tmp_path, say=print)
    mlflow.keys = ["s.final/0", "s.tune/0"]
    found = resolve("s", home=tmp_path, trial=None, say=print)
    assert [(one.label, one.rung) for one in found] == [("1", "final"), ("tune-0", "tune")]
    mlflow.away = True
    assert [one.label for one in resolve("s", home=tmp_path, trial=None, say=print)] == ["1", "tune-0"]
    mlflow.away, mlflow.keys = False, []
    with pytest.raises(StudyError, match="no model of s is picked"):
        resolve("s", home=tmp_path, trial=None, say=print)
    assert read_pick(mlflow.study) == {"keys": [], "synced": True}  # type: ignore[attr-defined]


def test_a_model_is_named_by_number_or_by_alias_but_not_by_both(mlflow: Registry, tmp_path: Path) -> None:
    def trials(reference: str, number: int | None = None) -> list[int]:
        return [found.trial for found in resolve(reference, home=tmp_path, trial=number, say=print)]

    assert trials("s", 1) == [1]
    assert [trials(f"s@{alias}") for alias in ("smallest", "knee", "most-accurate")] == [[1], [2], [0]]
    with pytest.raises(InputError, match="leave --trial 1 or @knee out"):
        trials("s@knee", 1)
    with pytest.raises(StudyError, match="nothing of s was trained longer yet"):
        trials("s@finetuned")
    with pytest.raises(StudyError, match="no model of s is picked"):
        trials("s")
    (tmp_path / "finetuned/s/2").mkdir(parents=True)
    (tmp_path / "finetuned/s/10").mkdir()
    (tmp_path / "finetuned/s/10/policy.json").write_text(json.dumps({"finetune": {"trial": 2}}))
    (found,) = resolve("s@finetuned", home=tmp_path, trial=None, say=print)
    assert (found.key, found.trial, found.label) == ("s.finetune/10", 2, "finetune-10")
