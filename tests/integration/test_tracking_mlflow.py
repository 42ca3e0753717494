"""The tracker against a real MLflow store in a SQLite file."""

from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from autoprune.errors import TrackingError
from autoprune.policy import Choice, Policy
from autoprune.results import Fidelity, TrialResult
from autoprune.tracking import Recorder, Tracker, TrialRecord

DENSE = {"macs": 1000, "params": 200, "size_bytes": 900, "activation_bytes": 64}


def make_record(search: str, number: int, *, groups: int = 2, **changes: Any) -> TrialRecord:
    policy = Policy({f"layer{i}.conv": Choice("l2", (i % 8 + number % 2) / 10) for i in range(groups)})
    result = TrialResult(
        policy=policy,
        identity=f"identity-{number}",
        fidelity=Fidelity("tune", epochs=2),
        widths={name: 10 - int(choice.ratio * 10) for name, choice in policy.choices.items()},
        costs={"macs": 500 + number, "params": 100, "size_bytes": 450, "activation_bytes": 32},
        metrics={"val_accuracy": 0.9 - number / 100, "val_accuracy_pruned": 0.4, "latency_ms": math.inf},
        curves={"train_loss": (1.0, 0.5), "val_accuracy": (0.7, 0.9 - number / 100)},
        seconds={"tune": 1.5},
        seed=3,
    )
    record = TrialRecord(search, "digits.tune", number, "tune", policy, result, DENSE, origin="uniform-l2")
    return replace(record, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow store")


@pytest.fixture(scope="module")
def tracker(folder: Path) -> Tracker:
    return open_tracker(folder)


def open_tracker(folder: Path, experiment: str = "digits") -> Tracker:
    return Tracker(
        f"sqlite:///{folder}/mlflow.db",
        experiment,
        artifact_root=folder / "artifacts",
        description="**digits**: a test",
        environment={"git_commit": "0123abc", "version.torch": "2.13"},
    )


def run_of(tracker: Tracker, run_id: str) -> Any:
    return tracker._client.get_run(run_id)


def count_runs(tracker: Tracker, search: str, kind: str = "trial") -> int:
    return len(list(tracker._runs(search, kind)))


def test_the_experiment_says_what_it_is(tracker: Tracker) -> None:
    experiment = tracker._client.get_experiment(tracker.experiment_id)
    assert experiment.name == "digits"
    assert experiment.tags["mlflow.note.content"] == "**digits**: a test"
    tracker.describe("what was *found*")
    tracker.describe("what was found **later**")
    text = tracker._client.get_experiment(tracker.experiment_id).tags["mlflow.note.content"]
    assert text.startswith("**digits**: a test\n")
    assert "what was found **later**" in text
    assert "*found*\n" not in text
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_trial_becomes_one_flat_run_with_everything_on_it(tracker: Tracker) -> None:
    run = run_of(tracker, tracker.record_trial(make_record("flat", 1)))
    assert run.info.status == "FINISHED"
    assert run.data.params["ratio/layer1.conv"] == "0.2"
    assert run.data.params["criterion/layer1.conv"] == "l2"
    assert run.data.params["width/layer1.conv"] == "8"
    assert run.data.metrics["val_accuracy"] == pytest.approx(0.89)
    assert run.data.metrics["val_error"] == pytest.approx(0.11)
    assert run.data.metrics["macs_fraction"] == pytest.approx(0.501)
    assert run.data.metrics["size_fraction"] == pytest.approx(0.5)
    assert run.data.metrics["seconds/tune"] == 1.5
    assert math.isnan(run.data.metrics["latency_ms"])
    expected = {"kind": "trial", "rung": "tune", "pareto": "false", "origin": "uniform-l2", "git_commit": "0123abc"}
    assert expected.items() <= run.data.tags.items()
    assert run.data.tags["autoprune.search"] == "flat"
    assert run.data.tags["autoprune.trial"] == "digits.tune/1"
    assert "mlflow.parentRunId" not in run.data.tags


def test_epoch_curves_have_one_step_an_epoch_and_hide_no_score(tracker: Tracker) -> None:
    run_id = tracker.record_trial(make_record("curves", 1))
    history = tracker._client.get_metric_history(run_id, "epoch/val_accuracy")
    assert [(point.step, point.value) for point in history] == [(1, 0.7), (2, pytest.approx(0.89))]
    assert len(tracker._client.get_metric_history(run_id, "val_accuracy")) == 1


def test_a_trial_is_recorded_once_however_often_it_is_given(tracker: Tracker, folder: Path) -> None:
    first = tracker.record_trial(make_record("once", 5))
    assert tracker.record_trial(make_record("once", 5)) == first
    assert open_tracker(folder).record_trial(make_record("once", 5)) == first
    assert tracker.known_trials("once") == {"digits.tune/5": first}
    assert count_runs(tracker, "once") == 1


def test_runs_are_found_by_the_search_and_the_trials_key(tracker: Tracker) -> None:
    assert tracker.find_run("find") is None
    assert tracker.find_run("find", "digits.tune/1") is None
    search_run = tracker.open_search("find", params={}, tags={})
    trial_run = tracker.record_trial(make_record("find", 1))
    assert tracker.find_run("find") == search_run
    assert tracker.find_run("find", "digits.tune/1") == trial_run


def test_a_run_that_a_killed_process_left_unfinished_is_completed(
    tracker: Tracker, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = open_tracker(folder)

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dying._client, "set_terminated", die)
    with pytest.raises(KeyboardInterrupt):
        dying.record_trial(make_record("killed", 1))
    assert tracker.known_trials("killed") == {}
    run = run_of(tracker, tracker.record_trial(make_record("killed", 1)))
    assert run.info.status == "FINISHED"
    assert count_runs(tracker, "killed") == 1


def test_a_run_deleted_in_the_ui_is_not_recorded_again(tracker: Tracker, folder: Path) -> None:
    run_id = tracker.record_trial(make_record("deleted", 1))
    tracker._client.delete_run(run_id)
    assert open_tracker(folder).record_trial(make_record("deleted", 1)) == run_id
    assert count_runs(tracker, "deleted") == 0


def test_of_several_runs_of_one_trial_the_first_finished_one_stays(tracker: Tracker, folder: Path) -> None:
    first = tracker.record_trial(make_record("surplus", 1))
    tracker.record_trial(make_record("surplus", 2))
    tags = run_of(tracker, first).data.tags
    late = tracker._client.create_run(tracker.experiment_id, tags=tags)  # of a request whose answer was lost
    tracker._client.create_run(tracker.experiment_id, start_time=1, tags=tags)  # older, but never finished
    tracker._client.set_terminated(late.info.run_id, "FINISHED")
    assert count_runs(tracker, "surplus") == 4
    other = open_tracker(folder)
    assert other.keep_one_run_each("surplus") == 2
    assert other.keep_one_run_each("surplus") == 0
    assert count_runs(tracker, "surplus") == 2
    assert other.known_trials("surplus")["digits.tune/1"] == first
    assert other.record_trial(make_record("surplus", 1)) == first


def test_a_failed_trial_is_recorded_with_its_reason(tracker: Tracker) -> None:
    record = make_record("failed", 1, result=None, state="fail", reason="out of memory")
    run = run_of(tracker, tracker.record_trial(record))
    assert run.info.status == "FAILED"
    assert run.data.tags["reason"] == "out of memory"
    assert run.data.params["ratio/layer1.conv"] == "0.2"


def test_a_resumed_search_keeps_its_run_and_notes_what_changed(tracker: Tracker) -> None:
    run_id = tracker.open_search("resumed", params={"trials": 30, "budget": {"macs": 0.6}}, tags={"device": "cpu"})
    tracker.finish_search(run_id, {"hypervolume": 0.4})
    assert run_of(tracker, run_id).info.status == "FINISHED"
    assert tracker.open_search("resumed", params={"trials": 48, "seed": 1}, tags={"device": "cpu"}) == run_id
    run = run_of(tracker, run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params["trials"] == "30"
    assert run.data.params["seed"] == "1"
    assert run.data.tags["resumed.trials"] == "48"
    assert run.data.metrics["hypervolume"] == 0.4
    assert count_runs(tracker, "resumed", "search") == 1
    tracker.finish_search(run_id, {}, status="KILLED")
    assert run_of(tracker, run_id).info.status == "KILLED"


def test_only_runs_whose_place_on_the_front_changed_are_written(tracker: Tracker) -> None:
    ids = [tracker.record_trial(make_record("front", n)) for n in range(4)]
    tracker.record_trial(make_record("another", 0))
    keys = [f"digits.tune/{n}" for n in range(4)]
    assert tracker.mark_front("front", keys[:2]) == 2
    assert tracker.mark_front("front", keys[:2]) == 0
    assert tracker.mark_front("front", keys[1:3]) == 2
    marks = [run_of(tracker, run_id).data.tags["pareto"] for run_id in ids]
    assert marks == ["false", "true", "true", "false"]
    assert count_runs(tracker, "another") == 1


def test_more_than_a_hundred_groups_are_recorded_whole(tracker: Tracker) -> None:
    run = run_of(tracker, tracker.record_trial(make_record("wide", 1, groups=130)))
    assert len(run.data.params) == 3 * 130
    assert run.data.metrics["macs"] == 501


@pytest.mark.parametrize("search", ['it\'s "quoted"', "`; drop table runs", "日本語", "a" * 400, "100% [x]"])
def test_hostile_names_of_searches_are_found_again(tracker: Tracker, folder: Path, search: str) -> None:
    run_id = tracker.open_search(search, params={}, tags={})
    trial = tracker.record_trial(make_record(search, 1, study=search))
    again = open_tracker(folder)
    assert again.open_search(search, params={}, tags={}) == run_id
    assert again.known_trials(search) == {f"{search}/1": trial}
    assert again.mark_front(search, [f"{search}/1"]) == 1


def test_hostile_names_of_groups_become_keys_that_stay_apart(tracker: Tracker) -> None:
    names = ["a[0]", "a(0)", "../up", "/root", "x//y", "ü", "b" * 300, "new\nline", "."]
    policy = Policy({name: Choice("l2", 0.5) for name in names})
    record = make_record("groups", 1)
    assert record.result is not None
    result = replace(record.result, policy=policy, widths=dict.fromkeys(names, 4))
    run = run_of(tracker, tracker.record_trial(replace(record, policy=policy, result=result)))
    assert len(run.data.params) == 3 * len(names)


def test_figures_and_tables_are_stored_under_front_and_replaced(tracker: Tracker, folder: Path) -> None:
    run_id = tracker.open_search("files", params={}, tags={})
    (folder / "front.png").write_bytes(b"png")
    for text in ("old", "new"):
        files = {"front.html": text, "front.png": folder / "front.png", "tables/front.csv": b"a,b\n1,2\n"}
        tracker.log_front(run_id, files, metrics={"hypervolume": 0.5})
    stored = folder / "artifacts" / "digits" / run_id / "artifacts" / "front"
    assert (stored / "front.html").read_text() == "new"
    assert (stored / "front.png").read_bytes() == b"png"
    assert (stored / "tables" / "front.csv").read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize("name", ["../x", "/etc/x", "", "a\\b"])
def test_a_file_cannot_be_stored_outside_its_run(tracker: Tracker, name: str) -> None:
    with pytest.raises(ValueError, match="no path within a run"):
        tracker.log_files("any", {name: "text"})


def test_the_chart_view_names_its_axes_and_filters_one_rung(tracker: Tracker) -> None:
    link = tracker.write_chart_view("charts", rung="tune", cost="macs_fraction", params=["ratio/a", "ratio/b"])
    page = f"/#/experiments/{tracker.experiment_id}/runs?viewStateShareKey=autoprune-charts-tune&compareRunsMode=CHART"
    assert link == f"{page}&workflowType=machine_learning"
    tags = tracker._client.get_experiment(tracker.experiment_id).tags
    state = json.loads(tags["mlflow.sharedViewState.autoprune-charts-tune"])
    scatter, parallel = state["compareRunCharts"]
    assert (scatter["xaxis"]["key"], scatter["yaxis"]["key"]) == ("macs_fraction", "val_accuracy")
    assert parallel["selectedParams"] == ["ratio/a", "ratio/b"]
    assert "tags.`rung` = 'tune'" in state["searchFilter"]


def test_the_list_of_runs_shows_the_numbers_that_people_need_lowest_cost_first(tracker: Tracker) -> None:
    link = tracker.write_list_view("listed", rung="final", metrics=["val_accuracy", "latency_ms", "macs_fraction"])
    assert link.endswith(
        "viewStateShareKey=autoprune-listed-final-list&compareRunsMode=TABLE&workflowType=machine_learning"
    )
    tags = tracker._client.get_experiment(tracker.experiment_id).tags
    state = json.loads(tags["mlflow.sharedViewState.autoprune-listed-final-list"])
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`macs_fraction`", True)
    assert state["selectedColumns"][:4] == [
        "metrics.`val_accuracy`",
        "metrics.`latency_ms`",
        "metrics.`macs_fraction`",
        "tags.`rung`",
    ]


def test_an_experiment_deleted_in_the_ui_is_restored(tracker: Tracker, folder: Path) -> None:
    other = open_tracker(folder, "deleted experiment")
    other._client.delete_experiment(other.experiment_id)
    again = open_tracker(folder, "deleted experiment")
    assert again.experiment_id == other.experiment_id
    again.record_trial(make_record("restored", 1))
    assert count_runs(again, "restored") == 1


def test_a_database_that_is_not_mlflows_is_refused_in_plain_words(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("this is no database" * 100)
    with pytest.raises(TrackingError, match="cannot open the MLflow store"):
        Tracker(f"sqlite:///{tmp_path}/notes.txt", "digits")


def test_a_server_that_is_not_there_is_a_tracking_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"http://user:\*\*\*@127\.0\.0\.1:9") as caught:
        Tracker("http://user:secret@127.0.0.1:9", "digits")
    assert "secret" not in str(caught.value)


def test_a_store_that_is_away_delays_records_and_later_takes_each_once(tracker: Tracker, folder: Path) -> None:
    said: list[str] = []
    done: list[str] = []
    away = {"now": True}

    def connect() -> Tracker:
        if away["now"]:
            raise TrackingError("cannot reach the MLflow store")
        return open_tracker(folder)

    recorder = Recorder(connect, interval=0.05, say=said.append)
    for number in range(3):
        recorder.record_trial(make_record("away", number), done=done.append)
    assert recorder.drain(5.0) == 3
    assert recorder.away
    assert count_runs(tracker, "away") == 0
    away["now"] = False
    recorder.record_trial(make_record("away", 2))
    for _ in range(100):
        if recorder.drain(0.2) == 0:
            break
    assert recorder.close() == 0
    assert set(tracker.known_trials("away").values()) == set(done)
    assert count_runs(tracker, "away") == 3
    assert [text.split(";")[0] for text in said] == ["MLflow is away", "MLflow is back"]


def test_a_locked_database_is_a_store_that_is_away(tracker: Tracker, folder: Path) -> None:
    def lose_patience(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        return statement.replace("busy_timeout = 20000", "busy_timeout = 50"), parameters

    engine = tracker._client._tracking_client.store.engine
    event.listen(engine, "before_cursor_execute", lose_patience, retval=True)
    lock = sqlite3.connect(folder / "mlflow.db", timeout=0, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(TrackingError, match="locked"):
            tracker.record_trial(make_record("locked", 1))
    finally:
        lock.execute("ROLLBACK")
        lock.close()
        event.remove(engine, "before_cursor_execute", lose_patience)
    tracker.record_trial(make_record("locked", 1))
    assert count_runs(tracker, "locked") == 1


def test_recording_writes_nothing_to_the_users_terminal(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from autoprune.tracking import Tracker;"
        f"t = Tracker('sqlite:///{tmp_path}/new.db', 'quiet', artifact_root=Path('{tmp_path}'));"
        "r = t.open_search('quiet', params={'a': 1}, tags={}); t.finish_search(r, {'x': 1.0})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=tmp_path, check=True
    )
    assert done.stdout == ""
    assert done.stderr == ""
    assert not (tmp_path / "mlruns").exists()
