"""The learned additive model finds out which groups matter, and proposes policies that follow from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest

from autoprune.policy import Policy, digest
from autoprune.results import Fidelity, Problem, TrialResult, WarmStart
from autoprune.studies import LadderPlan, RungPlan, load_rung, make_sampler, read_results, run_ladder
from autoprune.studies.additive import AdditiveSolver, policy_from_widths
from autoprune.studies.learned import LEAST_TRIALS, LearnedAdditive, Tables, fit_weights
from autoprune.studies.sampler import BudgetSampler, policy_of, search_space
from autoprune.studies.warmstart import uniform

FIDELITY = Fidelity("screen")
TRUTH = (8.0, 0.5, 0.5, 3.0, 0.5, 0.5)
"""How much each group's table error really adds to the loss."""
FACTORS = {"l2": 1.0, "taylor": 2.0}


def tables_of(problem: Problem) -> Tables:
    """The same curve for every group and criterion: the tables alone cannot tell them apart."""
    curve = [(1.0 - width / 16) ** 2 for width in range(17)]
    return {group.name: {name: tuple(curve) for name in problem.criteria} for group in problem.groups}


def measured(problem: Problem, policy: Policy, noise: float = 0.0) -> TrialResult:
    widths = policy.widths(problem.groups)
    tables = tables_of(problem)
    loss = 0.3 + noise
    for group, weight in zip(problem.groups, TRUTH, strict=True):
        criterion = policy.choices[group.name].criterion
        loss += weight * FACTORS[criterion] * tables[group.name][criterion][widths[group.name]]
    metrics = {"val_loss": loss, "val_accuracy": math.exp(-loss)}
    return TrialResult(policy, policy.id, FIDELITY, widths, problem.costs(policy), metrics)


def random_results(problem: Problem, count: int, noise: float = 0.0) -> list[TrialResult]:
    import optuna

    study = optuna.create_study(
        directions=["minimize", "minimize"], sampler=BudgetSampler(make_sampler("random", 3), problem)
    )
    rng = np.random.default_rng(0)
    policies = [policy_of(problem, study.ask(search_space(problem)).params) for _ in range(count)]
    return [measured(problem, policy, noise * rng.standard_normal()) for policy in policies]


@pytest.fixture
def problem(make_chain: Callable[..., Problem]) -> Problem:
    return make_chain(6, front=(0.2, 0.8), budget={"macs": 0.8}, scope=lambda name: name)


def test_the_weights_and_factors_behind_the_losses_are_found(problem: Problem) -> None:
    weights = fit_weights(problem, tables_of(problem), random_results(problem, 300))
    found = np.array(list(weights.groups.values()))
    assert np.corrcoef(found, TRUTH)[0, 1] > 0.99
    assert weights.factors["taylor"] / weights.factors["l2"] == pytest.approx(2.0, rel=0.15)


def test_few_and_noisy_trials_stay_near_equal_weights_and_keep_every_weight_positive(problem: Problem) -> None:
    weights = np.array(
        list(fit_weights(problem, tables_of(problem), random_results(problem, 9, noise=0.3)).groups.values())
    )
    assert (weights > 0).all()
    assert weights.max() / weights.min() < 30


def test_a_fit_to_a_single_result_is_refused(problem: Problem) -> None:
    with pytest.raises(ValueError, match="at least two results, got 1"):
        fit_weights(problem, tables_of(problem), random_results(problem, 1))


def test_a_fit_to_equal_results_does_not_divide_by_zero(problem: Problem) -> None:
    same = random_results(problem, 1) * 12
    weights = fit_weights(problem, tables_of(problem), same)
    assert all(math.isfinite(w) and w > 0 for w in weights.groups.values())


def true_loss(problem: Problem, policies: Sequence[Policy]) -> float:
    return float(np.mean([measured(problem, policy).metrics["val_loss"] for policy in policies]))


def test_proposals_lose_less_than_the_plain_tables_at_the_same_budget(problem: Problem) -> None:
    results = random_results(problem, 60)
    proposer = LearnedAdditive(problem, tables_of(problem), seed=0)
    proposals = [proposer.propose(results) for _ in range(8)]
    solver, curves = AdditiveSolver(problem), {g.name: tables_of(problem)[g.name]["l2"] for g in problem.groups}
    dense = problem.cost_model.dense()["macs"]
    plain = [
        policy_from_widths(problem, solver.solve(curves, problem.costs(p)["macs"] / dense), dict.fromkeys(curves, "l2"))
        for p in proposals
    ]
    assert true_loss(problem, proposals) < 0.85 * true_loss(problem, plain)
    assert {choice.criterion for p in proposals for choice in p.choices.values()} == {"l2"}


