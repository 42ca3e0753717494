"""Synthetic problems and evaluators: the search is tested without a network and without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import pytest

from autoprune.budget import resolve_budget
from autoprune.cost import CostModel, Form, Term
from autoprune.policy import Group, Policy, feasible_widths
from autoprune.results import Fidelity, Problem, TrialResult
from autoprune.studies import open_storage


def chain(
    count: int,
    *,
    size: int = 16,
    budget: Mapping[str, float | int | str] | None = None,
    front: tuple[float, float] | None = (0.2, 0.6),
    criteria: tuple[str, ...] = ("l2", "taylor"),
    scope: Callable[[str], str] = lambda name: "model",
    round_to: int = 1,
) -> Problem:
    """A chain of `count` layers: each multiplies its kept inputs by its kept outputs."""
    names = [f"layer{i}" for i in range(count)]
    groups = tuple(Group(n, size, feasible_widths(size, round_to=round_to), scope(n)) for n in names)
    width = [Form(0, ((i, 1),)) for i in range(count)]
    pairs = [(width[0],), *((width[i], width[i + 1]) for i in range(count - 1)), (width[-1],)]
    macs = tuple(Term(40 + 7 * i, forms) for i, forms in enumerate(pairs))
    params = tuple(Term(9, forms) for forms in pairs)
    live = tuple((Term(64, (a,)), Term(64, (b,))) for a, b in pairwise(width)) or ((Term(1),),)
    model = CostModel(
        tuple(names), (size,) * count, macs, params, tuple(Term(4 * t.factor, t.forms) for t in params), live
    )
    return Problem(groups, model, resolve_budget(budget or {"macs": 0.6}, model, groups, front=front), criteria)


class Evaluator:
    """Evaluates in the caller's thread and keeps a list of what it was asked."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.asked: list[tuple[str, str]] = []
        self.react: Callable[[int], Any] = lambda call: None
        """Called with the number of the call; may raise, or return a validation accuracy."""

    def rung(self, name: str) -> list[str]:
        """The policy ids that were evaluated on a rung."""
        return [policy for rung, policy in self.asked if rung == name]

    def __call__(self, policy: Policy, fidelity: Fidelity) -> Future[TrialResult]:
        self.asked.append((fidelity.rung, policy.id))
        future: Future[TrialResult] = Future()
        try:
            accuracy = self.react(len(self.asked))
        except Exception as error:
            future.set_exception(error)
            return future
        future.set_result(outcome(self.problem, policy, fidelity, accuracy=accuracy))
        return future


def outcome(
    problem: Problem, policy: Policy, fidelity: Fidelity, *, accuracy: float | None = None, identity: str | None = None
) -> TrialResult:
    """A smooth synthetic result: later layers bear pruning less well."""
    widths = policy.widths(problem.groups)
    losses = [(1 - widths[g.name] / g.size) ** 2 * (1 + i) for i, g in enumerate(problem.groups)]
    if accuracy is None:
        accuracy = 1.0 - sum(losses) / sum(range(1, len(losses) + 1)) * (1.0 if fidelity.epochs else 1.1)
    metrics = {"val_accuracy": accuracy, "val_loss": 1.0}
    return TrialResult(policy, identity or policy.id, fidelity, widths, problem.costs(policy), metrics)


@pytest.fixture
def make_chain() -> Callable[..., Problem]:
    return chain


@pytest.fixture
def make_outcome() -> Callable[..., TrialResult]:
    return outcome


@pytest.fixture
def make_evaluator() -> Callable[[Problem], Evaluator]:
    return Evaluator


@pytest.fixture
def storage() -> Any:
    """A storage in memory: what SQLite adds is the business of the contract tests and of the tests of resuming."""
    return optuna.storages.InMemoryStorage()


@pytest.fixture
def database(tmp_path: Path) -> Any:
    return open_storage(tmp_path / "home" / "optuna.db")
