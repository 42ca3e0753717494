"""`autoprune search` and what is made of its result, as a user meets them: files, databases, output and exit status."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

RUNGS = {"screen": 10, "tune": 5, "final": 4, "controls": 3}
COSTS = ("macs", "params", "size_bytes", "activation_bytes")


@pytest.fixture
def store(searched: Any, store_of: Any) -> Any:
    return store_of(searched[0])


@pytest.fixture(scope="module")
def front(searched: Any, commands: Any) -> dict[str, Any]:
    done = commands.run("front", "quick", "--json", cwd=searched[0])
    assert (done.status, done.err) == (0, "")
    found: dict[str, Any] = json.loads(done.out)
    return found


@pytest.fixture
def again(searched: Any, tmp_path: Path) -> Path:
    """A copy of the searched folder, to change."""
    copy = tmp_path / "copy"
    shutil.copytree(searched[0], copy)
    return copy


# --- the search ---


def test_a_search_prints_its_front_and_the_next_commands_and_ends_with_status_0(searched: Any, front: Any) -> None:
    _, done = searched
    assert done.status == 0, done.err
    assert done.out.startswith("quick: the front after the rung final")
    for word in ("dense", "saves MACs", "Controls", "uniform l2", "Hypervolume", "Budget: at most MACs"):
        assert word in done.out
    number = front["front"][-1]["trial"]
    for command in ("autoprune front quick", f"autoprune export quick --trial {number} --format onnx"):
        assert f"\n  {command} " in done.out
    assert "mlflow server --backend-store-uri sqlite:///" in done.out
    assert "autoprune dashboard" in done.out


def test_progress_goes_to_stderr_in_plain_lines_where_it_is_no_terminal(searched: Any) -> None:
    _, done = searched
    for rung, count in RUNGS.items():
        assert f"{rung}: finished: {count}/{count} trials" in done.err
    assert "\x1b" not in done.err + done.out
    assert "\r" not in done.err
    assert len(done.err.splitlines()) < 40


def test_every_rung_measures_as_many_distinct_policies_as_asked(store: Any) -> None:
    assert store.distinct() == RUNGS
    assert {state for _, state in store.states()} == {"COMPLETE"}


def test_studies_have_readable_objectives_and_parameters(store: Any) -> None:
    for key in ("study:metric_names", "metric_names"):
        rows = store.rows("optuna.db", "select value_json from study_system_attributes where key like ?", f"%{key}")
        if rows:
            break
    assert {value for (value,) in rows} == {json.dumps(["val_error", "macs_fraction"])}
    for trial in store.trials():
        expected = {f"{what}/hidden.{i}" for what in ("ratio", "criterion") for i in (0, 1)}
        assert expected <= trial["params"] <= expected | {"target/macs"}


def test_no_trial_of_any_rung_violates_the_budget(store: Any, front: Any) -> None:
    limits = front["limits"]
    assert set(limits) == {"macs", "params"}
    assert limits["macs"] == int(front["dense"]["macs"] * 0.6 + 1e-6)
    for trial in store.trials():
        costs = trial["user"]["result"]["costs"]
        assert all(costs[name] <= limit for name, limit in limits.items())
        assert all(value <= 0 for value in trial["system"]["constraints"])
        assert trial["system"]["constraints:macs"] == pytest.approx(costs["macs"] / limits["macs"] - 1)


def test_the_test_set_is_touched_by_the_last_rung_and_the_controls_alone(store: Any) -> None:
    tested = {True: set(), False: set()}  # type: dict[bool, set[str]]
    for trial in store.trials():
        metrics = trial["user"]["result"]["metrics"]
        tested[any(name.startswith("test_") for name in metrics)].add(trial["rung"])
    assert tested == {True: {"final", "controls"}, False: {"screen", "tune"}}
    for run in store.runs("trial"):
        measured = any(name.startswith("test_") for name in run["latest_metrics"])
        assert measured == (run["tags"]["rung"] in ("final", "controls"))


def test_a_promoted_trial_names_the_one_that_it_comes_from(store: Any) -> None:
    trials = store.trials()
    identities = {trial["key"]: trial["user"]["identity"] for trial in trials}
    for rung, before in (("tune", "screen"), ("final", "tune")):
        for trial in (t for t in trials if t["rung"] == rung):
            assert identities[f"quick.{before}/{trial['user']['origin']}"] == trial["user"]["identity"]


# --- MLflow ---


def test_mlflow_holds_one_run_a_search_and_one_flat_run_a_trial(store: Any) -> None:
    (search,) = store.runs("search")
    runs = store.runs("trial")
    assert sorted(run["tags"]["autoprune.trial"] for run in runs) == sorted(t["key"] for t in store.trials())
    assert {run["status"] for run in (search, *runs)} == {"FINISHED"}
    assert not any("mlflow.parentRunId" in run["tags"] for run in runs)
    experiments = store.rows("mlflow.db", "select name from experiments where name != 'Default'")
    assert experiments == [("quick",)]


def test_a_trials_run_holds_ratios_criteria_widths_scores_costs_and_where_it_came_from(store: Any) -> None:
    runs = [run for run in store.runs("trial") if run["tags"]["rung"] == "tune"]
    assert len(runs) == RUNGS["tune"]
    for run in runs:
        params, metrics, tags = run["params"], run["latest_metrics"], run["tags"]
        assert set(params) == {f"{what}/hidden.{i}" for what in ("ratio", "criterion", "width") for i in (0, 1)}
        assert float(params["ratio/hidden.0"]) == pytest.approx(1 - int(params["width/hidden.0"]) / 24, abs=1e-5)
        scores = {"val_accuracy", "val_accuracy_pruned", "val_accuracy_recalibrated", "val_accuracy_tuned", "val_error"}
        assert scores | {"latency_ms", "macs_fraction", *COSTS} <= set(metrics)
        assert metrics["val_error"] == pytest.approx(1 - metrics["val_accuracy"])
        assert {"seed": "0", "device": "cpu", "kind": "trial", "autoprune.search": "quick"}.items() <= tags.items()
        assert {"version.torch", "version.autoprune", "identity", "policy", "origin"} <= set(tags)
        curve = store.rows(
            "mlflow.db",
            "select step from metrics where run_uuid = ? and key = 'epoch/train_loss' order by step",
            run["id"],
        )
        assert curve == [(1,), (2,)]


def test_the_tag_pareto_marks_the_runs_of_the_front_and_no_other(store: Any, front: Any) -> None:
    marked = {r["tags"]["autoprune.trial"] for r in store.runs("trial") if r["tags"]["pareto"] == "true"}
    picked = {point["trial"] for point in front["front"]}
    finals = {t["key"] for t in store.trials() if t["rung"] == "final" and t["user"]["origin"] in picked}
    assert marked == finals
    assert len(marked) == len(front["front"]) >= 2


def test_the_searchs_run_holds_the_front_as_plot_picture_and_table(store: Any, front: Any) -> None:
    (run,) = store.runs("search")
    folder = artifacts(store, run) / "front"
    assert {path.name for path in folder.iterdir()} == {
        *("front.html", "front.png", "front.csv", "front.txt"),
        *("widths.html", "widths.png", "groups.csv", "controls.csv", "report.html"),
    }
    assert "figure-sensitivity" in (folder / "report.html").read_text(encoding="utf-8")
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "plotly" in (folder / "front.html").read_text().lower()
    rows = list(csv.DictReader((folder / "front.csv").read_text().splitlines()))
    assert [int(row["trial"]) for row in rows] == [point["trial"] for point in front["front"]]
    assert [int(row["macs"]) for row in rows] == sorted(point["macs"] for point in front["front"])
    assert run["latest_metrics"]["hypervolume"] == pytest.approx(front["hypervolume"])
    assert run["latest_metrics"]["front_size"] == len(front["front"])
    assert run["params"]["budget.macs"] == "0.6"


def test_models_of_the_front_are_stored_as_safetensors_and_a_policy_never_as_a_pickle(store: Any, front: Any) -> None:
    # A copy of this search that another test works on writes below the same artifact root.
    runs = {run["id"] for run in store.runs("trial")}
    kept = [p for p in (store.home / "artifacts").rglob("*") if p.parent.name == "model" and runs & set(p.parts)]
    for name in ("MLmodel", "model.safetensors", "policy.json"):
        assert sum(path.name == name for path in kept) == len(front["front"]), name
    everything = [path for path in store.home.rglob("*") if path.is_file()]
    assert not [path for path in everything if path.suffix in (".pkl", ".pt", ".pth", ".bin", ".pickle")]


def test_each_trial_links_to_its_mlflow_run(store: Any) -> None:
    ids = {run["tags"]["autoprune.trial"]: run["id"] for run in store.runs("trial")}
    query = "select value_json from study_system_attributes where key = ?"
    for trial in store.trials():
        ((note,),) = store.rows("optuna.db", query, f"dashboard:{trial['id']}:note_str:0")
        assert f"/runs/{ids[trial['key']]}" in json.loads(note)


def artifacts(store: Any, run: dict[str, Any]) -> Path:
    ((uri,),) = store.rows("mlflow.db", "select artifact_uri from runs where run_uuid = ?", run["id"])
    return Path(unquote(urlparse(uri).path))


# --- again ---


def test_run_twice_a_search_repeats_nothing(again: Path, commands: Any, store_of: Any) -> None:
    store = store_of(again)
    before = (store.states(), sorted(run["id"] for run in store.runs("trial")), store.runs("search")[0]["id"])
    first = commands.run("front", "quick", cwd=again)
    done = commands.run("search", "space.yaml", "--workers", "1", cwd=again)
    assert done.status == 0, done.err
    assert (store.states(), sorted(r["id"] for r in store.runs("trial")), store.runs("search")[0]["id"]) == before
    assert len(store.runs("search")) == 1
    assert done.out.startswith(first.out.strip())
    assert "training a baseline" not in done.err


def test_more_trials_go_on_where_the_search_ended(again: Path, commands: Any, store_of: Any) -> None:
    done = commands.run("search", "space.yaml", "--workers", "1", "--trials", "13", cwd=again)
    assert done.status == 0, done.err
    store = store_of(again)
    found = store.distinct()
    assert found["screen"] == 13
    assert found["tune"] >= RUNGS["tune"]
    keys = [run["tags"]["autoprune.trial"] for run in store.runs("trial")]
    assert sorted(keys) == sorted(trial["key"] for trial in store.trials())


def test_a_time_limit_ends_the_search_with_status_0_and_says_how_to_go_on(
    again: Path, commands: Any, store_of: Any
) -> None:
    arguments = ("search", "space.yaml", "--workers", "1", "--name", "hasty")
    done = commands.run(*arguments, "--timeout", "0.01", cwd=again)
    assert done.status == 0, done.err
    assert "the same command goes on" in done.out
    store = store_of(again, "hasty")
    assert {state for _, state in store.states()} <= {"COMPLETE"}
    assert [run["status"] for run in store.runs("search")] == ["FINISHED"]


def test_a_home_folder_may_be_moved_and_used_from_anywhere(again: Path, commands: Any, tmp_path: Path) -> None:
    moved = tmp_path / "moved home"
    shutil.move(again / ".autoprune", moved)
    number = json.loads(commands.run("front", "quick", "--json", "--home", moved, cwd=tmp_path).out)["front"][0][
        "trial"
    ]
    done = commands.run("export", "quick", "--trial", number, "--home", moved, "--output", "out", cwd=tmp_path)
    assert done.status == 0, done.err
    assert (tmp_path / "out/model.safetensors").is_file()


def test_the_summary_shows_layers_before_and_after(again: Path, commands: Any) -> None:
    done = commands.run("search", "space.yaml", "--workers", "1", "--summary", cwd=again)
    assert done.status == 0, done.err
    assert "hidden.0" in done.out
    assert "24 → " in done.out


# --- front and export ---


def test_the_front_as_json_has_a_stable_schema(front: Any) -> None:
    assert front["schema"] == 1
    assert (front["name"], front["rung"], front["primary"]) == ("quick", "final", "macs")
    assert set(front) == {
        *("schema", "name", "rung", "primary", "limits", "dense", "front", "controls", "knee", "hypervolume"),
        *("controls_hypervolume", "hypervolume_interval", "reference", "trials", "notes", "pruning", "caveat"),
        "objective",
    }
    assert front["objective"] == {"name": "accuracy", "percent": True}
    for point in (front["dense"], *front["front"], *front["controls"]):
        assert 0 <= point["val_accuracy"] <= 1
        assert 0 <= point["test_accuracy"] <= 1
        for cost in COSTS:
            assert point[f"{cost}_saved"] == front["dense"][cost] - point[cost] >= 0
            fraction = point[f"{cost.removesuffix('_bytes')}_fraction"]
            assert fraction == pytest.approx(point[cost] / front["dense"][cost])
    accuracies = [point["val_accuracy"] for point in front["front"]]
    assert accuracies == sorted(accuracies)
    assert len(set(accuracies)) == len(accuracies)


def test_the_layers_of_a_trial_are_shown_before_and_after(searched: Any, commands: Any, front: Any) -> None:
    point = front["front"][0]
    done = commands.run("front", "quick", "--layers", point["trial"], cwd=searched[0])
    assert done.status == 0, done.err
    assert f"24 → {point['widths']['hidden.0']}" in done.out
    data = json.loads(commands.run("front", "quick", "--json", "--layers", point["trial"], cwd=searched[0]).out)
    assert sum(row["macs_after"] for row in data["layers"]) == point["macs"]
    assert sum(row["params_before"] for row in data["layers"]) == front["dense"]["params"]


def test_the_front_is_shown_without_torch(searched: Any) -> None:
    code = "import sys; from autoprune.cli import main; sys.argv = ['autoprune', 'front', 'quick']\n"
    code += (
        "try: main()\nfinally: print({'torch', 'mlflow', 'sklearn', 'matplotlib'} & set(sys.modules), file=sys.stderr)"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=searched[0], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "set()")
    assert done.stdout.startswith("quick: the front")


def test_an_exported_model_gives_the_stored_models_output_in_every_format(
    searched: Any, commands: Any, front: Any, tmp_path: Path
) -> None:
    import numpy as np
    import onnxruntime
    import torch

    import autoprune

    folder, _ = searched
    point = front["front"][-1]
    for kind in ("safetensors", "pt2", "onnx"):
        done = commands.run(
            *("export", "quick", "--trial", point["trial"], "--format", kind, "--output", tmp_path), cwd=folder
        )
        assert done.status == 0, done.err
        written = [Path(line) for line in done.out.splitlines()]
        files = ["model.safetensors", "policy.json"] if kind == "safetensors" else [f"model.{kind}"]
        assert [path.name for path in written] == [*files, "README.md"]
        assert all(path.is_file() for path in written)
    stored = next((folder / ".autoprune/artifacts").rglob("model/model.safetensors")).parents[2]
    assert stored.is_dir()
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = autoprune.load(tmp_path)(x)
        assert torch.equal(expected, kept_model(folder, point)(x))
        assert torch.allclose(torch.export.load(tmp_path / "model.pt2").module()(x), expected, atol=1e-5)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": x.numpy()})
    assert np.allclose(found, expected.numpy(), atol=1e-5)


def test_a_loaded_model_has_the_costs_and_the_test_accuracy_that_the_front_states(searched: Any, front: Any) -> None:
    import torch

    from autoprune.network.data.loading import DataSettings, load_data

    folder, _ = searched
    settings = DataSettings(name="iris", validation_source="train", validation_fraction=0.3, calibration=32)
    splits = load_data(settings, seed=0, cache_dir=folder / ".autoprune/cache/data")
    for point in front["front"]:
        model = kept_model(folder, point)
        assert sum(p.numel() for p in model.parameters()) == point["params"]
        for split, accuracy in ((splits.test, point["test_accuracy"]), (splits.val, point["val_accuracy"])):
            x, y = (torch.cat(parts) for parts in zip(*split.batches(64), strict=True))
            with torch.no_grad():
                assert (model(x).argmax(1) == y).float().mean().item() == pytest.approx(accuracy)


def kept_model(folder: Path, point: dict[str, Any]) -> Any:
    import autoprune

    for document in (folder / ".autoprune/models/quick").glob("final-*/policy.json"):
        if json.loads(document.read_text())["result"]["widths"] == point["widths"]:
            return autoprune.load(document.parent)
    raise AssertionError(f"no model is kept with the widths {point['widths']}")


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("front", "quik"), ("no search 'quik'", "did you mean 'quick'")),
        (("front", "quick", "--layers", "99"), ("trial 99",)),
        (("front", "quick", "--home", "nowhere"), ("nowhere", "autoprune search")),
        (("export", "quick", "--trial", "99"), ("no finished trial 99", "weights are kept of:")),
        (("export", "quick", "--trial", "1", "--format", "onyx"), ("did you mean 'onnx'",)),
        (("dashboard", "--home", "nowhere"), ("nowhere", "autoprune search")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else "",
)
def test_what_does_not_exist_is_named_with_status_2(
    arguments: tuple[str, ...], words: tuple[str, ...], searched: Any, commands: Any
) -> None:
    done = commands.run(*arguments, cwd=searched[0])
    assert (done.status, done.out) == (2, "")
    for word in words:
        assert word in done.err
    assert not (searched[0] / "nowhere").exists()


FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
    def forward(self, x):
        x = self.first(x)
        if x.sum() > 0:
            x = x * 2
        return self.last(x)

def depends_on_data():
    return Net()
"""


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("recipe.epoch=3",), ("epoch",)),
        (("criteria.choices=[l2, tailor]",), ("tailor", "did you mean 'taylor'")),
        (("model.name=resnet2", "model.arguments={}"), ("resnet2", "did you mean")),
        (("data.name=iriss",), ("iriss", "did you mean 'iris'")),
        (("groups.include=['hiden.*']",), ("'hiden.*' matches no pruning group",)),
        (("groups.exclude=['*']",), ("nothing to prune",)),
        (("groups.max_ratio=1.0",), ("max_ratio",)),
        (("budget.params=0.01",), ("no policy meets the budget", "the least possible is", "of the dense 571")),
        (("checkpoint=missing.safetensors",), ("there is no file 'missing.safetensors'",)),
        (("checkpoint=other.safetensors",), ("missing", "hidden.0")),
        (("checkpoint=broken.safetensors",), ("broken.safetensors",)),
        (("data={name: imagefolder, path: images}",), ("images",)),
        (("data={name: imagefolder, path: no-images}",), ("there is no file or folder 'no-images'",)),
        (("model={factory: 'net:depends_on_data'}", "recipe.baseline.epochs=0.1"), ("cannot be exported", "aten")),
        (("model={factory: 'net:absent'}",), ("no 'absent'",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_space_that_cannot_be_searched_is_refused_with_status_2_and_no_study(
    overrides: tuple[str, ...], words: tuple[str, ...], commands: Any, space_text: str, tmp_path: Path
) -> None:
    from safetensors.torch import save_file
    from torch import zeros

    (tmp_path / "space.yaml").write_text(space_text)
    (tmp_path / "net.py").write_text(FACTORY)
    (tmp_path / "images").mkdir()
    save_file({"weight": zeros(2, 2)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no such thing")
    settings = [word for override in overrides for word in ("--set", override)]
    done = commands.run("search", "space.yaml", "--workers", "1", *settings, cwd=tmp_path)
    assert (done.status, done.out) == (2, ""), done.err
    for word in words:
        assert word in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / ".autoprune/optuna.db").exists()
    assert not (tmp_path / ".autoprune/mlflow.db").exists()


def test_a_study_that_belongs_to_another_space_is_refused_and_left_as_it_was(again: Path, commands: Any) -> None:
    before = (again / ".autoprune/optuna.db").read_bytes()
    done = commands.run("search", "space.yaml", "--workers", "1", "--set", "recipe.lr=0.05", cwd=again)
    assert (done.status, done.out) == (2, "")
    assert "quick" in done.err
    assert "recipe" in done.err
    assert (again / ".autoprune/optuna.db").read_bytes() == before


def test_a_home_that_cannot_be_written_is_refused_with_status_2(commands: Any, space_text: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(space_text)
    (tmp_path / "file").write_text("")
    done = commands.run("search", "space.yaml", "--workers", "1", "--home", "file/home", cwd=tmp_path)
    assert (done.status, done.out) == (2, ""), done.err
    assert "file/home" in done.err
    assert "Traceback" not in done.err


def test_an_mlflow_that_is_away_delays_records_and_changes_nothing(
    again: Path, commands: Any, store_of: Any, front: Any
) -> None:
    arguments = ("search", "space.yaml", "--workers", "1", "--name", "lonely")
    done = commands.run(*arguments, cwd=again, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.status == 0, done.err
    assert "MLflow is away" in done.out
    assert done.err.count("MLflow is away") == 1
    store = store_of(again, "lonely")
    assert store.distinct() == RUNGS
    assert store.runs("trial") == []
    done = commands.run(*arguments, cwd=again)
    assert (done.status, "MLflow is away" in done.out) == (0, False)
    assert store.distinct() == RUNGS
    assert sorted(r["tags"]["autoprune.trial"] for r in store.runs("trial")) == sorted(t["key"] for t in store.trials())
    assert len(store.runs("search")) == 1
    assert sum(run["tags"]["pareto"] == "true" for run in store.runs("trial")) >= 2
    twin = json.loads(commands.run("front", "lonely", "--json", cwd=again).out)["front"]
    assert [picture(point) for point in twin] == [picture(point) for point in front["front"]]


def picture(point: dict[str, Any]) -> tuple[Any, ...]:
    """Returns what is the same for the same space on the same machine: everything but time."""
    return point["trial"], point["val_accuracy"], point["test_accuracy"], point["widths"], point["criterion"]
