"""What the coordinator decides: which trials are shown under which number, what is recorded, and what to type next."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autoprune import report
from autoprune.coordinator.commands.dashboards import dashboard_command
from autoprune.coordinator.commands.exporting import ExportWish, export_models
from autoprune.coordinator.commands.front import show_front
from autoprune.coordinator.recording.records import Records, run_name
from autoprune.coordinator.running.ending import next_commands
from autoprune.coordinator.service.supervising import serving
from autoprune.coordinator.stored.display import view_of
from autoprune.coordinator.stored.places import make_home
from autoprune.coordinator.stored.search import CONTROLS, StoredSearch, read_search
from autoprune.coordinator.stored.service_state import STATE, service_folder
from autoprune.coordinator.stored.setup import Setup
from autoprune.cost import COSTS
from autoprune.errors import InputError, StudyError, TrackingError
from autoprune.files import write_whole
from autoprune.policy import Choice, Policy
from autoprune.results import Fidelity, TrialResult
from autoprune.studies import StoredTrial

DENSE = dict.fromkeys(COSTS, 1000)
TUNE, FINAL = Fidelity("tune", epochs=2), Fidelity("final", epochs=4, test=True)


def trial(
    number: int,
    width: int,
    accuracy: float,
    *,
    fidelity: Fidelity = TUNE,
    origin: str | int = "sampler",
    **changes: Any,
) -> StoredTrial:
    policy = Policy({"layer": Choice("l2", 1 - width / 10)})
    identity = f"width-{width}"
    metrics = {"val_accuracy": accuracy} | ({"test_accuracy": accuracy - 0.01} if fidelity.test else {})
    result = TrialResult(
        policy=policy,
        identity=identity,
        fidelity=fidelity,
        widths={"layer": width},
        costs=dict.fromkeys(COSTS, 100 * width),
        metrics=metrics,
        model_path=f"elsewhere/models/s/{fidelity.rung}-{identity}",
    )
    settings: dict[str, Any] = {"state": "complete", "result": result, **changes}
    return StoredTrial(number, policy=policy, identity=identity, origin=origin, source="uniform l2", **settings)


def stored(home: Path, **rungs: tuple[StoredTrial, ...]) -> StoredSearch:
    facts = {
        "primary": "macs",
        "sizes": {"layer": 10},
        "dense_costs": DENSE,
        "dense_metrics": {"val_accuracy": 0.97, "test_accuracy": 0.96},
        "limits": {"macs": 600},
        "reference": [1.0, 1.0],
        "rungs": [{"rung": "screen", "test": False}, {"rung": "tune", "test": False}, {"rung": "final", "test": True}],
    }
    return StoredSearch("s", facts, rungs, home)


SCREEN = (trial(0, 2, 0.5, fidelity=Fidelity("screen")), trial(1, 5, 0.7, fidelity=Fidelity("screen")))
TUNED = (trial(0, 5, 0.9), trial(1, 2, 0.8), trial(2, 3, 0.7))
FINALS = (trial(0, 2, 0.85, fidelity=FINAL, origin=1), trial(1, 5, 0.95, fidelity=FINAL, origin=0))


def test_the_shown_rung_is_the_last_one_that_has_a_finished_trial(tmp_path: Path) -> None:
    assert stored(tmp_path).shown_rung == "screen"
    assert stored(tmp_path, screen=SCREEN, tune=()).shown_rung == "screen"
    assert stored(tmp_path, screen=SCREEN, tune=TUNED, final=()).shown_rung == "tune"
    assert stored(tmp_path, screen=SCREEN, tune=TUNED, final=FINALS, controls=FINALS).shown_rung == "final"


def test_a_final_result_goes_by_the_number_of_the_trial_that_it_comes_from(tmp_path: Path) -> None:
    search = stored(tmp_path, screen=SCREEN, tune=TUNED, final=FINALS)
    assert [(s.number, s.own) for s in search.shown()] == [(1, 0), (0, 1)]
    assert [s.number for s in search.shown("tune")] == [0, 1, 2]
    assert [point.trial for point in view_of(search).front] == [1, 0]


def test_a_trial_that_repeats_another_is_shown_once(tmp_path: Path) -> None:
    search = stored(tmp_path, tune=(*TUNED, trial(3, 5, 0.9, reused=0)))
    assert [s.number for s in search.shown()] == [0, 1, 2]


def test_the_model_of_the_last_rung_is_preferred_and_sought_in_the_home_that_was_read(tmp_path: Path) -> None:
    search = stored(tmp_path, tune=TUNED, final=FINALS)
    for folder in ("tune-width-5", "tune-width-2", "final-width-5"):
        (tmp_path / "models/s" / folder).mkdir(parents=True)
    assert search.model_path(0) == tmp_path / "models/s/final-width-5"
    assert search.model_path(1) == tmp_path / "models/s/tune-width-2"
    with pytest.raises(StudyError, match=r"weights of trial 2 of s were not kept .*: 0, 1"):
        search.model_path(2)
    with pytest.raises(StudyError, match=r"no finished trial 7; weights are kept of: 0, 1"):
        search.model_path(7)


def test_controls_are_shown_beside_the_rung_whose_recipe_they_ran_alone(tmp_path: Path) -> None:
    controls = (trial(0, 4, 0.6, fidelity=FINAL),)
    assert view_of(stored(tmp_path, tune=TUNED, controls=controls)).controls == ()
    view = view_of(stored(tmp_path, tune=TUNED, final=FINALS, controls=controls))
    assert [(c.trial, c.origin) for c in view.controls] == [(None, "uniform l2")]


def test_the_dense_networks_test_score_is_shown_only_beside_others(tmp_path: Path) -> None:
    assert view_of(stored(tmp_path, tune=TUNED)).dense.test_accuracy is None
    assert view_of(stored(tmp_path, tune=TUNED, final=FINALS)).dense.test_accuracy == 0.96


def test_every_two_rungs_in_a_row_are_audited(tmp_path: Path) -> None:
    tuned = tuple(trial(n, n + 1, 0.5 + n / 20) for n in range(8))
    finals = tuple(trial(n, n + 1, 0.9 - n / 20, fidelity=FINAL, origin=n) for n in range(8))
    notes = view_of(stored(tmp_path, tune=tuned, final=finals)).notes
    assert any("Proxy audit tune → final: Kendall τ -1.00 over 8 policies" in note for note in notes)
    assert any(note.startswith("Warning: ") for note in notes)


def test_costs_of_very_different_size_are_drawn_on_a_logarithmic_axis(tmp_path: Path) -> None:
    view = view_of(stored(tmp_path, tune=TUNED))
    assert report.front_figure(view).layout.xaxis.type is None
    tiny = replace(view.trials[0], costs=dict.fromkeys(COSTS, 20))
    wide = report.front_figure(replace(view, trials=(*view.trials, tiny)))
    assert wide.layout.xaxis.type == "log"
    assert wide.layout.annotations[0].x == pytest.approx(math.log10(60))
    assert wide.layout.shapes[0].x0 == pytest.approx(60)


# --- records ---


class FakeRegistry:
    """Remembers what it is told, with the tracker that it belongs to."""

    def __init__(self, tracker: FakeTracker, search: str) -> None:
        self.tell = tracker.said.append
        self.search = search

    def open(self, *, description: str, tags: Mapping[str, str]) -> None:
        self.tell(("registry", self.search))

    def add(self, members: Any, *, loader: str) -> dict[str, str]:
        for member in members:
            self.tell(("model", (member.run_id, member.folder.name, dict(member.tags))))
        return {member.key: str(number) for number, member in enumerate(members, start=1)}

    def mark(self, front: Any) -> None:
        self.tell(("versions", list(front)))

    def point(self, aliases: Mapping[str, str | None]) -> None:
        self.tell(("aliases", dict(aliases)))


class FakeTracker:
    """Remembers what it is told."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.said: list[tuple[str, Any]] = []
        FakeTracker.last = self

    last: FakeTracker

    def ping(self) -> None:
        return

    def open_search(self, search: str, *, params: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        self.said.append(("open", search))
        return "search-run"

    def record_trial(self, record: Any) -> str:
        self.said.append(("trial", record))
        return f"run-{record.key}"

    def keep_one_run_each(self, search: str) -> int:
        return 0

    def mark_front(self, search: str, keys: Any) -> None:
        self.said.append(("front", list(keys)))

    def registry(self, search: str) -> FakeRegistry:
        return FakeRegistry(self, search)

    def describe(self, text: str, *, run_id: str | None = None) -> None:
        self.said.append(("describe", (run_id, text)))

    def log_files(self, run: str, files: Mapping[str, Any]) -> None:
        self.said.append(("space", (run, dict(files))))

    def log_front(self, run: str, files: Mapping[str, Any], *, metrics: Mapping[str, float]) -> None:
        self.said += [("files", (run, set(files), dict(metrics))), ("page", files["front.html"])]

    def write_chart_view(self, search: str, *, rung: str, cost: str, params: Any, objective: Any) -> str:
        self.said.append(("charts", (rung, cost, params)))
        return "/#/charts"

    def write_list_view(self, search: str, *, rung: str, metrics: Any) -> str:
        self.said.append(("list", (rung, list(metrics))))
        return "/#/list"

    def finish_search(self, run: str, metrics: Mapping[str, float], *, status: str = "FINISHED") -> None:
        self.said.append(("finish", status))

    def run_link(self, run: str) -> str:
        return f"/#/runs/{run}"

    def all(self, kind: str) -> list[Any]:
        return [what for said, what in self.said if said == kind]


SETUP = Setup(
    space={"name": "s", "recipe": {"lr": 0.1}, "seed": 0},
    at_hand=False,
    dense=DENSE,
    scopes={"layer": "model"},
    facts={"threads": "1"},
)


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Records:
    monkeypatch.setattr("autoprune.coordinator.recording.records.tracking.Tracker", FakeTracker)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Records("s", SETUP, home=tmp_path / ".autoprune", say=lambda text: None)


def test_a_finished_or_failed_trial_is_recorded_once_and_a_running_one_not(records: Records) -> None:
    failed = trial(4, 4, 0.1, state="fail", result=None, reason="diverged")
    for item in (TUNED[0], TUNED[0], failed, trial(5, 6, 0.1, state="running", result=None)):
        records.trial("tune", item)
    assert records.close(10) == 0
    said = FakeTracker.last.all("trial")
    assert [(r.key, r.state, r.reason) for r in said] == [
        ("s.tune/0", "complete", ""),
        ("s.tune/4", "fail", "diverged"),
    ]
    assert records.links("tune")[0] == "http://127.0.0.1:5000/#/runs/run-s.tune/0"
    assert records.links("final") == {}


def test_publishing_marks_the_front_and_stores_its_kept_models_figures_and_numbers(
    records: Records, tmp_path: Path
) -> None:
    home = tmp_path / ".autoprune"
    folder = home / "models/s/final-width-5"
    folder.mkdir(parents=True)
    (folder / "policy.json").write_text(json.dumps({"input_shape": [4], "origin": {"num_classes": 3}}))
    worse = trial(2, 5, 0.2, fidelity=FINAL, origin=2)
    search = stored(home, tune=TUNED, final=(*FINALS, worse))
    for item in search.rungs["final"]:
        records.trial("final", item)
    view = view_of(search)
    records.publish(search, view)
    assert records.close(60) == 0
    tracker = FakeTracker.last
    assert tracker.all("front") == [["s.final/0", "s.final/1"]]
    ((model_run, kept, tags),) = tracker.all("model")
    assert (model_run, kept) == ("run-s.final/1", "final-width-5")
    assert {"trial": "0", "rung": "final", "val_accuracy": "0.9500", "macs_fraction": "0.5000"}.items() <= tags.items()
    assert tracker.all("aliases") == [{"smallest": None, "most-accurate": "1", "knee": None}]
    ((run, files, metrics),) = tracker.all("files")
    assert run == "search-run"
    assert {"front.html", "front.png", "front.csv", "groups.csv", "controls.csv", "report.html"} <= files
    (page,) = (page.replace("\\u002f", "/") for page in tracker.all("page"))
    assert all(f'"/#/runs/run-s.final/{own}"' in page for own in (0, 1))
    assert f'"{records.address}"' in page
    assert metrics["front_size"] == 2
    assert metrics["hypervolume"] == pytest.approx(view.hypervolume)
    assert tracker.all("charts") == [("final", "macs_fraction", ["ratio/layer"])]
    assert tracker.all("finish") == ["FINISHED"]
    assert records.charts == "/#/charts"
    assert records.versions == {"s.final/1": "1"}
    texts = dict(tracker.all("describe"))
    assert set(texts) == {"search-run", None}
    assert "| [0](/#/runs/run-s.final/1) | 95.00% |" in texts["search-run"]
    assert "the alias `picked`" in texts["search-run"]
    assert "[report](/#/runs/search-run" in texts["search-run"]
    ((run, written),) = tracker.all("space")
    assert json.loads(written["space.json"]) == SETUP.space


def test_runs_go_by_the_numbers_that_people_use() -> None:
    assert run_name("tune", TUNED[2]) == "tune 2"
    assert run_name("final", FINALS[0]) == "trial 1 final"
    assert run_name(CONTROLS, trial(3, 4, 0.5, fidelity=FINAL, origin="uniform l2")) == "control uniform l2 3"
    assert run_name("only", trial(3, 4, 0.5, fidelity=FINAL)) == "only 3"


def test_a_store_that_is_away_leaves_the_records_undone_and_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: Records
) -> None:
    def away(*args: Any, **settings: Any) -> None:
        raise TrackingError("nobody there")

    records.close(10)
    monkeypatch.setattr("autoprune.coordinator.recording.records.tracking.Tracker", away)
    said: list[str] = []
    late = Records("s", SETUP, home=tmp_path, say=said.append)
    late.trial("tune", TUNED[0])
    assert late.close(10) == 2
    assert len(said) == 1
    assert "MLflow is away" in said[0]
    assert late.links("tune") == {}


