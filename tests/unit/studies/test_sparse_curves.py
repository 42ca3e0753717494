"""Groups of very many weights: error curves by width and sampled scores stand for the full ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from autoprune.policy import Group
from autoprune.results import Fidelity, Problem, TrialResult
from autoprune.studies.additive import best_curves
from autoprune.studies.learned import LEAST_TRIALS, LearnedAdditive, fit_weights
from autoprune.studies.warmstart import additive, global_ranking, uniform, warm_starts


@pytest.fixture
def problem(make_chain: Callable[..., Problem]) -> Problem:
    return make_chain(4, size=32, round_to=4, front=(0.2, 0.8), budget={"macs": 0.8})


def full(problem: Problem) -> dict[str, dict[str, tuple[float, ...]]]:
    return {
        group.name: {
            name: tuple((i + 1) * (1 - width / group.size) ** (2 + k) for width in range(group.size + 1))
            for k, name in enumerate(problem.criteria)
        }
        for i, group in enumerate(problem.groups)
    }


def sparse(problem: Problem) -> dict[str, dict[str, dict[int, float]]]:
    def widths(group: Group) -> set[int]:
        return {*group.widths, group.size}

    return {
        group.name: {name: {width: curve[width] for width in sorted(widths(group))} for name, curve in by_name.items()}
        for group, by_name in zip(problem.groups, full(problem).values(), strict=True)
    }


@pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
def test_curves_by_width_give_the_solution_of_the_full_curves(problem: Problem, target: float) -> None:
    for criterion in (None, *problem.criteria):
        assert additive(problem, sparse(problem), target, criterion=criterion) == additive(
            problem, full(problem), target, criterion=criterion
        )
    assert best_curves(problem, sparse(problem))[0] == best_curves(problem, full(problem))[0]


def test_the_learned_model_takes_curves_by_width(problem: Problem) -> None:
    results = []
    for i, target in enumerate(np.linspace(0.25, 0.8, LEAST_TRIALS + 2)):
        policy = uniform(problem, problem.criteria[i % 2], float(target))
        metrics = {"val_loss": 2.0 - float(target), "val_accuracy": 0.5}
        widths = policy.widths(problem.groups)
        results.append(TrialResult(policy, policy.id, Fidelity("screen"), widths, problem.costs(policy), metrics))
    assert fit_weights(problem, sparse(problem), results) == fit_weights(problem, full(problem), results)
    for count in (0, len(results)):
        proposed = LearnedAdditive(problem, sparse(problem), seed=0).propose(results[:count])
        assert problem.budget.within(problem.costs(proposed))


def test_a_global_ranking_by_an_even_sample_of_scores_is_that_by_all_of_them(problem: Problem) -> None:
    rng = np.random.default_rng(0)
    scores = {"l2": {group.name: sorted(rng.uniform(size=3200) * (i + 1)) for i, group in enumerate(problem.groups)}}
    sample = {"l2": {name: values[::100] for name, values in scores["l2"].items()}}
    for target in (0.3, 0.6):
        by_all = global_ranking(problem, scores, "l2", target).widths(problem.groups)
        by_some = global_ranking(problem, sample, "l2", target).widths(problem.groups)
        assert all(abs(by_all[name] - by_some[name]) <= 4 for name in by_all)
        assert by_all["layer0"] < by_all["layer3"]


def test_warm_starts_take_both(problem: Problem) -> None:
    sample = {name: {group.name: [0.1, 0.5, 0.9] for group in problem.groups} for name in problem.criteria}
    starts = warm_starts(problem, sample, sparse(problem), count=20)
    assert {start.origin.partition("-")[0] for start in starts} >= {"additive", "uniform"}
    assert all(problem.budget.within(problem.costs(start.policy)) for start in starts)
