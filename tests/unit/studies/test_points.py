"""A budget with points: candidates are made for these fractions of the dense cost and for no others."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import optuna
import pytest

from autoprune.results import Fidelity, Problem, TrialResult
from autoprune.studies.learned import LearnedAdditive, Tables
from autoprune.studies.sampler import BudgetSampler, make_sampler, policy_of, search_space
from autoprune.studies.study import _network_digest
from autoprune.studies.warmstart import control_policies, warm_starts

POINTS = (0.6, 0.45, 0.3)
STEP = 0.04
"""What the network's widths leave of a point, at most."""


@pytest.fixture
def problem(make_chain) -> Problem:
    """A chain of six layers whose front is wanted at three points."""
    spanned = make_chain(6, size=32, budget={"macs": 0.6}, front=(0.3, 0.6))
    return replace(spanned, budget=replace(spanned.budget, points=POINTS))


def tables_of(problem: Problem) -> Tables:
    """The same curve for every group and criterion."""
    curve = tuple((1.0 - width / 32) ** 2 for width in range(33))
    return {group.name: dict.fromkeys(problem.criteria, curve) for group in problem.groups}


def scores_of(problem: Problem) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {name: {g.name: rng.exponential(size=g.size) for g in problem.groups} for name in problem.criteria}


def sampled(problem: Problem, count: int) -> list:
    """Policies that a random sampler proposes."""
    study = optuna.create_study(directions=["minimize"] * 2, sampler=BudgetSampler(make_sampler("random", 3), problem))
    return [policy_of(problem, study.ask(search_space(problem)).params) for _ in range(count)]


def measured(problem: Problem, policy) -> TrialResult:
    """A result whose loss is the sum of the groups' errors, each of its own weight."""
    widths = policy.widths(problem.groups)
    loss = sum(number * (1 - widths[group.name] / 32) ** 2 for number, group in enumerate(problem.groups, 1))
    metrics = {"val_loss": loss, "val_accuracy": 1 / (1 + loss)}
    return TrialResult(policy, policy.id, Fidelity("screen"), widths, problem.costs(policy), metrics)


def fraction(problem: Problem, policy) -> float:
    return problem.costs(policy)["macs"] / problem.cost_model.dense()["macs"]


def served(problem: Problem, policies) -> Counter[float]:
    """How many policies lie just below each point; one that serves none is a failure."""
    found = Counter()
    for policy in policies:
        cost = fraction(problem, policy)
        found[next(point for point in sorted(POINTS) if point - STEP < cost <= point + 1e-9)] += 1
    return found


@pytest.mark.parametrize("known", [0, 24])
def test_the_learned_model_serves_every_point_alike(problem: Problem, known: int) -> None:
    proposer = LearnedAdditive(problem, tables_of(problem), seed=1)
    results = [measured(problem, policy) for policy in sampled(problem, known)]
    counts = served(problem, [proposer.propose(results) for _ in range(24)])
    assert set(counts) == set(POINTS)
    assert min(counts.values()) >= 7


def test_proposals_of_a_sampler_are_moved_to_the_nearest_point(problem: Problem) -> None:
    assert set(served(problem, sampled(problem, 30))) == set(POINTS)


@pytest.mark.parametrize("count", [5, 12, 20])
def test_warm_starts_stand_at_the_points_and_the_first_three_at_one_each(problem: Problem, count: int) -> None:
    starts = [start.policy for start in warm_starts(problem, scores_of(problem), tables_of(problem), count=count)]
    assert len(starts) >= 0.7 * count
    assert set(served(problem, starts[:3]).values()) == {1}
    assert sum(served(problem, starts).values()) == len(starts)


def test_controls_stand_at_the_points(problem: Problem) -> None:
    controls = [start.policy for start in control_policies(problem, scores_of(problem), count=12)]
    assert set(served(problem, controls)) == set(POINTS)


def test_a_single_point_is_a_search_for_one_budget(problem: Problem) -> None:
    alone = replace(problem, budget=replace(problem.budget, span=(0.45, 0.45), points=(0.45,)))
    proposer = LearnedAdditive(alone, tables_of(alone), seed=1)
    starts = [start.policy for start in warm_starts(alone, scores_of(alone), tables_of(alone), count=8)]
    costs = [fraction(alone, policy) for policy in [*starts, *(proposer.propose([]) for _ in range(4))]]
    assert len(starts) >= 6
    assert all(0.45 - STEP < cost <= 0.45 for cost in costs)
    assert not any(name.startswith("target/") for name in search_space(alone))


def test_a_stored_search_knows_its_points_and_one_without_is_as_before(problem: Problem) -> None:
    spanned = replace(problem, budget=replace(problem.budget, points=()))
    other = replace(problem, budget=replace(problem.budget, points=(0.6, 0.3)))
    assert len({_network_digest(known) for known in (problem, spanned, other)}) == 3
