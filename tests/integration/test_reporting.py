"""What the coordinator tells explanations, comparisons and reports, from real studies."""

from __future__ import annotations

import datetime
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from autoprune import studies
from autoprune.budget import resolve_budget
from autoprune.coordinator.commands.explaining import compare_trials, explain_trial
from autoprune.coordinator.commands.reporting import write_report
from autoprune.coordinator.stored.background import Background, curves_of, pack, unpack
from autoprune.coordinator.stored.places import storage_path
from autoprune.coordinator.stored.search import facts_of, read_search
from autoprune.coordinator.stored.setup import Setup
from autoprune.cost import LATENCY, CostModel, Form, Surface, Term
from autoprune.errors import InputError, StudyError
from autoprune.policy import Choice, Group, Policy, feasible_widths, uniform_policy
from autoprune.results import Fidelity, Problem, TrialResult
from autoprune.studies.records import Candidate, add_complete, add_failed

SIZES = {"first": 16, "second": 200}
CRITERIA = ("l2", "obs")
LATENCY_FACTS = {"batch": 1, "dtype": "float32", "threads": 1, "device": "cpu"}


def problem() -> Problem:
    a, b = Form(terms=((0, 1),)), Form(2, ((1, 1),))
    terms = (Term(9, (a,)), Term(3, (a, b)), Term(5))
    model = CostModel(tuple(SIZES), tuple(SIZES.values()), terms, terms[:2], terms, ((Term(4, (a,)), Term(4, (b,))),))
    groups = tuple(Group(name, size, feasible_widths(size), "model") for name, size in SIZES.items())
    return Problem(groups, model, resolve_budget({"macs": 0.9}, model, groups), CRITERIA)


def tables() -> dict[str, dict[str, list[float]]]:
    return {
        name: {c: [(1 - w / size) ** (2 + i) for w in range(size + 1)] for i, c in enumerate((*CRITERIA, "unused"))}
        for name, size in SIZES.items()
    }


