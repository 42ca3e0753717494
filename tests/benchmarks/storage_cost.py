"""What a trial costs the coordinator, apart from its evaluation, as a search grows: `make storage-cost`.

Times each step of a trial (propose, store its beginning, store its end, read it back, record it in MLflow) in studies
of 100, 1,000 and 5,000 trials, on SQLite and PostgreSQL, and the sampler's own time beside them. The studies are filled
by copying rows of one real trial and of one real MLflow run, so that filling costs seconds; every timed step is the
product's own call. Numbers are medians of `--repeats` trials, in milliseconds.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy

from autoprune.budget import resolve_budget
from autoprune.cost import CostModel, Form, Term
from autoprune.policy import Group, Policy, feasible_widths
from autoprune.results import Fidelity, Problem, TrialResult
from autoprune.studies import open_storage, open_study, records
from autoprune.studies.mirror import Mirror
from autoprune.tracking import Tracker, TrialRecord, trial_key

GROUPS = 12
SIZES = (100, 1000, 5000)
SCREEN = Fidelity("screen")


def problem_of(count: int) -> Problem:
    """Returns a chain of `count` layers with a criterion each."""
    names = [f"layer{i}" for i in range(count)]
    groups = tuple(Group(name, 64, feasible_widths(64, round_to=1), name) for name in names)
    width = [Form(0, ((i, 1),)) for i in range(count)]
    pairs = [(width[0],), *((width[i], width[i + 1]) for i in range(count - 1)), (width[-1],)]
    terms = tuple(Term(40 + 7 * i, forms) for i, forms in enumerate(pairs))
    model = CostModel(tuple(names), (64,) * count, terms, terms, terms, (terms[:1],))
    return Problem(groups, model, resolve_budget({"macs": 0.6}, model, groups, front=(0.2, 0.6)), ("l2", "taylor"))


def outcome(problem: Problem, policy: Policy, number: int) -> TrialResult:
    widths = policy.widths(problem.groups)
    kept = sum(widths.values()) / (64 * GROUPS)
    metrics = {"val_accuracy": kept, "val_accuracy_pruned": kept / 2, "val_loss": 1 - kept, "seconds": 0.1}
    return TrialResult(policy, f"{policy.id}-{number}", SCREEN, widths, problem.costs(policy), metrics)


def copy_rows(connection: Any, table: str, key: str, old: Any, new: list[Any], **changes: Callable[[Any], Any]) -> None:
    """Copies the rows of `table` whose `key` is `old` for each of `new`; `changes` set columns from the new key."""
    found = sqlalchemy.Table(table, sqlalchemy.MetaData(), autoload_with=connection)
    rows = [dict(row._mapping) for row in connection.execute(sqlalchemy.select(found).where(found.c[key] == old))]
    own = [c.name for c in found.primary_key if c.name != key and isinstance(c.type, sqlalchemy.Integer)]
    fresh = []
    for value in new:
        for row in rows:
            made = {name: item for name, item in row.items() if name not in own or table in _COMPOSITE} | {key: value}
            fresh.append(made | {name: change(value) for name, change in changes.items()})
    for start in range(0, len(fresh), 2000):
        connection.execute(sqlalchemy.insert(found), fresh[start : start + 2000])


_COMPOSITE = ("metrics", "latest_metrics")
"""MLflow's tables whose integer columns are part of the row, not its number."""


def fill_study(storage: Any, study: Any, size: int) -> None:
    """Brings a study to `size` trials by copies of its first one."""
    trials = study.get_trials(deepcopy=False)
    first, have = trials[0]._trial_id, len(trials)
    with storage.engine.begin() as connection:
        top = connection.execute(sqlalchemy.text("select max(trial_id) from trials")).scalar_one()
        new = list(range(top + 1, top + 1 + size - have))
        copy_rows(connection, "trials", "trial_id", first, new, number=lambda i: have + i - top - 1)
        for table in ("trial_params", "trial_values", "trial_user_attributes", "trial_system_attributes"):
            copy_rows(connection, table, "trial_id", first, new)
        identity = sqlalchemy.text(
            "update trial_user_attributes set value_json = '\"copy-' || trial_id || '\"'"
            " where key = 'identity' and trial_id > :top"
        )
        connection.execute(identity, {"top": top})
        if storage.engine.dialect.name == "postgresql":
            for table, column in _SEQUENCES.items():
                connection.execute(
                    sqlalchemy.text(
                        f"select setval(pg_get_serial_sequence('{table}', '{column}'), max({column})) from {table}"
                    )
                )


_SEQUENCES = {"trials": "trial_id"}


def fill_mlflow(uri: str, run: str, search: str, have: int, size: int) -> None:
    """Brings an experiment to `size` runs of trials by copies of one."""
    engine = sqlalchemy.create_engine(uri)
    with engine.begin() as connection:
        new = [uuid.uuid4().hex for _ in range(size - have)]
        copy_rows(connection, "runs", "run_uuid", run, new)
        for table in ("params", "tags", "latest_metrics", "metrics"):
            copy_rows(connection, table, "run_uuid", run, new)
        tags = sqlalchemy.Table("tags", sqlalchemy.MetaData(), autoload_with=connection)
        for i, value in enumerate(new):
            connection.execute(
                sqlalchemy.update(tags)
                .where(tags.c.run_uuid == value, tags.c.key == "autoprune.trial")
                .values(value=trial_key(search, have + i))
            )
    engine.dispose()


