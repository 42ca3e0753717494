"""The surrogate behind `make samplers`, and that its runs are kept."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from autoprune.policy import uniform_policy
from autoprune.results import Fidelity
from autoprune.studies.warmstart import uniform

PATH = Path(__file__).parents[1] / "benchmarks" / "samplers.py"


@pytest.fixture(scope="module")
def samplers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("samplers_benchmark", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("groups", [9, 27, 60])
def test_the_surrogate_has_the_network_s_groups_and_loses_more_the_more_goes(samplers: ModuleType, groups: int) -> None:
    stand_in = samplers.surrogate(groups, seed=0)
    problem = stand_in.problem
    assert len(problem.groups) == groups
    dense = stand_in.truth(uniform_policy(problem.groups, 0.0, "l1"))
    assert dense == pytest.approx((0.343, 0.8915), abs=0.001)
    losses = [stand_in.truth(uniform(problem, "l1", target))[0] for target in (0.7, 0.5, 0.3)]
    assert dense[0] < losses[0] < losses[1] < losses[2]


def test_a_policy_has_the_same_noise_each_time_and_another_seed_is_another_network(samplers: ModuleType) -> None:
    seen = []
    for seed in (0, 0, 1):
        stand_in = samplers.surrogate(9, seed)
        policy = uniform(stand_in.problem, "obs", 0.5)
        result = stand_in(policy, Fidelity("screen")).result()
        assert result.metrics["val_accuracy"] != stand_in.truth(policy)[1]
        seen.append(result.metrics)
    assert seen[0] == seen[1] != seen[2]


def test_a_screen_is_better_than_its_warm_starts_and_is_kept(
    samplers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs.jsonl"
    first = samplers.Journal(path).run("auto", 9, 24, seed=0)
    alone = samplers.Journal(path).run("warm starts alone", 9, 24, seed=0)
    assert 0.15 < alone.hypervolume < first.hypervolume < 0.3
    monkeypatch.setattr(samplers, "screen", None)
    assert samplers.Journal(path).run("auto", 9, 24, seed=0) == first
