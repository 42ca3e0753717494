"""Results: what an evaluation reports, written as JSON and read back."""

from __future__ import annotations

import json
import math

import pytest

from autoprune.budget import Budget
from autoprune.cost import MACS, CostModel, Form, Term
from autoprune.errors import AutopruneError, PolicyError
from autoprune.policy import Choice, Group, Policy
from autoprune.results import Fidelity, Problem, TrialResult

POLICY = Policy({"a": Choice("l2", 0.5), "b": Choice("obs", 0.25)})


def result(**changes: object) -> TrialResult:
    values: dict[str, object] = {
        "policy": POLICY,
        "identity": "abc",
        "fidelity": Fidelity("tune", epochs=2.5, images=100, seeds=2, test=True),
        "widths": {"a": 4, "b": 3},
        "costs": {"macs": 123},
        "metrics": {"val_accuracy": 0.75, "val_loss": 0.5},
        "curves": {"train_loss": (1.0, 0.5)},
        "seconds": {"fine_tune": 1.5},
        "device": "cpu",
        "seed": 7,
        "model_path": "somewhere",
        "notes": ("said so",),
    }
    return TrialResult(**{**values, **changes})  # type: ignore[arg-type]


def test_a_result_survives_json() -> None:
    assert TrialResult.from_json(json.loads(json.dumps(result().to_json()))) == result()


def test_a_result_from_before_there_were_notes_has_none() -> None:
    data = result().to_json()
    del data["notes"]
    assert TrialResult.from_json(data) == result(notes=())


@pytest.mark.parametrize("schema", [None, 0, 2, "1"])
def test_a_result_of_an_unknown_schema_is_refused(schema: object) -> None:
    with pytest.raises(AutopruneError, match="result schema"):
        TrialResult.from_json({**result().to_json(), "schema": schema})


def test_the_error_is_what_accuracy_leaves() -> None:
    assert result().val_error == 0.25


@pytest.mark.parametrize(
    ("metrics", "finite"), [({"val_accuracy": 0.0}, True), ({"val_accuracy": math.nan}, False), ({}, False)]
)
def test_a_result_without_a_finite_score_says_so(metrics: dict[str, float], finite: bool) -> None:
    assert result(metrics=metrics).finite is finite


def test_a_problem_prices_a_policy_by_its_widths_and_names_its_scopes_once() -> None:
    groups = (Group("a", 8, (4, 8), "stage1"), Group("b", 4, (3, 4), "stage1"), Group("c", 4, (4,), "stage2"))
    model = CostModel(("a", "b"), (8, 4), (Term(10, (Form(terms=((0, 1),)), Form(terms=((1, 1),)))),), (), ())
    problem = Problem(groups, model, Budget({}, MACS, (0.1, 1.0)), ("l2", "obs"))
    assert problem.scopes == ("stage1", "stage2")
    assert problem.costs(Policy({**POLICY.choices, "c": Choice("l2", 0.0)}))[MACS] == 10 * 4 * 3
    with pytest.raises(PolicyError, match="says nothing about c"):
        problem.costs(POLICY)
