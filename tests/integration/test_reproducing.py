"""What a recorded run tells about its trial, and how two evaluations are compared."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from autoprune.coordinator.commands.reproducing import Reproduction, compared, fidelity_of, recorded_policy
from autoprune.coordinator.stored.setup import Setup, space_of
from autoprune.cost import COSTS
from autoprune.errors import InputError, StudyError
from autoprune.policy import Choice, Group, Policy
from autoprune.results import Fidelity, TrialResult
from autoprune.space import Space, parse_space
from autoprune.tracking import TrialRecord
from autoprune.tracking.records import trial_params

GROUPS = (
    Group("a[0]", 16, (4, 8, 12, 16), "model"),
    Group("b" * 300, 7, (1, 3, 5), "model"),
    Group("c", 3, (3,), "stage"),
)
SPACE = {
    "schema": 1,
    "name": "s",
    "model": {"name": "mlp"},
    "data": {"name": "iris"},
    "search": {
        "ladder": [
            {"rung": "tune", "epochs": 1, "images": 50},
            {"rung": "final", "epochs": 2, "trials": 2, "test": True},
        ]
    },
}


def recorded() -> tuple[Policy, dict[str, str]]:
    """A policy and the parameters of its run, with names that MLflow does not take as they are."""
    widths = {"a[0]": 8, "b" * 300: 3, "c": 3}
    criteria = {"model": "l2", "stage": "obs"}
    policy = Policy({g.name: Choice(criteria[g.scope], g.ratio(widths[g.name])) for g in GROUPS})
    result = TrialResult(policy, "i", Fidelity("tune"), widths, dict.fromkeys(COSTS, 1), {"val_accuracy": 0.5})
    scopes = {group.name: group.scope for group in GROUPS}
    return policy, trial_params(TrialRecord("s", "s.tune", 0, "tune", policy, result, {}, scopes=scopes))


def test_the_policy_comes_back_exactly_from_a_runs_parameters() -> None:
    policy, params = recorded()
    assert recorded_policy(params, GROUPS) == policy


def test_a_run_that_does_not_tell_its_policy_is_refused() -> None:
    _, params = recorded()
    with pytest.raises(InputError, match="no parameter 'width/c'"):
        recorded_policy({k: v for k, v in params.items() if k != "width/c"}, GROUPS)
    with pytest.raises(InputError, match="keeps 2 channels of 'c'"):
        recorded_policy({**params, "width/c": "2"}, GROUPS)


def test_a_rung_means_what_the_space_says_and_controls_run_the_last_ones_recipe() -> None:
    space = Space.from_mapping(SPACE)
    assert fidelity_of(space, "tune") == Fidelity("tune", epochs=1, images=50)
    assert fidelity_of(space, "controls") == Fidelity("controls", epochs=2, test=True)
    with pytest.raises(InputError, match="no rung 'warmup'"):
        fidelity_of(space, "warmup")


def result_of(**metrics: float) -> TrialResult:
    policy, _ = recorded()
    return TrialResult(policy, "i", Fidelity("tune"), {}, dict.fromkeys(COSTS, 7), metrics)


def reproduction(rows: Any, **changes: Any) -> Reproduction:
    settings: dict[str, Any] = {"run_id": "abc", "name": "s, tune 0", "surroundings": (), "same_channels": True}
    return Reproduction(rows=tuple(rows), **(settings | changes))


def test_scores_and_costs_are_compared_but_times_are_not() -> None:
    then = {"val_accuracy": 0.5, "latency_ms": 1.0, "seconds/total": 3.0, "macs": 7.0, "only_then": 1.0}
    rows = compared(then, result_of(val_accuracy=0.5, latency_ms=2.0, only_now=1.0))
    assert rows == (("val_accuracy", 0.5, 0.5), ("macs", 7.0, 7.0))


def test_equal_means_every_digit_and_the_same_channels() -> None:
    assert reproduction([("val_loss", 0.1, 0.1), ("x", math.nan, math.nan)]).equal
    off = reproduction([("val_loss", 0.1, 0.1 + 1e-15)], surroundings=("torch was 2.12, is 2.13",))
    assert not off.equal
    assert "differs by" in off.text
    assert "torch was 2.12, is 2.13" in off.text
    assert off.text.endswith("not reproduced exactly")
    assert not reproduction([("val_loss", 0.1, 0.1)], same_channels=False).equal


def test_settings_come_back_from_what_was_stored_and_objects_at_hand_are_refused() -> None:
    space = Space.from_mapping(SPACE)
    setup = Setup(space.model_dump(mode="json", by_alias=True), False, {"macs": 1}, {"a": "model"}, {"threads": "2"})
    assert space_of(setup, doing="x") == space
    assert parse_space(setup.text, env={}) == space
    assert setup.params["recipe.lr"] == space.recipe.lr
    with pytest.raises(StudyError, match="cannot train longer: model and data of 's' were Python objects"):
        space_of(replace(setup, at_hand=True), doing="train longer")
