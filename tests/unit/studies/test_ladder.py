"""The ladder explores, promotes, reuses, and keeps going when single trials fail."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import optuna
import pytest

from autoprune import pareto
from autoprune.errors import BudgetError, InputError, StudyError, TrialError
from autoprune.policy import Policy, uniform_policy
from autoprune.report import Progress
from autoprune.results import Fidelity, Problem, TrialResult, WarmStart
from autoprune.studies import (
    Event,
    LadderOutcome,
    LadderPlan,
    RungFinished,
    RungPlan,
    RungStarted,
    TrialFinished,
    load_rung,
    read_results,
    run_ladder,
    search_state,
)
from autoprune.studies.ladder import rung_deadline
from autoprune.studies.state import write_total

SCREEN, TUNE, FINAL = Fidelity("screen"), Fidelity("tune", 3), Fidelity("final", 8, test=True)


def policy_id(policy: Policy) -> str:
    return policy.id


def plan_for(problem: Problem, counts: Sequence[int] = (12, 5, 3), **more: Any) -> LadderPlan:
    rungs = tuple(RungPlan(f, n) for f, n in zip((SCREEN, TUNE, FINAL), counts, strict=False))
    return LadderPlan("digits", problem, rungs, "fingerprint", {"model": "m"}, **more)


def starts(problem: Problem, *ratios: float) -> tuple[WarmStart, ...]:
    return tuple(WarmStart(uniform_policy(problem.groups, r, "l2"), f"uniform-{r}") for r in ratios)


def run(storage: Any, plan: LadderPlan, submit: Any, **more: Any) -> LadderOutcome:
    return run_ladder(storage, plan, submit=submit, **{"identity": policy_id, **more})


@pytest.fixture
def problem(make_chain: Callable[..., Problem]) -> Problem:
    return make_chain(4)


@pytest.fixture
def submit(problem: Problem, make_evaluator: Callable[[Problem], Any]) -> Any:
    return make_evaluator(problem)


def test_every_rung_measures_its_number_of_distinct_policies_within_the_budget(
    storage: Any, problem: Problem, submit: Any
) -> None:
    out = run(storage, plan_for(problem), submit)
    assert out.complete
    assert {rung: len(trials) for rung, trials in out.rungs.items()} == {"screen": 12, "tune": 5, "final": 3}
    for trials in out.rungs.values():
        assert len({trial.identity for trial in trials}) == len(trials)
        assert all(problem.budget.within(trial.result.costs) for trial in trials if trial.result)
    assert len(submit.asked) == 20


def test_warm_starts_come_first_under_their_names(storage: Any, problem: Problem, submit: Any) -> None:
    out = run(storage, plan_for(problem, warm_starts=starts(problem, 0.4, 0.6)), submit)
    assert [trial.origin for trial in out.rungs["screen"][:3]] == ["uniform-0.4", "uniform-0.6", "sampler"]
    assert out.rungs["screen"][1].policy == uniform_policy(problem.groups, 0.6, "l2")


def test_promotion_takes_good_and_well_spread_trials_and_remembers_where_they_come_from(
    storage: Any, problem: Problem, submit: Any
) -> None:
    out = run(storage, plan_for(problem, warm_starts=starts(problem, 0.4, 0.6)), submit)
    dense = problem.cost_model.dense()["macs"]
    screen = [t.result for t in out.rungs["screen"] if t.result]
    chosen = pareto.select_spread([(r.val_error, r.costs["macs"] / dense) for r in screen], 5)
    assert sorted(trial.origin for trial in out.rungs["tune"]) == sorted(chosen)
    for low, high in (("screen", "tune"), ("tune", "final")):
        for trial in out.rungs[high]:
            parent = out.rungs[low][int(trial.origin)]
            assert (parent.identity, parent.source) == (trial.identity, trial.source)


def test_events_tell_the_whole_story(storage: Any, problem: Problem, submit: Any) -> None:
    events: list[Event] = []
    run(storage, plan_for(problem, (4, 2)), submit, on_event=events.append)
    assert events[0] == RungStarted("screen", 4, 0)
    assert events[5] == RungFinished("screen", 4, 0)
    assert events[6] == RungStarted("tune", 2, 0)
    told = [event for event in events if isinstance(event, TrialFinished)]
    assert [(e.rung, e.trial.number, e.trial.state) for e in told] == [
        *[("screen", i, "complete") for i in range(4)],
        *[("tune", i, "complete") for i in range(2)],
    ]
    assert all(event.trial.result is not None for event in told)


def test_stored_trials_are_readable_in_the_dashboard(database: Any, problem: Problem, submit: Any) -> None:
    run(database, plan_for(problem, (3, 1)), submit)
    for rung in ("screen", "tune"):
        trial = load_rung(database, "digits", rung).trials[-1]
        result = TrialResult.from_json(trial.user_attrs["result"])
        assert trial.values == [result.val_error, result.costs["macs"] / problem.cost_model.dense()["macs"]]
        assert trial.user_attrs["val accuracy"] == result.metrics["val_accuracy"]
        assert trial.user_attrs["MACs kept"] == pytest.approx(trial.values[1], abs=1e-4)
        assert trial.user_attrs["widths"].startswith(f"layer0 {result.widths['layer0']}/16, layer1 ")
        kept = {"params kept", "size kept", "memory kept"}
        assert kept | {"source", "policy_id", "identity", "origin"} <= trial.user_attrs.keys()
        excess = problem.budget.violation(result.costs)
        assert trial.system_attrs["constraints"] == [excess]
        assert trial.constraints == {"0": excess, "macs": excess}
        assert trial.datetime_start is not None


def test_results_are_read_back_without_the_problem(database: Any, problem: Problem, submit: Any) -> None:
    out = run(database, plan_for(problem, (3, 1)), submit)
    assert tuple(read_results(load_rung(database, "digits", "screen"))) == out.rungs["screen"]


def test_a_second_call_repeats_nothing(storage: Any, problem: Problem, submit: Any) -> None:
    plan = plan_for(problem, warm_starts=starts(problem, 0.4))
    first = run(storage, plan, submit)
    submit.asked.clear()
    assert run(storage, plan, submit) == first
    assert submit.asked == []


def test_more_trials_extend_a_finished_search(storage: Any, problem: Problem, submit: Any) -> None:
    first = run(storage, plan_for(problem, (6, 3)), submit)
    out = run(storage, plan_for(problem, (12, 3)), submit)
    assert out.rungs["screen"][:6] == first.rungs["screen"]
    assert len(out.rungs["screen"]) == 12
    assert out.rungs["tune"][:3] == first.rungs["tune"]
    assert len(set(submit.asked)) == len(submit.asked)


def test_fewer_trials_than_an_earlier_call_measured_are_told_as_all_of_them(
    storage: Any, problem: Problem, submit: Any
) -> None:
    run(storage, plan_for(problem, (6, 3)), submit)
    events: list[Event] = []
    run(storage, plan_for(problem, (4, 3)), submit, on_event=events.append)
    assert [(e.total, e.done) for e in events if isinstance(e, RungStarted)] == [(6, 6), (3, 3)]


def test_a_failed_trial_is_replaced_and_never_counts_as_one_of_those_that_were_asked_for(
    storage: Any, problem: Problem, submit: Any
) -> None:
    """What a person reads at every moment: on the live line, by `autoprune status`, and in the log."""

    def react(call: int) -> None:
        if call in (2, 8):
            raise TrialError("loss is nan in epoch 1")

    submit.react = react
    out, seen = io.StringIO(), list[tuple[int, int]]()
    with Progress(file=out) as progress:

        def told(event: Event) -> None:
            if isinstance(event, RungStarted):
                progress.rung_started(event.rung, total=event.total, done=event.done)
                write_total(load_rung(storage, "digits", event.rung), event.total)
            elif isinstance(event, TrialFinished):
                accuracy, cost = (None, None) if event.trial.result is None else (0.5, 1.0)
                progress.trial_finished(val_accuracy=accuracy, cost=cost)
                state = search_state(storage, "digits")
                seen.append((state.done, state.failed))
            else:
                progress.rung_finished()
                assert (event.done, event.failed) == (8, 2)

        run(storage, plan_for(problem, (8,)), submit, on_event=told)
    assert seen == [(1, 0), (1, 1), *((n, 1) for n in range(2, 7)), (6, 2), (7, 2), (8, 2)]
    assert "screen: finished: 8/8 trials, best val accuracy 50.0%, front 1, 2 failed" in out.getvalue()


def test_equal_policies_take_over_the_result_of_the_first(storage: Any, problem: Problem, submit: Any) -> None:
    def by_first_width(policy: Policy) -> str:
        return str(policy.widths(problem.groups)["layer0"])

    out = run(storage, plan_for(problem, (6, 3)), submit, identity=by_first_width)
    screen = out.rungs["screen"]
    reused = [trial for trial in screen if trial.reused is not None]
    assert reused
    assert all(trial.result == screen[trial.reused].result for trial in reused)  # type: ignore[index]
    assert len(submit.rung("screen")) == 6 == len({trial.identity for trial in screen})
    assert len({trial.identity for trial in out.rungs["tune"]}) == 3


def test_a_space_with_fewer_policies_than_trials_ends_and_stays_ended(
    storage: Any, make_chain: Callable[..., Problem], make_evaluator: Callable[[Problem], Any]
) -> None:
    problem = make_chain(1, round_to=4, criteria=("l2",))
    submit = make_evaluator(problem)
    out = run(storage, plan_for(problem, (30, 5)), submit)
    assert out.complete
    assert len(submit.rung("screen")) == 2  # 4 or 8 of 16 channels lie between 0.2 and 0.6
    before = len(out.rungs["screen"])
    assert len(run(storage, plan_for(problem, (30, 5)), submit).rungs["screen"]) == before


@pytest.mark.parametrize("accuracy", [math.nan, math.inf])
def test_a_value_that_is_no_number_fails_its_trial_only(
    storage: Any, problem: Problem, submit: Any, accuracy: float
) -> None:
    submit.react = lambda call: accuracy if call == 2 else None
    out = run(storage, plan_for(problem, (4, 2)), submit)
    failed = [trial for trial in out.rungs["screen"] if trial.state == "fail"]
    assert [trial.reason for trial in failed] == [f"val_accuracy is {accuracy}"]
    assert len(out.rungs["screen"]) == 5
    assert all(math.isfinite(v) for t in load_rung(storage, "digits", "screen").best_trials for v in t.values)


def test_a_trial_error_fails_its_trial_with_the_reason_and_the_search_goes_on(
    storage: Any, problem: Problem, submit: Any
) -> None:
    def react(call: int) -> None:
        if call in (2, 5):
            raise TrialError("loss is nan in epoch 1")

    submit.react = react
    events: list[Event] = []
    out = run(storage, plan_for(problem, (4, 2)), submit, on_event=events.append)
    reasons = [(t.number, t.reason) for t in out.rungs["screen"] if t.state == "fail"]
    assert reasons == [(1, "loss is nan in epoch 1"), (4, "loss is nan in epoch 1")]
    assert len([t for t in out.rungs["screen"] if t.state == "complete"]) == 4
    assert [e.trial.reason for e in events if isinstance(e, TrialFinished) and e.trial.state == "fail"] == [
        "loss is nan in epoch 1"
    ] * 2
    assert events[-1] == RungFinished("tune", 2, 0)


def test_a_failed_trial_of_a_later_rung_is_not_repeated(storage: Any, problem: Problem, submit: Any) -> None:
    def react(call: int) -> None:
        if call == 7:
            raise TrialError("out of memory")

    submit.react = react
    out = run(storage, plan_for(problem, (6, 3)), submit)
    assert [trial.state for trial in out.rungs["tune"]] == ["fail", "complete", "complete"]
    submit.asked.clear()
    assert run(storage, plan_for(problem, (6, 3)), submit) == out
    assert submit.asked == []


def test_five_failures_at_the_beginning_stop_the_search_with_the_reason(
    storage: Any, problem: Problem, submit: Any
) -> None:
    def react(call: int) -> None:
        raise TrialError("CUDA out of memory")

    submit.react = react
    with pytest.raises(TrialError, match=r"first 5 trials of the rung 'screen' all failed, .*: CUDA out of memory"):
        run(storage, plan_for(problem), submit)
    assert len(submit.asked) == 5


def test_a_small_rung_in_which_everything_fails_stops_the_search(storage: Any, problem: Problem, submit: Any) -> None:
    def react(call: int) -> None:
        if call > 6:
            raise TrialError("diverged")

    submit.react = react
    with pytest.raises(TrialError, match="every trial of the rung 'tune' failed, the last: diverged"):
        run(storage, plan_for(problem, (6, 2, 1)), submit)


def test_endless_failures_after_a_success_stop_the_search(storage: Any, problem: Problem, submit: Any) -> None:
    def react(call: int) -> None:
        if call > 1:
            raise TrialError("diverged")

    submit.react = react
    with pytest.raises(TrialError, match="10 of 11 trials of the rung 'screen' failed"):
        run(storage, plan_for(problem, (4,)), submit)


def test_any_other_error_stops_the_search_and_keeps_what_the_others_found(
    storage: Any, problem: Problem, make_outcome: Callable[..., TrialResult]
) -> None:
    pool = ThreadPoolExecutor(3)
    started: list[str] = []

    def evaluate(policy: Policy, fidelity: Fidelity) -> TrialResult:
        started.append(policy.id)
        if len(started) == 3:
            time.sleep(0.05)
            raise ZeroDivisionError("a bug")
        time.sleep(0.01 if len(started) == 1 else 0.3)
        return make_outcome(problem, policy, fidelity)

    def submit(policy: Policy, fidelity: Fidelity) -> Future[TrialResult]:
        return pool.submit(evaluate, policy, fidelity)

    plan = plan_for(problem, (10,), workers=3)
    with pool, pytest.raises(ZeroDivisionError, match="a bug"):
        run(storage, plan, submit)
    trials = load_rung(storage, "digits", "screen").trials
    complete = [t for t in trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert len(complete) == len(started) - 1


def test_several_evaluations_are_in_flight_and_never_more_than_workers(
    storage: Any, problem: Problem, make_outcome: Callable[..., TrialResult]
) -> None:
    pool = ThreadPoolExecutor(8)
    inside = most = 0

    def evaluate(policy: Policy, fidelity: Fidelity) -> TrialResult:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        inside -= 1
        return make_outcome(problem, policy, fidelity)

    with pool:
        out = run(storage, plan_for(problem, workers=3), lambda p, f: pool.submit(evaluate, p, f))
    assert most == 3
    assert len({trial.identity for trial in out.rungs["screen"]}) == 12


def test_equal_policies_in_flight_are_evaluated_once(
    storage: Any, problem: Problem, make_outcome: Callable[..., TrialResult]
) -> None:
    pool = ThreadPoolExecutor(4)
    asked: list[str] = []

    def by_first_width(policy: Policy) -> str:
        return "narrow" if policy.widths(problem.groups)["layer0"] < 9 else "wide"

    def evaluate(policy: Policy, fidelity: Fidelity) -> TrialResult:
        asked.append(by_first_width(policy))
        time.sleep(0.05)
        return make_outcome(problem, policy, fidelity, identity=by_first_width(policy))

    with pool:
        out = run(
            storage,
            plan_for(problem, (5,), workers=4),
            lambda p, f: pool.submit(evaluate, p, f),
            identity=by_first_width,
        )
    assert sorted(asked) == ["narrow", "wide"]
    assert out.complete


def test_a_warm_start_beyond_the_budget_is_a_bug_and_never_evaluated(
    storage: Any, problem: Problem, submit: Any
) -> None:
    with pytest.raises(BudgetError, match=r"the policy of 'uniform-0\.0' exceeds the budget by 66"):
        run(storage, plan_for(problem, warm_starts=starts(problem, 0.0)), submit)
    assert submit.asked == []


def test_the_deadline_stops_asking_and_the_next_call_goes_on(storage: Any, problem: Problem, submit: Any) -> None:
    past = time.monotonic() - 1
    out = run(storage, plan_for(problem), submit, deadline=past)
    assert not out.complete
    assert submit.asked == []
    assert run(storage, plan_for(problem), submit, deadline=time.monotonic() + 600).complete


def test_a_search_that_is_cut_short_still_measures_its_best_by_the_last_rung(
    storage: Any, problem: Problem, submit: Any
) -> None:
    """Evaluations take 20 ms; the first rung alone would need four times the time that there is."""

    def slow(policy: Policy, fidelity: Fidelity) -> Future[TrialResult]:
        time.sleep(0.02)
        return submit(policy, fidelity)  # type: ignore[no-any-return]

    plan = plan_for(problem, (400, 5, 3), sampler="random")
    out = run(storage, plan, slow, deadline=time.monotonic() + 2.0)
    assert not out.complete
    assert 3 <= len(out.rungs["screen"]) < 400
    assert len(out.rungs["tune"]) == 5
    assert len(out.rungs["final"]) == 3
    again = run(storage, plan_for(problem, (len(out.rungs["screen"]) + 4, 5, 3), sampler="random"), submit)
    assert again.complete


@pytest.mark.parametrize(("index", "share"), [(0, 7.6 / 46.6), (1, 15 / 39), (2, 1.0)])
def test_the_time_is_shared_by_planned_work_and_the_last_rung_has_the_rest(
    problem: Problem, index: int, share: float
) -> None:
    plan = plan_for(problem, (38, 5, 3))  # 38 * 0.2 + 5 * 3 + 3 * 8 = 46.6 epochs
    assert rung_deadline(plan, index, 100.0, 200.0) == pytest.approx(100.0 + 100.0 * share)
    assert rung_deadline(plan, index, 100.0, None) is None
    assert rung_deadline(plan, index, 300.0, 200.0) == 300.0


def test_a_rung_that_repairs_on_more_images_gets_more_of_the_time(problem: Problem) -> None:
    deep = Fidelity("final", calibration=2048)
    plain, deeper = (
        LadderPlan("n", problem, (RungPlan(SCREEN, 60), RungPlan(last, 20)), "f") for last in (Fidelity("final"), deep)
    )
    assert rung_deadline(plain, 0, 0.0, 100.0) == pytest.approx(75.0)
    assert rung_deadline(deeper, 0, 0.0, 100.0) == pytest.approx(100.0 * 60 / (60 + 2.5 * 20))


def test_a_deadline_that_passes_after_the_last_trial_does_no_harm(storage: Any, problem: Problem, submit: Any) -> None:
    run(storage, plan_for(problem), submit)
    assert run(storage, plan_for(problem), submit, deadline=time.monotonic() - 1).complete


def test_a_finished_rung_with_a_failed_trial_is_complete_even_after_the_deadline(
    storage: Any, problem: Problem, submit: Any
) -> None:
    def react(call: int) -> None:
        if call == 7:
            raise TrialError("out of memory")

    submit.react = react
    run(storage, plan_for(problem, (6, 3)), submit)
    assert run(storage, plan_for(problem, (6, 3)), submit, deadline=time.monotonic() - 1).complete


def test_without_a_sampler_only_the_warm_starts_are_measured(storage: Any, problem: Problem, submit: Any) -> None:
    plan = plan_for(problem, (9,), sampler=None, warm_starts=starts(problem, 0.4, 0.5))
    out = run(storage, plan, submit)
    assert out.complete
    assert [trial.origin for trial in out.rungs["screen"]] == ["uniform-0.4", "uniform-0.5"]
    assert run(storage, plan, submit) == out


def test_one_rung_is_a_ladder_whose_trials_are_seen_running(storage: Any, problem: Problem, submit: Any) -> None:
    states: list[list[str]] = []

    def react(call: int) -> None:
        states.append([trial.state.name for trial in load_rung(storage, "digits", "screen").trials])

    submit.react = react
    out = run(storage, plan_for(problem, (4,), warm_starts=starts(problem, 0.5)), submit)
    assert states[2] == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert [trial.origin for trial in out.rungs["screen"]] == ["uniform-0.5", *["sampler"] * 3]


def test_trials_of_a_later_rung_are_seen_running(storage: Any, problem: Problem, submit: Any) -> None:
    seen: list[str] = []

    def react(call: int) -> None:
        if call == 6:
            seen.extend(trial.state.name for trial in load_rung(storage, "digits", "tune").trials)

    submit.react = react
    run(storage, plan_for(problem, (4, 2)), submit)
    assert seen == ["COMPLETE", "RUNNING"]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random", "qmc"])
def test_every_sampler_survives_a_restart(storage: Any, problem: Problem, submit: Any, sampler: str) -> None:
    run(storage, plan_for(problem, (14,), sampler=sampler), submit)
    out = run(storage, plan_for(problem, (28,), sampler=sampler), submit)
    assert len({trial.identity for trial in out.rungs["screen"]}) == 28
    assert len(out.rungs["screen"]) < 34


def test_other_settings_are_refused_before_anything_is_evaluated(storage: Any, problem: Problem, submit: Any) -> None:
    run(storage, plan_for(problem, (3, 1)), submit)
    submit.asked.clear()
    rungs = (RungPlan(SCREEN, 5), RungPlan(TUNE, 1))
    with pytest.raises(StudyError, match="differs in model"):
        run(storage, LadderPlan("digits", problem, rungs, "other", {"model": "n"}), submit)
    assert submit.asked == []


def test_a_ladder_without_sense_is_refused(problem: Problem) -> None:
    with pytest.raises(InputError, match="distinct names"):
        LadderPlan("x", problem, (), "f")
    with pytest.raises(InputError, match="distinct names"):
        LadderPlan("x", problem, (RungPlan(SCREEN, 1), RungPlan(SCREEN, 1)), "f")
    with pytest.raises(InputError, match="at least one trial"):
        LadderPlan("x", problem, (RungPlan(SCREEN, 0),), "f")
    with pytest.raises(InputError, match="did you mean 'tpe'"):
        plan_for(problem, sampler="tpee")
    with pytest.raises(InputError, match="needs error tables"):
        plan_for(problem, sampler="learned")
