"""The registered model of a search against a real MLflow store in a SQLite file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoprune.errors import InputError, TrackingError
from autoprune.network.artifacts.saved import save_model
from autoprune.network.models.building import build_model
from autoprune.policy import Choice, Policy
from autoprune.results import Fidelity, TrialResult
from autoprune.tracking import Member, Reader, Registry, Tracker, TrialRecord, open_reader

LOADER = "autoprune.network.serving"
ORIGIN = {"name": "mlp", "arguments": {"in_features": 4, "hidden": [6]}, "num_classes": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow registry")


@pytest.fixture(scope="module")
def uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


@pytest.fixture(scope="module")
def tracker(folder: Path, uri: str) -> Tracker:
    return Tracker(uri, "iris", artifact_root=folder / "artifacts")


@pytest.fixture(scope="module")
def reader(tracker: Tracker, uri: str) -> Reader:
    return open_reader(uri)


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """The folder of a saved model: an MLP with fixed weights."""
    net = build_model(name="mlp", arguments=ORIGIN["arguments"], num_classes=3, seed=1)
    return save_model(folder / "model", net, {"schema": 1, "origin": ORIGIN, "input_shape": [4], "depthwise": []})


def record(tracker: Tracker, search: str, number: int) -> tuple[str, str]:
    """Records a trial and returns its key and its run."""
    policy = Policy({"hidden.0": Choice("l2", 0.5)})
    costs = dict.fromkeys(("macs", "params", "size_bytes", "activation_bytes"), 10)
    result = TrialResult(policy, f"i{number}", Fidelity("final"), {"hidden.0": 3}, costs, {"val_accuracy": 0.9})
    one = TrialRecord(search, f"{search}.final", number, "final", policy, result, costs)
    return one.key, tracker.record_trial(one)


def members(tracker: Tracker, search: str, model: Path, *numbers: int) -> list[Member]:
    found = []
    for number in numbers:
        key, run = record(tracker, search, number)
        found.append(Member(key, run, model, {"val_accuracy": f"0.{number}"}, f"**{number}**", [4], 3))
    return found


def opened(tracker: Tracker, search: str) -> Registry:
    registry = tracker.registry(search)
    registry.open(description="the front", tags={"autoprune.search": search})
    return registry


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred:UserWarning")  # mlflow, about its own code
def test_a_registered_model_is_loaded_by_its_alias_and_predicts_arrays(
    tracker: Tracker, model: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    registry = opened(tracker, "loads")
    numbers = registry.add(members(tracker, "loads", model, 1), loader=LOADER)
    registry.point({"knee": numbers["loads.final/1"]})
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    loaded = mlflow.pyfunc.load_model("models:/autoprune-loads@knee")
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    net = build_model(name="mlp", arguments=ORIGIN["arguments"], num_classes=3, seed=1).eval()
    with torch.no_grad():
        expected = net(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(loaded.predict(x), expected, rtol=1e-5, atol=1e-6)
    signature = loaded.metadata.signature
    assert [tuple(signature.inputs.inputs[0].shape), tuple(signature.outputs.inputs[0].shape)] == [(-1, 4), (-1, 3)]
    example = loaded.metadata.load_input_example(f"runs:/{loaded.metadata.run_id}/model")
    assert loaded.predict(example).shape == (1, 3)
    with pytest.raises(Exception, match="shape"):
        loaded.predict(np.zeros((2, 7), "float32"))


def test_registering_again_makes_no_second_version_and_writes_what_changed(tracker: Tracker, model: Path) -> None:
    registry = opened(tracker, "again")
    front = members(tracker, "again", model, 1, 2)
    first = registry.add(front, loader=LOADER)
    assert registry.add(front, loader=LOADER) == first == {"again.final/1": "1", "again.final/2": "2"}
    more = members(tracker, "again", model, 2, 3)
    changed = Member(**{**_fields(more[0]), "tags": {"val_accuracy": "0.99"}})
    assert registry.add([changed, more[1]], loader=LOADER) == {"again.final/2": "2", "again.final/3": "3"}
    versions = {version.number: version for version in registry.versions()}
    assert list(versions) == ["1", "2", "3"]
    assert versions["2"].tags["val_accuracy"] == "0.99"
    registry.mark(["again.final/2", "again.final/3"])
    assert [version.tags["pareto"] for version in registry.versions()] == ["false", "true", "true"]


def _fields(member: Member) -> dict[str, Any]:
    return {name: getattr(member, name) for name in Member.__slots__}


def test_aliases_follow_the_front_and_leave_the_persons_own_alone(tracker: Tracker, model: Path) -> None:
    registry = opened(tracker, "aliases")
    registry.add(members(tracker, "aliases", model, 1, 2), loader=LOADER)
    registry.point({"smallest": "1", "knee": "1", "production": "1"})
    registry.point({"smallest": "2", "knee": None})
    found = {version.number: version.aliases for version in registry.versions()}
    assert found == {"1": ("production",), "2": ("smallest",)}
    assert registry.named("knee") is None
    smallest = registry.named("smallest")
    assert smallest is not None
    assert smallest.key == "aliases.final/2"


def test_a_model_folder_with_what_could_be_a_pickle_is_refused(tracker: Tracker, tmp_path: Path) -> None:
    registry = opened(tracker, "refused")
    (tmp_path / "policy.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no \.safetensors"):
        registry.add(members(tracker, "refused", tmp_path, 1), loader=LOADER)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "model.pt").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"model\.pt"):
        registry.add(members(tracker, "refused", tmp_path, 1), loader=LOADER)
    assert registry.versions() == []


def test_a_search_that_registered_nothing_has_no_versions_and_no_pick(tracker: Tracker, reader: Reader) -> None:
    registry = reader.registry("nothing")
    assert registry.versions() == []
    assert registry.picked("iris", "nothing") == {}
    assert registry.picked("no such experiment", "nothing") == {}
    registry.point({"knee": None})


def test_an_alias_and_tags_set_in_the_ui_are_picks(tracker: Tracker, reader: Reader, model: Path) -> None:
    registry = opened(tracker, "picks")
    front = members(tracker, "picks", model, 1, 2, 3)
    registry.add(front, loader=LOADER)
    client = tracker._client
    client.set_registered_model_alias("autoprune-picks", "picked", "2")
    client.set_tag(front[2].run_id, "pick", " True ")
    client.set_tag(front[0].run_id, "pick", "not true")
    try:
        assert reader.registry("picks").picked("iris", "picks") == {
            "picks.final/2": front[1].run_id,
            "picks.final/3": front[2].run_id,
        }
        with pytest.raises(InputError, match="is no trial of other: remove the tag"):
            reader.registry("other").picked("iris", "other")
    finally:
        client.delete_tag(front[2].run_id, "pick")
        client.delete_tag(front[0].run_id, "pick")


def test_choosing_replaces_every_earlier_pick(tracker: Tracker, reader: Reader, model: Path) -> None:
    registry = opened(tracker, "choose")
    front = members(tracker, "choose", model, 1, 2)
    registry.add(front, loader=LOADER)
    key, run = record(tracker, "choose", 7)  # it has no version
    tracker._client.set_tag(front[0].run_id, "pick", "true")
    assert "has the alias picked" in registry.choose("iris", front[1].key, front[1].run_id)
    assert registry.picked("iris", "choose") == {front[1].key: front[1].run_id}
    assert "has the tag pick = true" in registry.choose("iris", key, reader.trial_run("iris", key))
    assert registry.picked("iris", "choose") == {key: run}
    assert "has the alias picked" in registry.choose("iris", front[0].key, front[0].run_id)
    assert registry.picked("iris", "choose") == {front[0].key: front[0].run_id}
    with pytest.raises(TrackingError, match="autoprune sync"):
        registry.choose("iris", "choose.final/99", reader.trial_run("iris", "choose.final/99"))


def test_a_version_that_somebody_else_made_cannot_be_picked(tracker: Tracker, reader: Reader) -> None:
    opened(tracker, "foreign")
    _, run = record(tracker, "foreign", 1)
    client = tracker._client
    version = client.create_model_version("autoprune-foreign", f"runs:/{run}/elsewhere", run)
    client.set_registered_model_alias("autoprune-foreign", "picked", version.version)
    with pytest.raises(InputError, match=r"version 1 of autoprune-foreign .* not made by autoprune"):
        reader.registry("foreign").picked("iris", "foreign")


def test_a_run_is_read_back_with_its_files_and_its_search(tracker: Tracker, reader: Reader) -> None:
    search = tracker.open_search("read", params={"seed": 1}, tags={"threads": "1"})
    tracker.log_files(search, {"space.json": json.dumps({"name": "read"})})
    _, run = record(tracker, "read", 1)
    found = reader.run(run)
    assert found.params["width/hidden.0"] == "3"
    assert found.metrics["val_accuracy"] == 0.9
    assert reader.search_run(found).tags["threads"] == "1"
    assert json.loads(reader.text(search, "space.json") or "") == {"name": "read"}
    assert reader.text(search, "nothing.json") is None
    assert reader.text(search, "no/such/file.json") is None
    with pytest.raises(InputError, match="there is no run 'deadbeef'"):
        reader.run("deadbeef")
    with pytest.raises(InputError, match="no trial of a search"):
        reader.search_run(reader.run(search))


def test_a_trial_without_its_search_says_that_the_settings_are_gone(tracker: Tracker, reader: Reader) -> None:
    _, run = record(tracker, "orphan", 1)
    with pytest.raises(InputError, match="the run of the search 'orphan' is gone"):
        reader.search_run(reader.run(run))


def test_a_person_s_description_is_kept_beside_ours(tracker: Tracker) -> None:
    run = tracker.open_search("described", params={}, tags={})

    def note() -> Mapping[str, str]:
        return dict(tracker._client.get_run(run).data.tags)

    tracker._client.set_tag(run, "mlflow.note.content", "mine before")
    tracker.describe("ours", run_id=run)
    tracker._client.set_tag(run, "mlflow.note.content", note()["mlflow.note.content"] + "\nmine after")
    tracker.describe("newer " * 2000, run_id=run)
    text = note()["mlflow.note.content"]
    assert text.startswith("mine before")
    assert text.endswith("mine after")
    assert "ours" not in text
    assert text.count("<!-- autoprune -->") == 1
    assert len(text) <= 5000
