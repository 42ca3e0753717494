"""A submitted space is the space that was written: its search goes on with what `autoprune search` had begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from autoprune.budget import resolve_budget
from autoprune.coordinator.commands import queueing
from autoprune.coordinator.commands.queueing import Wanted, submit_space
from autoprune.cost import CostModel, Form, Term
from autoprune.errors import StudyError
from autoprune.policy import Group, digest, feasible_widths
from autoprune.results import Problem
from autoprune.space import Space, load_space
from autoprune.studies import Queue, open_study, study_name

FILES = sorted((Path(__file__).parents[4] / "search_spaces").glob("*.yaml"))[::4]
SETTINGS = {
    "schema": 1,
    "name": "mine",
    "model": {"name": "resnet20"},
    "data": {"name": "digits"},
    "budget": {"macs": 0.5},
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_a_job_stores_and_runs_has_the_fingerprint_of_the_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = optuna.storages.InMemoryStorage()
    monkeypatch.setattr(queueing.studies, "open_storage", lambda place: storage)
    space = load_space(file, overrides=["recipe.lr=1e-05"], env={"AUTOPRUNE_DATA": "/data"}, allow_code=True)
    submit_space(space, Wanted(), home=tmp_path)
    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps(Queue(storage).find(space.name).request.space, indent=1))
    again = load_space(stored, env={}, allow_code=True)
    assert again.fingerprint_sections() == space.fingerprint_sections()
    assert again == space


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = optuna.storages.InMemoryStorage()
    monkeypatch.setattr(queueing.studies, "open_storage", lambda place: found)
    return found


@pytest.fixture
def problem() -> Problem:
    group = Group("layer", 16, feasible_widths(16), "model")
    terms = (Term(9, (Form(0, ((0, 1),)),)),)
    model = CostModel(("layer",), (16,), terms, terms, terms, ((Term(1),),))
    return Problem((group,), model, resolve_budget({"macs": 0.5}, model, (group,)), ("l2",))


def begin(storage: Any, problem: Problem, space: Space, **more: str) -> None:
    sections = {**space.fingerprint_sections(), **more}
    name = study_name(space.name, space.search.ladder[0].rung)
    open_study(storage, name, problem, fingerprint=digest(sections), settings=sections)


def test_a_name_that_belongs_to_other_settings_is_refused_when_it_is_submitted(
    storage: Any, problem: Problem, tmp_path: Path
) -> None:
    space = Space.from_mapping(SETTINGS)
    begin(storage, problem, space)
    changes = {"budget": {"macs": 0.4}, "recipe": {"lr": 0.5}, "pruning": "2:4"}
    other = Space.from_mapping({**SETTINGS, **changes})
    words = r"'mine\.\w+' belongs to another space: it differs in budget, .*pruning, recipe; search under another name"
    with pytest.raises(StudyError, match=words):
        submit_space(other, Wanted(), home=tmp_path)
    assert Queue(storage).jobs() == []
    more = space.model_copy(update={"search": space.search.model_copy(update={"trials": 99})})
    assert submit_space(more, Wanted(), home=tmp_path).name == "mine", "more trials are the same search"


def test_what_only_the_search_can_compare_is_left_to_it(storage: Any, problem: Problem, tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").touch()
    space = Space.from_mapping({**SETTINGS, "checkpoint": str(tmp_path / "weights.safetensors")})
    begin(storage, problem, space, checkpoint="the digest of its bytes", latency_table="of this device")
    assert submit_space(space, Wanted(), home=tmp_path).name == "mine"
    with pytest.raises(StudyError, match="differs in checkpoint;"):
        submit_space(Space.from_mapping(SETTINGS), Wanted(), home=tmp_path)
