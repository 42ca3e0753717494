"""Every storage keeps studies in the same way: SQLite by path and by URL, and a real PostgreSQL server."""

from __future__ import annotations

import sqlite3
import uuid
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from autoprune.budget import Budget
from autoprune.cost import CostModel, Form, Term
from autoprune.errors import MissingExtraError, StudyError
from autoprune.policy import Group, Policy
from autoprune.results import Fidelity, Problem, TrialResult
from autoprune.studies import LadderPlan, RungPlan, open_storage, run_ladder, same_database, split_password

GROUPS = tuple(Group(f"layer{i}", 8, tuple(range(1, 9))) for i in range(3))
FORMS = tuple(Form(0, ((i, 1),)) for i in range(3))
TERMS = (Term(5, FORMS[:2]), Term(7, FORMS[1:]))
MODEL = CostModel(("layer0", "layer1", "layer2"), (8, 8, 8), TERMS, TERMS, TERMS, (TERMS,))
PROBLEM = Problem(GROUPS, MODEL, Budget({"macs": 460}, "macs", (0.2, 0.6)), ("l2", "taylor"))


@pytest.fixture(params=["path", "sqlite-url", "odd-path", pytest.param("postgresql", marks=pytest.mark.slow)])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    if request.param == "sqlite-url":
        return f"sqlite:///{tmp_path}/home/optuna.db"
    return tmp_path / ("{odd} ?name%20#" if request.param == "odd-path" else "home") / "optuna.db"


def submit(policy: Policy, fidelity: Fidelity) -> Future[TrialResult]:
    future: Future[TrialResult] = Future()
    costs = PROBLEM.costs(policy)
    metrics = {"val_accuracy": costs["macs"] / 1000}
    future.set_result(TrialResult(policy, policy.id, fidelity, policy.widths(GROUPS), costs, metrics))
    return future


def forbidden(policy: Policy, fidelity: Fidelity) -> Future[TrialResult]:
    raise AssertionError("nothing is left to evaluate")


def test_a_search_is_read_back_whole_by_another_connection(where: str | Path) -> None:
    name = f"contract-{uuid.uuid4().hex[:8]}"
    rungs = (RungPlan(Fidelity("screen"), 8), RungPlan(Fidelity("tune", 1), 3))
    plan = LadderPlan(name, PROBLEM, rungs, "fingerprint")
    first = run_ladder(open_storage(where), plan, submit=submit, identity=lambda policy: policy.id)
    again = run_ladder(open_storage(where), plan, submit=forbidden, identity=lambda policy: policy.id)
    assert first == again
    assert [len({trial.identity for trial in again.rungs[rung]}) for rung in ("screen", "tune")] == [8, 3]


def test_sqlite_writes_ahead_and_waits_for_others(tmp_path: Path) -> None:
    storage: Any = open_storage(tmp_path / "optuna.db")
    with storage.engine.connect() as connection:
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
        assert found == ["wal", 1]
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 60_000


def test_a_missing_file_is_only_made_where_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="there is no study yet"):
        open_storage(tmp_path / "home" / "optuna.db", create=False)
    assert not (tmp_path / "home").exists()


def test_what_is_no_database_of_studies_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database " * 100)
    with pytest.raises(StudyError, match="file is not a database"):
        open_storage(tmp_path / "text.db")
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        connection.execute("INSERT INTO alembic_version VALUES ('0123456789ab')")
        connection.execute("CREATE TABLE studies (something INTEGER)")
    connection.close()
    with pytest.raises(StudyError, match=r"other\.db"):
        open_storage(tmp_path / "other.db")
    with pytest.raises(StudyError, match="keeps nothing"):
        open_storage("sqlite:///:memory:")


def test_an_unreachable_server_and_a_missing_driver_are_told_without_the_password() -> None:
    with pytest.raises((StudyError, MissingExtraError)) as caught:
        open_storage("postgresql+psycopg://someone:secret@127.0.0.1:1/studies")
    assert "secret" not in str(caught.value)
    assert "someone:***@127.0.0.1:1/studies" in str(caught.value)


def test_one_database_is_told_from_another_however_it_is_written() -> None:
    studies = "postgresql+psycopg://me:secret@db/one"
    assert same_database(studies, "postgres://other@db:5432/one")
    assert not same_database(studies, "postgresql://me@db/two")
    assert not same_database(studies, "postgresql://me@db:5433/one")
    assert not same_database(studies, "http://db:5000")
    assert not same_database("home/optuna.db", "sqlite:///home/mlflow.db")
    assert same_database("sqlite:///x.db", "sqlite:///x.db")


def test_a_password_is_taken_out_of_a_url() -> None:
    url, password = split_password("postgres://me:s%40crt@db:5433/one?sslmode=require")
    assert (url, password) == ("postgresql+psycopg://me@db:5433/one?sslmode=require", "s@crt")