def test_every_proposal_is_within_the_budget_and_they_fill_the_span(problem: Problem) -> None:
    proposer = LearnedAdditive(problem, tables_of(problem), seed=1)
    costs = [problem.costs(proposer.propose([])) for _ in range(16)]
    assert all(problem.budget.within(c) for c in costs)
    fractions = sorted(c["macs"] / problem.cost_model.dense()["macs"] for c in costs)
    assert fractions[0] < 0.25
    assert fractions[-1] > 0.7
    assert max(b / a for a, b in pairwise(fractions)) < 1.35


def test_results_without_a_finite_loss_are_left_out(problem: Problem) -> None:
    good = random_results(problem, LEAST_TRIALS + 4)
    bad = [
        dataclasses.replace(r, metrics={"val_accuracy": 0.1, "val_loss": v}) for r in good for v in (math.nan, math.inf)
    ]
    one, other = (LearnedAdditive(problem, tables_of(problem), seed=2) for _ in range(2))
    assert one.propose(good) == other.propose([*bad, *good])


def test_the_same_seed_proposes_the_same_and_a_resumed_one_goes_on(problem: Problem) -> None:
    results = random_results(problem, 20)
    first, second = (LearnedAdditive(problem, tables_of(problem), seed=5) for _ in range(2))
    proposals = [first.propose(results) for _ in range(3)]
    assert proposals == [second.propose(results) for _ in range(3)]
    resumed = LearnedAdditive(problem, tables_of(problem), seed=5, done=3).propose(results)
    assert digest(resumed.to_json()) not in {digest(p.to_json()) for p in proposals}


def test_a_ladder_with_tables_asks_the_model_and_one_time_in_four_the_sampler(
    problem: Problem, storage, make_evaluator
) -> None:
    submit = make_evaluator(problem)
    starts = (WarmStart(uniform(problem, "l2", 0.5), "uniform-l2"),)
    plan = LadderPlan(
        "digits", problem, (RungPlan(FIDELITY, 21),), "f", {}, warm_starts=starts, tables=tables_of(problem)
    )
    run_ladder(storage, plan, submit=submit, identity=lambda policy: policy.id)
    sources = [t.source for t in read_results(load_rung(storage, "digits", "screen")) if t.reused is None]
    assert len(sources) == 21
    assert sources[0] == "uniform-l2"
    assert sources.count("learned") == pytest.approx(15, abs=1)
    assert sources.count("sampler") == pytest.approx(5, abs=1)


def test_the_model_waits_for_eight_results_and_then_takes_turns_with_the_warm_starts(
    problem: Problem, storage, make_evaluator
) -> None:
    starts = tuple(WarmStart(uniform(problem, "l2", 0.22 + 0.04 * i), f"uniform-{i}") for i in range(14))
    plan = LadderPlan(
        "digits", problem, (RungPlan(FIDELITY, 20),), "f", {}, warm_starts=starts, tables=tables_of(problem)
    )
    run_ladder(storage, plan, submit=make_evaluator(problem), identity=lambda policy: policy.id)
    sources = [t.source for t in read_results(load_rung(storage, "digits", "screen")) if t.reused is None]
    assert all(source.startswith("uniform") for source in sources[:8])
    assert sources[8:].count("learned") == 6
    assert sum(source.startswith("uniform") for source in sources) == 14


def test_the_model_alone_leaves_the_sampler_nothing(problem: Problem, storage, make_evaluator) -> None:
    plan = LadderPlan(
        "digits", problem, (RungPlan(FIDELITY, 12),), "f", {}, sampler="learned", tables=tables_of(problem)
    )
    run_ladder(storage, plan, submit=make_evaluator(problem), identity=lambda policy: policy.id)
    sources = [t.source for t in read_results(load_rung(storage, "digits", "screen")) if t.reused is None]
    assert sources.count("learned") >= 11


def test_without_tables_the_sampler_proposes_alone(problem: Problem, storage, make_evaluator) -> None:
    plan = LadderPlan("digits", problem, (RungPlan(FIDELITY, 6),), "f", {})
    run_ladder(storage, plan, submit=make_evaluator(problem), identity=lambda policy: policy.id)
    assert {t.source for t in read_results(load_rung(storage, "digits", "screen"))} == {"sampler"}
