"""Every storage keeps a search whole: one process at a time, nothing twice, a server that is away is waited for."""

from __future__ import annotations

import datetime
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
import sqlalchemy.orm
from optuna.trial import TrialState

from autoprune.budget import Budget
from autoprune.cost import CostModel, Form, Term
from autoprune.errors import LeaseError, StorageError
from autoprune.policy import Choice, Group, Policy
from autoprune.results import Fidelity, Problem, TrialResult
from autoprune.studies import LadderPlan, RungPlan, is_running, lease, open_storage, records, run_ladder
from autoprune.studies.retrying import TOKEN, is_away

GROUPS = tuple(Group(f"layer{i}", 8, tuple(range(1, 9))) for i in range(3))
FORMS = tuple(Form(0, ((i, 1),)) for i in range(3))
TERMS = (Term(5, FORMS[:2]), Term(7, FORMS[1:]))
MODEL = CostModel(("layer0", "layer1", "layer2"), (8, 8, 8), TERMS, TERMS, TERMS, (TERMS,))
PROBLEM = Problem(GROUPS, MODEL, Budget({"macs": 460}, "macs", (0.2, 0.6)), ("l2", "taylor"))
POLICY = Policy({group.name: Choice("l2", 0.5) for group in GROUPS})
CANDIDATE = records.Candidate(POLICY, POLICY.id, "uniform", "uniform")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("postgres_url" if request.param == "postgresql" else "tmp_path")) + (
        "" if request.param == "postgresql" else "/optuna.db"
    )


@pytest.fixture
def study(where: str) -> optuna.Study:
    return study_in(where, create=True)


def study_in(where: str, *, create: bool = False) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(where)
    if create:
        return optuna.create_study(storage=storage, study_name="digits.screen", directions=["minimize"] * 2)
    return optuna.load_study(storage=storage, study_name="digits.screen")


def backend_of(study: optuna.Study) -> Any:
    return study._storage._backend  # type: ignore[attr-defined]


def result_of(policy: Policy, fidelity: Fidelity) -> TrialResult:
    costs = PROBLEM.costs(policy)
    return TrialResult(
        policy, policy.id, fidelity, policy.widths(GROUPS), costs, {"val_accuracy": costs["macs"] / 1000}
    )


def add(study: optuna.Study) -> int:
    return records.add_complete(
        study,
        PROBLEM,
        CANDIDATE,
        result=result_of(POLICY, Fidelity("screen")),
        reused=None,
        started=datetime.datetime.now(),
        notes={},
    )


