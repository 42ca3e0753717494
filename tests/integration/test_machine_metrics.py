"""System metrics on a search's run."""

from __future__ import annotations

import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from autoprune.coordinator.recording.records import Records
from autoprune.coordinator.stored.setup import Setup
from autoprune.errors import TrackingError
from autoprune.tracking import Tracker, watch_machine, watches_machine
from autoprune.tracking.machine import SETTING


@pytest.fixture
def psutil(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> bool:
    """Whether psutil is said to be installed."""
    installed: bool = request.param
    found = ModuleSpec("psutil", None) if installed else None
    monkeypatch.setattr("autoprune.tracking.machine.find_spec", lambda name: found)
    return installed


@pytest.mark.parametrize("psutil", [True, False], indirect=True)
def test_without_a_setting_the_machine_is_watched_where_psutil_is_installed(psutil: bool) -> None:
    assert watches_machine({}) is psutil
    assert watches_machine({SETTING: " "}) is psutil


@pytest.mark.parametrize("psutil", [True], indirect=True)
def test_the_setting_turns_it_off_and_on(psutil: bool) -> None:
    assert not watches_machine({SETTING: "False"})
    assert watches_machine({SETTING: "1"})


@pytest.mark.parametrize("psutil", [False], indirect=True)
def test_what_was_asked_for_and_cannot_be_had_is_an_error(psutil: bool) -> None:
    with pytest.raises(TrackingError, match="needs psutil: pip install psutil"):
        watches_machine({SETTING: "true"})
    assert not watches_machine({SETTING: "0"})


def test_a_setting_that_is_neither_true_nor_false_is_an_error() -> None:
    with pytest.raises(TrackingError, match="is 'maybe': expected true or false"):
        watches_machine({SETTING: "maybe"})


class Tracking:
    """Remembers in which order a search's run is made, watched and ended."""

    uri = "sqlite:///x.db"

    def __init__(self, *, fails: bool = False) -> None:
        self.said: list[str] = []
        self._fails = fails

    def ping(self) -> None:
        return

    def open_search(self, search: str, **settings: Any) -> str:
        self.said.append("open")
        return "run"

    def log_files(self, run: str, files: Any) -> None:
        return

    def finish_search(self, run: str, metrics: Any, *, status: str) -> None:
        self.said.append(status)

    def watch(self, uri: str, run: str) -> Any:
        if self._fails:
            raise TrackingError("no counters here")
        self.said.append(f"watch {run} in {uri}")
        return lambda: self.said.append("end of watch")


@pytest.mark.parametrize("fails", [False, True])
def test_watching_ends_before_the_run_and_a_machine_that_does_not_tell_stops_nothing(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracking(fails=fails)
    monkeypatch.setattr("autoprune.coordinator.recording.records.tracking.Tracker", lambda *a, **k: tracker)
    monkeypatch.setattr("autoprune.coordinator.recording.records.tracking.watch_machine", tracker.watch)
    setup = Setup(space={"name": "s"}, at_hand=False, dense={}, scopes={}, facts={})
    records = Records("s", setup, home=tmp_path, say=lambda text: None, watches=True)
    records.stop("FINISHED")
    assert records.close(20) == 0
    watched = [] if fails else ["watch run in sqlite:///x.db", "end of watch"]
    assert tracker.said == ["open", *watched, "FINISHED"]
    assert [refused.what for refused in records.refused] == (["system metrics"] if fails else [])


def test_a_watched_run_gets_processor_and_memory_and_goes_on_after_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psutil")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker(uri, "iris", artifact_root=tmp_path / "artifacts")
    run = tracker.open_search("iris", params={}, tags={})
    steps = []
    for _ in range(2):
        end = watch_machine(uri, run)
        before = len(steps)
        deadline = time.monotonic() + 60
        while len(steps) == before and time.monotonic() < deadline:
            time.sleep(0.3)
            steps = [m.step for m in tracker._client.get_metric_history(run, "system/cpu_utilization_percentage")]
        end()
        steps = [m.step for m in tracker._client.get_metric_history(run, "system/cpu_utilization_percentage")]
    assert len(steps) >= 2
    assert len(set(steps)) == len(steps)
    assert tracker._client.get_run(run).data.metrics["system/system_memory_usage_percentage"] > 0
