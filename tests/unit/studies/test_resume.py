"""Killed at any moment and started again, a search loses and repeats nothing but what was in flight."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from autoprune.policy import Policy
from autoprune.results import Fidelity, Problem, TrialResult
from autoprune.studies import LadderPlan, RungPlan, load_rung, open_storage, records, run_ladder

COUNTS = (6, 4, 2)


def policy_id(policy: Policy) -> str:
    return policy.id


def plan_for(problem: Problem, counts: tuple[int, ...] = COUNTS) -> LadderPlan:
    fidelities = (Fidelity("screen"), Fidelity("tune", 3), Fidelity("final", 8))
    rungs = tuple(RungPlan(f, n) for f, n in zip(fidelities, counts, strict=False))
    return LadderPlan("digits", problem, rungs, "fingerprint")


@pytest.fixture
def problem(make_chain: Callable[..., Problem]) -> Problem:
    return make_chain(3)


def interrupt_at(number: int) -> Callable[[int], None]:
    def react(call: int) -> None:
        if call == number:
            raise KeyboardInterrupt

    return react


class KilledError(BaseException):
    """Stands for `kill -9`: nothing is tidied up."""


def kill_at(number: int) -> Callable[[int], None]:
    def react(call: int) -> None:
        if call == number:
            raise KilledError

    return react


@pytest.mark.parametrize("at", range(1, sum(COUNTS) + 1))
def test_interrupted_in_any_trial_nothing_else_is_lost_or_repeated(
    storage: Any, problem: Problem, make_evaluator: Callable[[Problem], Any], at: int
) -> None:
    submit = make_evaluator(problem)
    submit.react = interrupt_at(at)
    with pytest.raises(KeyboardInterrupt):
        run_ladder(storage, plan_for(problem), submit=submit, identity=policy_id)
    out = run_ladder(storage, plan_for(problem), submit=submit, identity=policy_id)
    assert len(submit.asked) == sum(COUNTS) + 1
    lost = submit.asked[at - 1]
    repeated = [item for item, times in Counter(submit.asked).items() if times > 1]
    # On the first rung nobody is bound to propose the same once more; a promoted policy is owed.
    assert repeated == [lost] or (lost[0] == "screen" and not repeated)
    for rung, count in zip(("screen", "tune", "final"), COUNTS, strict=True):
        complete = [trial for trial in out.rungs[rung] if trial.state == "complete"]
        assert len({trial.identity for trial in complete}) == count
        left = [trial for trial in out.rungs[rung] if trial.abandoned]
        assert len(left) == (1 if rung == lost[0] != "screen" else 0)
        assert all(trial.state == "fail" for trial in left)


def test_a_ladder_of_one_rung_begins_its_abandoned_trial_again_with_the_same_parameters(
    storage: Any, problem: Problem, make_evaluator: Callable[[Problem], Any]
) -> None:
    submit = make_evaluator(problem)
    submit.react = interrupt_at(3)
    plan = plan_for(problem, (6,))
    with pytest.raises(KeyboardInterrupt):
        run_ladder(storage, plan, submit=submit, identity=policy_id)
    run_ladder(storage, plan, submit=submit, identity=policy_id)
    trials = load_rung(storage, "digits", "screen").trials
    assert trials[2].state == optuna.trial.TrialState.FAIL
    assert trials[2].user_attrs["abandoned"]
    assert trials[3].params == trials[2].params
    assert trials[3].state == optuna.trial.TrialState.COMPLETE
    assert len(trials) == 7


def test_interrupted_nothing_is_left_running_and_what_was_in_flight_is_owed(
    storage: Any, problem: Problem, make_evaluator: Callable[[Problem], Any]
) -> None:
    submit = make_evaluator(problem)
    submit.react = interrupt_at(8)
    with pytest.raises(KeyboardInterrupt):
        run_ladder(storage, plan_for(problem), submit=submit, identity=policy_id)
    trials = records.read_trials(load_rung(storage, "digits", "tune"), problem)
    assert [(trial.state, trial.abandoned, trial.reason) for trial in trials[1:]] == [("fail", True, "interrupted")]
    run_ladder(storage, plan_for(problem), submit=submit, identity=policy_id)
    assert submit.asked[8] == submit.asked[7]


@pytest.mark.parametrize("at", [(3,), (7, 8), (5, 12, 13)])
@pytest.mark.parametrize("rungs", [1, 2])
def test_killed_at_any_moment_a_random_search_tries_the_same_policies(
    problem: Problem, make_evaluator: Callable[[Problem], Any], at: tuple[int, ...], rungs: int
) -> None:
    def tried(kills: tuple[int, ...]) -> set[tuple[str, str]]:
        storage = optuna.storages.InMemoryStorage()
        plan = replace(plan_for(problem, (20, 4)[:rungs]), sampler="random")
        submit = make_evaluator(problem)
        for kill in kills:
            submit.react = kill_at(kill)
            with pytest.raises(KilledError):
                run_ladder(storage, plan, submit=submit, identity=policy_id)
        submit.react = lambda call: None
        out = run_ladder(storage, plan, submit=submit, identity=policy_id)
        assert len({trial.identity for trial in out.rungs["screen"] if trial.state == "complete"}) == 20
        return {(rung, t.identity) for rung, trials in out.rungs.items() for t in trials if t.state == "complete"}

    assert tried(at) == tried(())


def test_killed_between_failing_and_beginning_again_the_trial_is_still_owed(
    storage: Any, problem: Problem, make_evaluator: Callable[[Problem], Any]
) -> None:
    submit = make_evaluator(problem)
    submit.react = kill_at(8)
    with pytest.raises(KilledError):
        run_ladder(storage, plan_for(problem), submit=submit, identity=policy_id)
    submit.react = kill_at(9)  # the same trial again
    with pytest.raises(KilledError):
        run_ladder(storage, plan_for(problem), submit=submit, identity=policy_id)
    assert submit.asked[7] == submit.asked[8]
    study = load_rung(storage, "digits", "tune")
    records.fail_running(study, len(study.trials) - 1, reason="killed", abandoned=True)
    out = run_ladder(storage, plan_for(problem), submit=submit, identity=policy_id)
    assert submit.asked[9] == submit.asked[8]
    assert [trial.abandoned for trial in out.rungs["tune"]] == [False, True, True, False, False, False]


def test_a_trial_that_was_killed_after_its_result_was_written_is_completed_and_not_repeated(
    database: Any,
    problem: Problem,
    make_evaluator: Callable[[Problem], Any],
    make_outcome: Callable[..., TrialResult],
) -> None:
    submit = make_evaluator(problem)
    submit.react = kill_at(8)
    with pytest.raises(KilledError):
        run_ladder(database, plan_for(problem), submit=submit, identity=policy_id)
    study = load_rung(database, "digits", "tune")
    trial = study.trials[-1]
    (running,) = [t for t in records.read_trials(study, problem) if t.state == "running"]
    result = make_outcome(problem, running.policy, Fidelity("tune", 3))
    for key, value in records.result_attrs(problem, result).items():
        study._storage.set_trial_user_attr(trial._trial_id, key, value)
    out = run_ladder(database, plan_for(problem), submit=submit, identity=policy_id)
    assert out.rungs["tune"][trial.number].result == result
    assert len(submit.asked) == sum(COUNTS)


SCRIPT = """
import sys, time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import chain, outcome
from autoprune.results import Fidelity
from autoprune.studies import LadderPlan, RungPlan, open_storage, run_ladder