@pytest.fixture
def break_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets the connection break after the next writes have arrived at the database; fewer than none: before."""
    left = [0]
    commit = sqlalchemy.orm.Session.commit

    def broken(session: Any) -> None:
        wrote = bool(session.new or session.dirty or session.identity_map)
        before = left[0] < 0 and wrote
        if not before:
            commit(session)
        if left[0] and wrote:
            left[0] += 1 if before else -1
            raise sqlalchemy.exc.OperationalError("commit", {}, Exception("gone"), connection_invalidated=True)

    monkeypatch.setattr(sqlalchemy.orm.Session, "commit", broken)
    return lambda times: left.__setitem__(0, times)


@pytest.mark.parametrize("times", [1, 2, -1, -2])
def test_a_trial_that_arrived_although_the_connection_broke_is_stored_once(
    where: str, study: optuna.Study, times: int, break_after: Callable[[int], None]
) -> None:
    assert add(study) == 0
    break_after(times)
    assert add(study) == 1
    again = study_in(where).get_trials()
    assert [trial.number for trial in again] == [0, 1]
    assert len({trial.system_attrs[TOKEN] for trial in again}) == 2


def test_a_trial_that_ended_although_the_connection_broke_stays_ended(
    where: str, study: optuna.Study, break_after: Callable[[int], None]
) -> None:
    result = result_of(POLICY, Fidelity("screen"))
    records.begin(study, PROBLEM, CANDIDATE)
    trial_id = study.get_trials()[0]._trial_id
    break_after(1)
    assert study._storage.set_trial_state_values(trial_id, TrialState.COMPLETE, records.objectives(PROBLEM, result))
    trial = study_in(where).get_trials()[0]
    assert (trial.state, tuple(trial.values)) == (TrialState.COMPLETE, records.objectives(PROBLEM, result))
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        study._storage.set_trial_state_values(trial_id, TrialState.FAIL)


@pytest.mark.parametrize("times", [1, -1])
def test_a_result_that_arrived_although_the_connection_broke_is_written_once(
    where: str, study: optuna.Study, times: int, break_after: Callable[[int], None]
) -> None:
    result = result_of(POLICY, Fidelity("screen"))
    number = records.begin(study, PROBLEM, CANDIDATE)
    break_after(times)
    records.finish_running(study, PROBLEM, number, result=result, reused=None, notes={"generation": 3})
    stored = records.read_trials(study_in(where), PROBLEM)[number]
    assert (stored.state, stored.result) == ("complete", result)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        records.finish_running(study, PROBLEM, number, result=result, reused=None, notes={})


def test_a_trial_is_stored_as_optuna_itself_would_store_it(where: str, study: optuna.Study) -> None:
    number = records.begin(study, PROBLEM, CANDIDATE)
    result = result_of(POLICY, Fidelity("screen"))
    records.finish_running(study, PROBLEM, number, result=result, reused=None, notes={"generation": 3})
    memory = optuna.create_study(directions=["minimize"] * 2)
    number = records.begin(memory, PROBLEM, CANDIDATE)
    records.finish_running(memory, PROBLEM, number, result=result, reused=None, notes={"generation": 3})
    ours, theirs = study_in(where).get_trials()[0], memory.get_trials()[0]
    for name in ("number", "state", "values", "params", "distributions", "user_attrs"):
        assert getattr(ours, name) == getattr(theirs, name), name
    tokens = [trial.system_attrs.pop(TOKEN) for trial in (ours, theirs)]
    assert len(set(tokens)) == 2
    assert ours.system_attrs == theirs.system_attrs
    assert ours.datetime_start <= ours.datetime_complete


def test_of_many_that_start_at_the_same_moment_one_gets_the_lease(where: str, study: optuna.Study) -> None:
    count = 6
    studies = [study_in(where) for _ in range(count)]
    for _ in range(5):
        together, done = threading.Barrier(count), threading.Barrier(count)

        def attempt(own: optuna.Study, together: threading.Barrier = together, done: threading.Barrier = done) -> bool:
            together.wait()
            try:
                with lease.hold(own):
                    done.wait()
            except LeaseError:
                done.wait()
                return False
            return True

        with ThreadPoolExecutor(count) as pool:
            assert sum(pool.map(attempt, studies)) == 1
    assert not is_running(study)


def test_a_process_whose_lease_was_taken_over_stores_nothing_more(where: str, study: optuna.Study) -> None:
    other = study_in(where)
    thief = {"id": "other", "host": "elsewhere", "pid": 1, "start": "1", "until": time.time() + 1000}

    def writes() -> None:
        with lease.hold(study):
            number = records.begin(study, PROBLEM, CANDIDATE)
            add(study)
            other.set_user_attr(lease.LEASE, thief)
            refused: list[Callable[[], Any]] = [
                lambda: add(study),
                lambda: records.begin(study, PROBLEM, CANDIDATE),
                lambda: records.fail_running(study, number, reason="late"),
                lambda: study.set_user_attr("late", 1),
            ]
            for write in refused:
                with pytest.raises(LeaseError, match="process 1 on elsewhere has taken over"):
                    write()
            add(study)

    with pytest.raises(LeaseError, match="stored nothing since"):
        writes()
    trials = other.get_trials()
    assert [trial.state for trial in trials] == [TrialState.RUNNING, TrialState.COMPLETE]
    assert "late" not in other.user_attrs
    assert records.REASON not in trials[0].user_attrs
    assert other.user_attrs[lease.LEASE] == thief  # nor is it given back for the other one
    assert is_running(other)


def test_the_lease_is_renewed_while_it_is_held(
    where: str, study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.02)
    seen = set()
    with lease.hold(study):
        end = time.monotonic() + 30
        while len(seen) < 3 and time.monotonic() < end:
            seen.add(study.user_attrs[lease.LEASE]["until"])
            add(study)
        assert study.user_attrs[lease.LEASE]["host"] == socket.gethostname()
    assert len(seen) >= 3
    assert study.user_attrs[lease.LEASE] is None


def test_a_full_disk_is_one_clear_error_and_leaves_the_studies_readable(tmp_path: Path) -> None:
    study = study_in(f"{tmp_path}/optuna.db", create=True)
    add(study)
    with backend_of(study).engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StorageError, match="full"):
        list(map(add, [study] * 100))
    trials = study_in(f"{tmp_path}/optuna.db").get_trials()
    assert trials
    assert all("result" in trial.user_attrs for trial in trials)


def test_what_passes_by_itself_is_told_from_what_does_not() -> None:
    def failure(state: str | None, *, lost: bool = False) -> Exception:
        origin = Exception("why")
        origin.sqlstate = state  # type: ignore[attr-defined]
        return sqlalchemy.exc.OperationalError("select", {}, origin, connection_invalidated=lost)

    assert all(is_away(failure(code)) for code in (None, "08006", "57P01", "57P03", "40P01", "53300"))
    assert is_away(failure("53100", lost=True))
    assert not is_away(failure("53100"))  # disk full
    assert not is_away(failure("42501"))  # not allowed
    assert not is_away(sqlalchemy.exc.DataError("insert", {}, Exception("too long")))


@pytest.mark.slow
def test_a_server_that_is_killed_in_the_middle_of_a_search_is_waited_for(
    postgres_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "outage"
    said: list[str] = []
    calls = [0]
    restarts: list[threading.Thread] = []

    def submit(policy: Policy, fidelity: Fidelity) -> Future[TrialResult]:
        calls[0] += 1
        if calls[0] in (3, 9):
            postgres_server.kill()
            restarts.append(threading.Timer(1.0, postgres_server.start))
            restarts[-1].start()
        future: Future[TrialResult] = Future()
        future.set_result(result_of(policy, fidelity))
        return future

    storage = open_storage(postgres_server.url("outages"), say=said.append)
    plan = LadderPlan(name, PROBLEM, (RungPlan(Fidelity("screen"), 12), RungPlan(Fidelity("tune", 1), 3)), "print")
    outcome = run_ladder(storage, plan, submit=submit, identity=lambda policy: policy.id)
    for restart in restarts:
        restart.join()
    screened = [trial for trial in outcome.rungs["screen"] if trial.reused is None]
    assert len(screened) == 12
    assert {trial.state for trial in outcome.rungs["screen"]} == {"complete"}
    assert calls[0] == 15
    assert len(said) == 4
    assert "is away" in said[0]
    assert "the storage is back" in said[1]

    postgres_server.kill()
    storage.patience = 0.3
    with pytest.raises(StorageError, match=r"autoprune@127.0.0.1:\d+/outages has been away for 0 s .* resumes"):
        storage.get_all_studies()
    postgres_server.start()
    assert storage.get_all_studies()


def test_the_lease_in_the_storage_is_plain_json(study: optuna.Study) -> None:
    with lease.hold(study):
        with backend_of(study).engine.connect() as connection:
            query = sqlalchemy.text("select value_json from study_user_attributes where key = :key")
            text = connection.execute(query, {"key": lease.LEASE}).scalar_one()
        assert json.loads(text)["until"] == pytest.approx(time.time() + lease.VALID_SECONDS, abs=30)
