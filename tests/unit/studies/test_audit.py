"""Kendall's rank correlation and regret between two rungs."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from scipy.stats import kendalltau

from autoprune.policy import uniform_policy
from autoprune.results import Fidelity, Problem, TrialResult
from autoprune.studies import audit, kendall_tau


@pytest.fixture
def results(make_chain: Callable[..., Problem], make_outcome: Callable[..., TrialResult]) -> Callable[..., list]:
    problem = make_chain(2)
    policy = uniform_policy(problem.groups, 0.5, "l2")

    def make(errors: dict[str, float]) -> list[TrialResult]:
        return [
            make_outcome(problem, policy, Fidelity("screen"), accuracy=1 - error, identity=name)
            for name, error in errors.items()
        ]

    return make


def test_tau_is_scipys_on_random_sequences_with_ties() -> None:
    rng = random.Random(0)
    for _ in range(50):
        a = [rng.randint(0, 5) for _ in range(9)]
        b = [rng.randint(0, 5) for _ in range(9)]
        expected = kendalltau(a, b).statistic
        assert kendall_tau(a, b) == pytest.approx(expected, nan_ok=False)


def test_tau_is_undefined_for_one_pair_and_for_constant_errors() -> None:
    assert kendall_tau([1.0], [2.0]) is None
    assert kendall_tau([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None


def test_the_same_order_gives_one_and_no_regret(results: Callable[..., list[TrialResult]]) -> None:
    found = audit(results({"a": 0.1, "b": 0.2, "c": 0.3, "only here": 0.0}), results({"a": 0.05, "b": 0.1, "c": 0.2}))
    assert (found.pairs, found.tau, found.regret, found.warning) == (3, 1.0, 0.0, None)


def test_the_favourite_of_the_first_rung_costs_its_regret_on_the_second(
    results: Callable[..., list[TrialResult]],
) -> None:
    found = audit(results({"a": 0.1, "b": 0.2, "c": 0.3}), results({"a": 0.5, "b": 0.2, "c": 0.3}))
    assert found.regret == pytest.approx(0.3)


def test_a_reversed_order_is_warned_of_from_six_pairs_on(results: Callable[..., list[TrialResult]]) -> None:
    first = {name: i / 10 for i, name in enumerate("abcdef")}
    second = {name: 1 - i / 10 for i, name in enumerate("abcdef")}
    found = audit(results(first), results(second))
    assert found.tau == -1.0
    assert found.warning is not None
    assert "over 6 policies" in found.warning
    five = {name: first[name] for name in "abcde"}
    assert audit(results(five), results(second)).warning is None


def test_nothing_in_common_says_nothing(results: Callable[..., list[TrialResult]]) -> None:
    found = audit(results({"a": 0.1, "broken": float("nan")}), results({"b": 0.1, "broken": 0.2}))
    assert (found.pairs, found.tau, found.regret, found.warning) == (0, None, None, None)