log = Path({log!r})
problem = chain(3)
def submit(policy, fidelity):
    with log.open("a") as file:
        file.write(f"{{fidelity.rung}} {{policy.id}}\\n")
    if fidelity.rung == {rung!r}:
        time.sleep(0.1)
    future = Future()
    future.set_result(outcome(problem, policy, fidelity))
    return future

fidelities = (Fidelity("screen"), Fidelity("tune", 3), Fidelity("final", 8))
rungs = tuple(RungPlan(f, n) for f, n in zip(fidelities, {counts!r}))
plan = LadderPlan("digits", problem, rungs, "fingerprint")
run_ladder(open_storage({database!r}), plan, submit=submit, identity=lambda policy: policy.id)
"""


@pytest.mark.parametrize(("rung", "lines"), [("screen", 3), ("tune", 8)])
def test_kill_minus_nine_in_the_middle_of_a_rung_loses_only_what_was_in_flight(
    tmp_path: Path, problem: Problem, make_evaluator: Callable[[Problem], Any], rung: str, lines: int
) -> None:
    log, database = tmp_path / "log", tmp_path / "optuna.db"
    tests = str(Path(__file__).parent)
    script = SCRIPT.format(tests=tests, log=str(log), rung=rung, counts=COUNTS, database=str(database))
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    for _ in range(20_000):
        if log.exists() and len(log.read_text().splitlines()) >= lines:
            break
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    before = [tuple(line.split()) for line in log.read_text().splitlines()]
    submit = make_evaluator(problem)
    out = run_ladder(open_storage(database), plan_for(problem), submit=submit, identity=policy_id)
    everything = [*before, *submit.asked]
    assert len(everything) <= sum(COUNTS) + 1
    assert {item for item, times in Counter(everything).items() if times > 1} <= {before[-1]}
    for name, count in zip(("screen", "tune", "final"), COUNTS, strict=True):
        complete = [trial for trial in out.rungs[name] if trial.state == "complete"]
        assert len({trial.identity for trial in complete}) == count
