"""Measured errors are drawn towards what the tables predict, by as much as chance makes of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from autoprune.policy import Policy
from autoprune.results import Fidelity, Problem, TrialResult
from autoprune.studies import BudgetSampler, StoredTrial, make_sampler, policy_of, promoted, search_space
from autoprune.studies.learned import Tables
from autoprune.studies.shrinkage import shrunk_errors

SAMPLES = 2000
FIDELITY = Fidelity("screen")


def tables_of(problem: Problem) -> Tables:
    curve = tuple((1.0 - width / 16) ** 2 for width in range(17))
    return {group.name: dict.fromkeys(problem.criteria, curve) for group in problem.groups}


def policies(problem: Problem, count: int) -> list[Policy]:
    import optuna

    study = optuna.create_study(
        directions=["minimize", "minimize"], sampler=BudgetSampler(make_sampler("random", 5), problem)
    )
    return [policy_of(problem, study.ask(search_space(problem)).params) for _ in range(count)]


def true_error(problem: Problem, policy: Policy) -> float:
    widths = policy.widths(problem.groups)
    return 0.1 + 0.05 * sum((1.0 - widths[group.name] / 16) ** 2 for group in problem.groups)


def result_of(problem: Problem, policy: Policy, error: float) -> TrialResult:
    metrics = {"val_accuracy": 1.0 - error}
    return TrialResult(policy, policy.id, FIDELITY, policy.widths(problem.groups), problem.costs(policy), metrics)


@pytest.fixture
def problem(make_chain: Callable[..., Problem]) -> Problem:
    return make_chain(6, front=(0.2, 0.8), budget={"macs": 0.8}, scope=lambda name: name)


def measured(problem: Problem, count: int = 60, *, samples: int = SAMPLES) -> tuple[list[TrialResult], np.ndarray]:
    """Results whose errors are fractions of `samples` images, and the true errors."""
    rng = np.random.default_rng(1)
    drawn = policies(problem, count)
    truth = np.array([true_error(problem, policy) for policy in drawn])
    counted = rng.binomial(samples, truth) / samples
    return [result_of(problem, p, float(e)) for p, e in zip(drawn, counted, strict=True)], truth


def test_errors_by_chance_come_nearer_to_the_truth(problem: Problem) -> None:
    results, truth = measured(problem)
    noisy = np.array([result.val_error for result in results])
    shrunk = np.array(shrunk_errors(problem, tables_of(problem), results, SAMPLES))
    assert np.abs(shrunk - truth).mean() < 0.5 * np.abs(noisy - truth).mean()


def test_many_images_are_believed(problem: Problem) -> None:
    """What the tables do not explain stays where chance does not explain it either."""
    results, _ = measured(problem)
    shrunk = shrunk_errors(problem, tables_of(problem), results, 10**9)
    assert shrunk == pytest.approx([result.val_error for result in results], abs=1e-5)


@pytest.mark.parametrize("case", ["no tables", "nobody knows the images", "few results", "a table that is not finite"])
def test_errors_stay_where_nothing_is_known(problem: Problem, case: str) -> None:
    results, _ = measured(problem, 11 if case == "few results" else 20)
    tables: Tables | None = None if case == "no tables" else tables_of(problem)
    if case == "a table that is not finite" and tables is not None:
        broken = {group.name: dict.fromkeys(problem.criteria, (float("inf"),) * 17) for group in problem.groups[:1]}
        tables = {**tables, **broken}
    samples = 0 if case == "nobody knows the images" else SAMPLES
    assert shrunk_errors(problem, tables, results, samples) == [result.val_error for result in results]


def test_equal_results_are_no_trouble(problem: Problem) -> None:
    policy = policies(problem, 1)[0]
    results = [result_of(problem, policy, 0.25)] * 20
    assert shrunk_errors(problem, tables_of(problem), results, SAMPLES) == pytest.approx([0.25] * 20)


def test_a_lucky_candidate_is_not_promoted_for_its_luck(problem: Problem) -> None:
    """One policy in fifty measures three standard errors better than it is; another of its cost is really better."""
    drawn = sorted(policies(problem, 60), key=lambda policy: problem.costs(policy)["macs"])
    truth = {policy.id: true_error(problem, policy) for policy in drawn}
    stretch = drawn[25:35]
    best, worst = (choose(stretch, key=lambda policy: truth[policy.id]) for choose in (min, max))
    lucky = truth[worst.id] - truth[best.id]
    assert lucky < 0.06  # within what luck can do on few images
    trials = []
    for number, policy in enumerate(drawn):
        error = truth[policy.id] - (lucky + 0.01 if policy is worst else 0.0)
        result = result_of(problem, policy, error)
        trials.append(StoredTrial(number, "complete", policy, policy.id, "sampler", "sampler", result))
    plain = {c.policy.id for c in promoted(trials, problem, 6)}
    steady = {c.policy.id for c in promoted(trials, problem, 6, tables=tables_of(problem), samples=100)}
    assert worst.id in plain
    assert worst.id not in steady


def test_a_rung_that_is_cut_short_has_measured_the_better_one_of_two_at_the_same_cost(problem: Problem) -> None:
    drawn = sorted(policies(problem, 40), key=lambda policy: problem.costs(policy)["macs"])
    low, high = drawn[0], drawn[-1]
    apart = problem.costs(high)["macs"] / problem.costs(low)["macs"]
    assert apart > 1.5
    trials = []
    for policy, error, scale in ((low, 0.4, 1.0), (low, 0.3, 1.001), (high, 0.2, 1.0), (high, 0.1, 1.001)):
        costs = {**problem.costs(policy), "macs": int(problem.costs(policy)["macs"] * scale)}
        identity = f"{policy.id}-{scale}"
        result = TrialResult(
            policy, identity, FIDELITY, policy.widths(problem.groups), costs, {"val_accuracy": 1 - error}
        )
        trials.append(StoredTrial(len(trials), "complete", policy, identity, "sampler", "sampler", result))
    assert [candidate.identity[-5:] for candidate in promoted(trials, problem, 4)][:2] == ["1.001", "1.001"]
