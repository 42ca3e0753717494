"""Proposals made ahead in a process of their own are those that the model makes, whatever happens to the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from autoprune.errors import AutopruneError, BudgetError
from autoprune.policy import Policy
from autoprune.results import Fidelity, Problem, TrialResult
from autoprune.studies import LadderPlan, RungPlan, load_rung, open_storage, read_results, run_ladder
from autoprune.studies import ladder as ladders
from autoprune.studies.ahead import Ahead
from autoprune.studies.learned import Tables, learned_model
from autoprune.studies.rung import LEARNED
from autoprune.studies.sampler import widths_of

SCREEN = Fidelity("screen")
STOCK = 3


@pytest.fixture
def problem(make_chain: Callable[..., Problem]) -> Problem:
    return make_chain(4, front=(0.2, 0.8), budget={"macs": 0.8}, scope=lambda name: name)


def tables_of(problem: Problem) -> Tables:
    curve = [(1.0 - width / 16) ** 2 for width in range(17)]
    return {group.name: {name: tuple(curve) for name in problem.criteria} for group in problem.groups}


def measured(problem: Problem, policy: Policy, fidelity: Fidelity = SCREEN) -> TrialResult:
    widths = widths_of(problem, policy)
    loss = 0.1 + sum((1 + i) * (1 - width / 16) ** 2 for i, width in enumerate(widths.values()))
    metrics = {"val_loss": loss, "val_accuracy": 1.0 / (1.0 + loss)}
    return TrialResult(policy, policy.id, fidelity, widths, problem.costs(policy), metrics)


def expected(problem: Problem, count: int) -> list[str]:
    """What the model proposes where each proposal knows the results of `STOCK` calls before."""
    model = learned_model(problem, tables_of(problem), 5, 0)
    results: list[TrialResult] = []
    ordered = [model.propose(results) for _ in range(STOCK + 1)]
    proposals = []
    for _ in range(count):
        proposals.append(ordered.pop(0))
        results.append(measured(problem, proposals[-1]))
        ordered.append(model.propose(results))
    return [policy.id for policy in proposals]


def made(problem: Problem, ahead: Ahead, count: int, before: Callable[[int], None] = lambda i: None) -> list[str]:
    results: list[TrialResult] = []
    found = []
    for i in range(count):
        before(i)
        policy = ahead.propose(results)
        found.append(policy.id)
        results.append(measured(problem, policy))
    return found


def test_each_proposal_knows_the_results_of_the_time_when_it_was_ordered(problem: Problem) -> None:
    make = partial(learned_model, problem, tables_of(problem), 5)
    with Ahead(make, stock=STOCK, rest=0) as ahead:
        assert made(problem, ahead, 14) == expected(problem, 14)


def test_a_process_that_is_killed_is_replaced_by_one_that_goes_on(problem: Problem) -> None:
    make = partial(learned_model, problem, tables_of(problem), 5)
    killed: list[int] = []

    def kill(turn: int) -> None:
        if turn == 4:
            assert ahead._process is not None
            killed.append(ahead._process.pid)
            os.kill(ahead._process.pid, signal.SIGKILL)
            ahead._process.wait()

    with Ahead(make, stock=STOCK, rest=0) as ahead:
        found = made(problem, ahead, 10, kill)
        assert ahead._process is not None
        assert ahead._process.pid not in killed
    assert found[:4] == expected(problem, 4)
    assert len(found) == 10  # random weights begin anew with the process: others than without the kill


def test_no_process_is_left_behind(problem: Problem) -> None:
    make = partial(learned_model, problem, tables_of(problem), 5)
    with Ahead(make, stock=1, rest=0) as ahead:
        assert ahead._process is None  # it starts with the first proposal
        ahead.propose([])
        process = ahead._process
        assert process is not None
        assert process.poll() is None
    assert process.poll() is not None
    ahead.close()


class Refuses:
    """No policy meets this model's budget."""

    def propose(self, results: Sequence[TrialResult]) -> Policy:
        raise BudgetError("no policy has macs <= 3")


class Dies:
    """A model that takes its process down."""

    def propose(self, results: Sequence[TrialResult]) -> Policy:
        os._exit(9)


def test_a_budget_that_no_policy_meets_is_told_as_it_is(here_importable: None) -> None:
    with Ahead(partial(make_model, "Refuses"), stock=1, rest=0) as ahead, pytest.raises(BudgetError, match="macs <= 3"):
        ahead.propose([])


def test_a_process_that_dies_again_and_again_ends_the_search_with_its_status(here_importable: None) -> None:
    with (
        Ahead(partial(make_model, "Dies"), stock=1, rest=0) as ahead,
        pytest.raises(AutopruneError, match=r"died 3 times \(exit status 9\)"),
    ):
        ahead.propose([])


def make_model(kind: str, done: int) -> Any:
    return {"Refuses": Refuses, "Dies": Dies}[kind]()


@pytest.fixture
def here_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets another process find this file's functions by their name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for function in (make_model, Refuses, Dies):
        monkeypatch.setattr(function, "__module__", Path(__file__).stem)
    monkeypatch.setitem(__import__("sys").modules, Path(__file__).stem, __import__("sys").modules[__name__])


def test_a_search_on_many_workers_takes_its_learned_proposals_from_the_process(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Ahead] = []

    class Watched(Ahead):
        def propose(self, results: Sequence[TrialResult]) -> Policy:
            used.append(self)
            return super().propose(results)

    monkeypatch.setattr(ladders, "Ahead", Watched)
    plan = LadderPlan(
        "many", problem, (RungPlan(SCREEN, 40),), "f", sampler="auto", workers=32, tables=tables_of(problem)
    )
    lock = threading.Lock()
    with ThreadPoolExecutor(4) as pool:

        def evaluate(policy: Policy, fidelity: Fidelity) -> TrialResult:
            with lock:
                return measured(problem, policy, fidelity)

        def submit(policy: Policy, fidelity: Fidelity) -> Future[TrialResult]:
            return pool.submit(evaluate, policy, fidelity)

        storage = open_storage(tmp_path / "optuna.db")
        run_ladder(storage, plan, submit=submit, identity=lambda policy: policy.id)
    stored = read_results(load_rung(storage, "many", "screen"))
    assert len({trial.identity for trial in stored}) == 40
    assert {trial.source for trial in stored} == {"sampler", LEARNED}
    assert used
    assert used[0]._process is None  # it ended with the rung
    storage.engine.dispose()


def test_few_workers_ask_the_model_in_their_own_process(problem: Problem) -> None:
    for workers, stock in ((1, 0), (31, 0), (32, 4), (64, 8)):
        plan = LadderPlan("few", problem, (RungPlan(SCREEN, 1),), "f", workers=workers)
        assert plan.stock == stock