def background(known: Problem, **changes: Any) -> Background:
    settings: dict[str, Any] = {
        "groups": known.groups,
        "model": known.cost_model,
        "curves": curves_of(known, tables()),
        "setup": Setup(
            space={"schema": 1, "name": "small"},
            at_hand=False,
            dense=known.cost_model.dense(),
            scopes={group.name: group.scope for group in known.groups},
            facts={"threads": "1"},
        ),
        "samples": {"train": 700, "test": 400},
        "classes": 10,
        "accuracy": True,
        "origin": "resnet20",
        "data": "digits",
        "device": "cpu",
        "environment": {"version.autoprune": "0.1.0", "platform": "Linux", "git_commit": "0123456789abcdef"},
        "began": datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
        **changes,
    }
    return Background(**settings)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A search of one rung with three finished trials and a failed one, without a background."""
    known = problem()
    storage = studies.open_storage(storage_path(tmp_path))
    study = studies.open_study(storage, "small.tune", known, fingerprint="f", settings={})
    fidelity = Fidelity("tune", epochs=1)
    studies.write_facts(
        study, facts_of(known, {"val_accuracy": 0.95, "latency_ms": 1.0}, [fidelity], {}, latency=LATENCY_FACTS)
    )
    now = datetime.datetime.now()
    for ratio, accuracy in ((0.2, 0.94), (0.5, 0.9), (0.8, 0.7)):
        policy = uniform_policy(known.groups, ratio, "obs")
        result = TrialResult(
            policy=policy,
            identity=policy.id,
            fidelity=fidelity,
            widths=policy.widths(known.groups),
            costs=known.costs(policy),
            metrics={"val_accuracy": accuracy, "latency_ms": 1.0 - ratio},
            seconds={"surgery": 0.5, "fine_tuning": 2.0},
        )
        candidate = Candidate(policy, policy.id, "uniform-obs", "uniform-obs")
        add_complete(study, known, candidate, result=result, reused=None, started=now, notes={})
    policy = uniform_policy(known.groups, 0.3, "l2")
    add_failed(study, known, Candidate(policy, policy.id, "sampler", "sampler"), reason="<it> diverged", started=now)
    return tmp_path


def give_background(home: Path, **changes: Any) -> None:
    study = studies.load_rung(studies.open_storage(storage_path(home)), "small", "tune")
    studies.write_background(study, pack(background(problem(), **changes)))


def test_a_search_that_goes_on_keeps_the_time_and_versions_of_its_first_call(home: Path) -> None:
    first = background(problem())
    facts = {"threads": "7"}
    later = replace(
        first,
        setup=replace(first.setup, facts=facts),
        environment={"version.autoprune": "0.2.0"},
        began=datetime.datetime(2027, 1, 1, tzinfo=datetime.UTC),
    )
    read = unpack(pack(later, before=json.loads(json.dumps(pack(first)))))
    assert (read.environment, read.began) == (first.environment, first.began)
    assert read.setup.facts == facts


def test_a_background_survives_the_store_and_json(home: Path) -> None:
    give_background(home)
    read = read_search("small", home=home).background
    assert read == background(problem())
    assert unpack(json.loads(json.dumps(pack(read)))) == read
    with pytest.raises(StudyError, match="schema 7"):
        unpack({**pack(read), "schema": 7})


def test_curves_are_kept_at_feasible_widths_and_thinned_with_both_ends() -> None:
    curves = curves_of(problem(), tables())
    assert set(curves["first"]) == set(CRITERIA)
    assert curves["first"]["obs"].widths == tuple(range(2, 17))
    wide = curves["second"]["obs"]
    assert len(wide.widths) <= 130
    assert (wide.widths[0], wide.widths[-1]) == (20, 200)
    for width in range(20, 201):
        assert wide.at(width) == pytest.approx(tables()["second"]["obs"][width], abs=2e-4)


def test_a_table_of_the_widths_that_a_group_may_take_is_as_good_as_one_of_all() -> None:
    feasible = {g.name: set(g.widths) for g in problem().groups}
    some = {
        name: {c: {w: e for w, e in enumerate(curve) if w in feasible[name]} for c, curve in by.items()}
        for name, by in tables().items()
    }
    assert curves_of(problem(), some) == curves_of(problem(), tables())


def test_the_background_is_not_among_the_attributes_that_the_dashboard_shows(home: Path) -> None:
    give_background(home)
    study = optuna.load_study(study_name="small.tune", storage=f"sqlite:///{storage_path(home)}")
    assert not [key for key in study.user_attrs if "background" in key]


def test_a_trial_is_explained_from_what_is_stored(home: Path) -> None:
    give_background(home)
    text, data = explain_trial("small", home=home, trial=1)
    assert "small, trial 1: validation accuracy 90.0% (dense 95.0%)" in text
    assert [group["group"] for group in data["groups"]] == ["first", "second"]
    assert [group["width"] for group in data["groups"]] == [8, 100]
    assert data["groups"][1]["uniform_width"] == 100
    with pytest.raises(StudyError, match=r"no finished trial 3; finished: 0, 1, 2"):
        explain_trial("small", home=home, trial=3)


def test_a_search_for_latency_is_explained_by_the_prices_of_its_latency_table(tmp_path: Path) -> None:
    known = problem()
    surfaces = (
        Surface((Form(terms=((0, 1),)),), ((2, 16),), (1_000_000, 5_000_000)),
        Surface((Form(terms=((0, 1),)), Form(2, ((1, 1),))), ((2, 16), (22, 202)), (100, 200, 300, 1_000_000)),
    )
    model = replace(known.cost_model, latency=surfaces)
    budget = resolve_budget({"latency": 0.9}, model, known.groups)
    timed = replace(known, cost_model=model, budget=budget)
    study = studies.open_study(
        studies.open_storage(storage_path(tmp_path)), "fast.tune", timed, fingerprint="f", settings={}
    )
    fidelity = Fidelity("tune", epochs=1)
    studies.write_facts(
        study, facts_of(timed, {"val_accuracy": 0.95, "latency_ms": 7.0}, [fidelity], {}, latency=LATENCY_FACTS)
    )
    kept = pack(background(timed))
    studies.write_background(study, kept)
    policy = uniform_policy(timed.groups, 0.5, "obs")
    widths = policy.widths(timed.groups)
    metrics = {"val_accuracy": 0.9, "latency_ms": 7.5, "latency_least_ms": 7.4}
    result = TrialResult(policy, policy.id, fidelity, widths, timed.costs(policy), metrics)
    candidate = Candidate(policy, policy.id, "uniform-obs", "uniform-obs")
    add_complete(study, timed, candidate, result=result, reused=None, started=datetime.datetime.now(), notes={})

    stored = read_search("fast", home=tmp_path)
    assert stored.background is not None
    assert stored.background.model == model
    assert stored.setup.dense[LATENCY] == model.cost(LATENCY, {})
    text, data = explain_trial("fast", home=tmp_path, trial=0)
    assert (data["cost"], data["dense"], data["total"]) == (LATENCY, 6_000_000, model.cost(LATENCY, widths))
    first, second = data["groups"]
    assert first["share"] == pytest.approx(1.0)
    assert 0 < second["share"] < first["share"]
    narrower = {**widths, "first": first["down"]["width"]}
    assert first["down"]["cost"] == model.cost(LATENCY, narrower) - model.cost(LATENCY, widths)
    assert "percent of the dense latency" in text
    page = write_report("fast", home=tmp_path, output=tmp_path / "fast.html").read_text(encoding="utf-8")
    assert "<th>latency</th><th>measured</th>" in page
    assert "no faster" in page
    assert "over the limit" in page


def test_a_search_without_tables_cannot_be_explained_and_says_what_to_do(home: Path) -> None:
    with pytest.raises(StudyError, match="run the same search again"):
        explain_trial("small", home=home, trial=1)
    give_background(home, curves={})
    with pytest.raises(StudyError, match="trial 1 of small cannot be explained: there is no error curve"):
        explain_trial("small", home=home, trial=1)


def test_errors_are_weighted_as_the_trials_teach(home: Path) -> None:
    give_background(home)
    known = problem()
    study = studies.load_rung(studies.open_storage(storage_path(home)), "small", "tune")
    rng = random.Random(0)
    for _ in range(40):
        ratios = {name: rng.uniform(0.1, 0.85) for name in SIZES}
        policy = Policy({g.name: Choice("obs", g.ratio(g.width(ratios[g.name]))) for g in known.groups})
        widths = policy.widths(known.groups)
        errors = {name: tables()[name]["obs"][width] for name, width in widths.items()}
        metrics = {"val_accuracy": 0.5, "val_loss": 0.2 + 3.0 * errors["first"] + 1.0 * errors["second"]}
        result = TrialResult(policy, policy.id, Fidelity("tune", epochs=1), widths, known.costs(policy), metrics)
        candidate = Candidate(policy, policy.id, "sampler", "sampler")
        add_complete(study, known, candidate, result=result, reused=None, started=datetime.datetime.now(), notes={})
    _, data = explain_trial("small", home=home, trial=1)
    first, second = data["groups"]
    assert first["weight"] + second["weight"] == pytest.approx(2.0)
    assert 2.0 < first["weight"] / second["weight"] < 4.0


def test_trials_are_compared_by_their_numbers(home: Path) -> None:
    text, data = compare_trials("small", home=home, trials=[2, 0, 2])
    assert [t["trial"] for t in data["trials"]] == [2, 0]
    assert "trial 2" in text
    with pytest.raises(InputError, match="at least two different trials to compare, got 1, 1"):
        compare_trials("small", home=home, trials=[1, 1])
    with pytest.raises(StudyError, match="no finished trial 9"):
        compare_trials("small", home=home, trials=[1, 9])


def test_the_report_tells_settings_times_failures_and_reasons(home: Path, tmp_path: Path) -> None:
    give_background(home)
    path = write_report("small", home=home, output=tmp_path / "new/folder/report.html")
    text = path.read_text(encoding="utf-8")
    for words in (
        "resnet20",
        "digits, 10 classes",
        "train 700, test 400",
        "0123456789ab",
        "autoprune 0.1.0",
        "&lt;it&gt; diverged",
        "name: small",
        "keeps 8 of 16",
        "figure-sensitivity",
    ):
        assert words in text, words
    assert "<it>" not in text
    assert list(path.parent.iterdir()) == [path]


def test_a_report_without_a_background_names_what_is_missing(home: Path, tmp_path: Path) -> None:
    text = write_report("small", home=home, output=tmp_path / "old.html").read_text(encoding="utf-8")
    assert "did not store this part" in text
    assert "figure-front" in text
    assert "figure-sensitivity'" not in text
    assert "diverged" in text


def test_a_search_from_python_is_reproduced_in_python(home: Path, tmp_path: Path) -> None:
    setup = background(problem()).setup
    give_background(home, setup=replace(setup, at_hand=True))
    text = write_report("small", home=home, output=tmp_path / "python.html").read_text(encoding="utf-8")
    assert "autoprune.search(model, data=..., name=&#x27;small&#x27;, ...)" in text


def test_a_report_that_cannot_be_written_leaves_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="is a folder; name a file"):
        write_report("small", home=home, output=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_report("small", home=home, output=tmp_path / "file/report.html")
    target = tmp_path / "reports/old.html"
    target.parent.mkdir()
    target.write_text("the old one")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_report("small", home=home, output=target)
    assert target.read_text() == "the old one"
    assert list(target.parent.iterdir()) == [target]


def test_the_default_place_is_beside_the_exports(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert write_report("small", home=home) == Path("exports/small-report.html")
    assert (folder / "exports/small-report.html").is_file()


def test_another_criterion_than_the_stored_ones_is_named(home: Path) -> None:
    curves = {name: {"l2": by["l2"]} for name, by in background(problem()).curves.items()}
    give_background(home, curves=curves)
    with pytest.raises(StudyError, match="by the criterion 'obs'"):
        explain_trial("small", home=home, trial=0)
    assert replace(background(problem()), curves=curves).curves == curves