def timed(call: Callable[[], Any], into: list[float]) -> Any:
    begun = time.perf_counter()
    value = call()
    into.append(1e3 * (time.perf_counter() - begun))
    return value


def measure(url: str, mlflow: str, folder: Path, repeats: int, samplers: tuple[str, ...]) -> list[dict[str, Any]]:
    """Returns a row of medians for each size of the study."""
    problem = problem_of(GROUPS)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(url)
    study = open_study(storage, "cost.screen", problem, fingerprint="f", settings={})
    tracker = Tracker(mlflow, "cost", artifact_root=folder / "artifacts")
    mirror = Mirror(problem, study, sampler="random", seed=0)
    rows, first_run = [], ""

    def step(spent: dict[str, list[float]], mirror: Mirror, name: str) -> None:
        nonlocal first_run
        policy, trial, draw = timed(mirror.propose, spent.setdefault(f"ask {name}", []))
        candidate = records.Candidate(policy, f"{policy.id}-{uuid.uuid4().hex}", "sampler", "sampler", draw)
        number = timed(lambda: records.begin(study, problem, candidate), spent.setdefault("begin", []))
        result = outcome(problem, policy, number)
        values = records.objectives(problem, result)
        timed(
            lambda: records.finish_running(study, problem, number, result=result, reused=None, notes={}),
            spent.setdefault("end", []),
        )
        started = datetime.datetime.now()
        timed(
            lambda: records.add_complete(
                study, problem, candidate, result=result, reused=None, started=started, notes={}
            ),
            spent.setdefault("whole", []),
        )
        timed(lambda: mirror.tell(trial, values), spent.setdefault(f"tell {name}", []))
        record = TrialRecord(
            search="cost", study="cost.screen", number=number, rung="screen", policy=policy,
            result=result, dense=problem.cost_model.dense(), origin="sampler", state="complete",
        )  # fmt: skip
        first_run = timed(lambda: tracker.record_trial(record), spent.setdefault("mlflow", []))

    step({}, mirror, "random")
    for size in SIZES:
        have = len(study.get_trials(deepcopy=False))
        fill_study(storage, study, size)
        fill_mlflow(mlflow, first_run, "cost.screen", have, size)
        tracker.known_trials("cost")
        study = open_study(storage, "cost.screen", problem, fingerprint="f", settings={}, create=False)
        spent: dict[str, list[float]] = {}
        for name in samplers:
            read = partial(Mirror, problem, study, sampler=name, seed=1)
            mirror = timed(read, spent.setdefault("resume", []))
            for _ in range(repeats if name == "random" else max(2, repeats // 4)):
                step(spent, mirror, name)
        rows.append({"trials": size} | {name: statistics.median(times) for name, times in spent.items()})
        print(json.dumps(rows[-1]), flush=True)
    storage.engine.dispose()
    return rows


def table(title: str, rows: list[dict[str, Any]]) -> list[str]:
    names = [name for name in rows[0] if name != "trials"]
    lines = [
        f"## {title}",
        "",
        "| step, ms | " + " | ".join(f"{row['trials']:,} trials" for row in rows) + " | growth |",
    ]
    lines.append("|---" * (len(rows) + 2) + "|")
    for name in names:
        numbers = " | ".join(f"{row[name]:.1f}" for row in rows)
        lines.append(f"| {name} | {numbers} | {rows[-1][name] / rows[0][name]:.1f}x |")
    return [*lines, ""]


def document(tables: list[str], repeats: int) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("optuna", "mlflow", "sqlalchemy", "psycopg"))
    head = [
        "# What a trial costs the coordinator",
        "",
        f"`make storage-cost`: {GROUPS} groups with a criterion each ({2 * GROUPS + 1} parameters), medians of"
        f" {repeats} trials (of TPE: a quarter of them). `begin` and `end` are",
        "the transactions of a trial that people see running; `whole` is a trial of a screening rung, stored once;"
        " `resume` is what a search reads when it starts again, once.",
        "MLflow is written directly, without a server. PostgreSQL waits for the disk at every commit.",
        "",
    ]
    foot = (
        f"{len(os.sched_getaffinity(0))} cores, shared with other work; Python {platform.python_version()}, {versions}."
    )
    return "\n".join([*head, *tables, foot, ""])


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--samplers", nargs="+", default=["random", "tpe"])
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    chosen = parser.parse_args()
    tables = []
    with tempfile.TemporaryDirectory(prefix="autoprune-cost-") as name:
        folder = Path(name)
        rows = measure(
            str(folder / "optuna.db"), f"sqlite:///{folder}/mlflow.db", folder, chosen.repeats, tuple(chosen.samplers)
        )
        tables += table("SQLite", rows)
        server = load(Path(__file__).parents[1] / "postgres_server.py").PostgresServer(careful=True)
        try:
            urls = (server.url("studies"), server.url("mlflow"))
            rows = measure(*urls, folder, chosen.repeats, tuple(chosen.samplers))
            tables += table(f"PostgreSQL ({server.version})", rows)
        finally:
            server.close()
    if chosen.output:
        chosen.output.write_text(document(tables, chosen.repeats), encoding="utf-8")
    print("\n".join(tables))


if __name__ == "__main__":
    sys.exit(main())