# --- commands ---


def commands_after(search: StoredSearch, *, named: bool = True, **changes: Any) -> list[str]:
    records: Any = SimpleNamespace(uri="sqlite:////x/m.db", address="http://127.0.0.1:5000", charts="/#/c")
    for key, value in changes.items():
        setattr(records, key, value)
    return [f"{command}  # {what}" for command, what in next_commands(search, records, 1, named=named)]


def test_the_next_commands_find_what_was_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AUTOPRUNE_HOME", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    usual, other = Path(".autoprune"), tmp_path / "my searches"
    assert commands_after(stored(usual)) == [
        "autoprune front s  # this table again",
        "autoprune export s --trial 1 --format onnx  # a model of the front as a file",
        "mlflow server --backend-store-uri sqlite:////x/m.db  # http://127.0.0.1:5000/#/c",
        "autoprune dashboard  # Optuna dashboard: http://127.0.0.1:8080",
    ]
    found = commands_after(stored(other))
    assert sum(f"--home '{other}'" in line for line in found) == 3
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow/server.env").write_text("")
    found = commands_after(stored(usual))
    assert [line.split()[0:2] for line in found] == [
        ["make", "front"],
        ["make", "export"],
        ["make", "mlflow-ui"],
        ["make", "dashboard"],
    ]
    assert commands_after(stored(other))[0].startswith("autoprune front s --home")
    (other / "models/s/final-width-2").mkdir(parents=True)
    own = commands_after(stored(other, tune=TUNED, final=FINALS), named=False)
    assert own[1].startswith(f"autoprune.load('{other}/models/s/final-width-2', factory)")
    assert len(commands_after(stored(tmp_path / "only screened"), named=False)) == 3
    remote = commands_after(stored(usual), uri="http://server:5000", address="http://server:5000")
    assert remote[2].startswith("http://server:5000/#/c")


def test_pages_that_a_service_of_this_home_serves_are_named_by_their_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mlflow, board = "http://127.0.0.1:5050", "http://127.0.0.1:8081"
    addresses = {"mlflow": mlflow, "dashboard": board, "runner": None}
    services = [{"name": name, "address": address} for name, address in addresses.items()]
    with serving(tmp_path):
        write_whole(service_folder(tmp_path) / STATE, json.dumps({"token": "t", "services": services}))
        found = commands_after(stored(tmp_path))
        assert found[2:] == [f"{mlflow}/#/c  # the charts in MLflow", f"{board}  # Optuna dashboard"]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////elsewhere.db")  # not what the service serves
        assert commands_after(stored(tmp_path))[2].startswith("mlflow server")
    assert commands_after(stored(tmp_path))[3].startswith("autoprune dashboard")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    for call in (
        lambda: read_search("s", home=tmp_path),
        lambda: show_front("s", home=tmp_path),
        lambda: export_models(ExportWish("s", 1), home=tmp_path, say=print),
        lambda: dashboard_command(tmp_path, 8080),
    ):
        with pytest.raises(StudyError, match=str(tmp_path)):
            call()
    assert list(tmp_path.iterdir()) == []


def test_the_dashboard_serves_this_machine_alone(tmp_path: Path) -> None:
    (tmp_path / "optuna.db").write_bytes(b"")
    command = dashboard_command(tmp_path, 8123)
    assert Path(command[0]).name == "optuna-dashboard"
    assert command[1:] == [f"sqlite:///{tmp_path}/optuna.db", "--host", "127.0.0.1", "--port", "8123"]


def test_a_home_folder_is_made_and_found_out_to_be_unusable_at_once(tmp_path: Path) -> None:
    make_home(tmp_path / "a/b")
    assert list((tmp_path / "a/b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        make_home(tmp_path / "file/home")


def test_the_coordinator_loads_nothing_before_it_is_asked() -> None:
    code = "import sys, json, autoprune.coordinator as c\nbefore = set(sys.modules)\n"
    code += "names = [hasattr(c, name) for name in ('show_front', 'nothing')]\n"
    code += "print(json.dumps([names, sorted(before & {'torch', 'optuna', 'mlflow', 'pandas'})]))\n"
    code += "print('torch' in sys.modules, 'mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert json.loads(first) == [[True, False], []]
    assert second == "False False"
