"""Pruned models on disk: whole folders without pickles, and what comes back from them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.errors import CheckpointError
from autoprune.network.artifacts.saved import load, model_document, read_document, save_model
from autoprune.network.models.building import build_model
from autoprune.network.models.checkpoints import save_state
from autoprune.network.surgery.cut import cut
from autoprune.network.tracing.trace import trace
from autoprune.policy import Choice, Policy

EXAMPLE = Path(__file__).parents[3] / "assets" / "policy_schema1.json"
ORIGIN = {"name": "mlp", "arguments": {"in_features": 6, "hidden": [8, 8]}, "num_classes": 3}


@pytest.fixture
def network():
    model = build_model(name="mlp", arguments=ORIGIN["arguments"], num_classes=3, seed=0)
    return trace(model.eval(), torch.randn(2, 6))


def save(folder, network, origin=ORIGIN, ratio=0.5):
    selection = {g.name: np.arange(round(g.size * (1 - ratio))) for g in network.groups}
    policy = Policy({g.name: Choice("l2", ratio) for g in network.groups})
    small = cut(network, selection)
    save_model(folder, small, model_document(network, policy, selection, {"metrics": {"val_accuracy": 0.9}}, origin))
    return small


def test_a_saved_model_comes_back_as_its_own_class_with_the_same_output(network, tmp_path, output):
    small = save(tmp_path / "a", network)
    loaded, x = load(tmp_path / "a"), torch.randn(5, 6)
    assert type(loaded) is type(network.model)
    assert not loaded.training
    torch.testing.assert_close(output(loaded, x), output(small, x), atol=1e-6, rtol=1e-6)


def test_a_model_of_ones_own_comes_back_with_its_factory(tmp_path, output):
    def factory():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, groups=8), nn.PReLU(16),
            nn.Conv2d(16, 6, 1), nn.ConvTranspose2d(6, 4, 2), nn.Conv2d(4, 2, 1),
        )  # fmt: skip

    network, x = trace(factory().eval(), torch.zeros(2, 3, 6, 6)), torch.randn(2, 3, 6, 6)
    small = save(tmp_path / "a", network, origin={})
    torch.testing.assert_close(output(load(tmp_path / "a", factory), x), output(small, x), atol=1e-6, rtol=1e-5)
    with pytest.raises(CheckpointError, match=r"pass load\(path, factory\)"):
        load(tmp_path / "a")


def test_tied_weights_come_back_tied(tmp_path, output):
    def factory():
        a, b = nn.Linear(8, 8), nn.Linear(8, 8)
        b.weight = a.weight
        return nn.Sequential(nn.Linear(6, 8), a, nn.ReLU(), b, nn.ReLU(), nn.Linear(8, 3))

    network, x = trace(factory().eval(), torch.randn(2, 6)), torch.randn(4, 6)
    small = save(tmp_path / "a", network, origin={})
    loaded = load(tmp_path / "a", factory)
    assert loaded[1].weight is loaded[3].weight
    torch.testing.assert_close(output(loaded, x), output(small, x), atol=1e-6, rtol=1e-5)


def test_the_folder_holds_safetensors_and_json_and_no_pickle(network, tmp_path):
    save(tmp_path / "a", network)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["model.safetensors", "policy.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    header = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert header[8:9] == b"{"


def test_saving_again_replaces_the_folder_as_a_whole(network, tmp_path):
    save(tmp_path / "a", network)
    (tmp_path / "a" / "stray").write_text("old")
    small = save(tmp_path / "a", network, ratio=0.25)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["model.safetensors", "policy.json"]
    assert [p.shape for p in load(tmp_path / "a").parameters()] == [p.shape for p in small.parameters()]


def test_the_document_says_what_was_pruned_and_what_it_saves(network, tmp_path):
    small = save(tmp_path / "a", network)
    document = read_document(tmp_path / "a")
    assert document["schema"] == 1
    assert Policy.from_json(document["policy"]).choices[network.groups[0].name] == Choice("l2", 0.5)
    assert document["kept"] == {g.name: [0, 1, 2, 3] for g in network.groups}
    assert document["costs"]["params"] == sum(p.numel() for p in small.parameters())
    assert document["dense_costs"]["params"] == sum(p.numel() for p in network.model.parameters())
    assert document["input_shape"] == [6]
    assert document["result"] == {"metrics": {"val_accuracy": 0.9}}


def test_the_example_of_schema_1_stays_readable(tmp_path):
    (tmp_path / "policy.json").write_text(EXAMPLE.read_text())
    document = read_document(tmp_path)
    policy = Policy.from_json(document["policy"])
    assert policy.choices["hidden.1"] == Choice("obs", 0.25)
    origin = document["origin"]
    model = build_model(name=origin["name"], arguments=origin["arguments"], num_classes=origin["num_classes"])
    network = trace(model, torch.zeros(2, *document["input_shape"]))
    assert {g.name for g in network.groups} == set(document["kept"])
    small = cut(network, {name: np.array(kept) for name, kept in document["kept"].items()})
    save_state(small, tmp_path / "model.safetensors")
    assert sum(p.numel() for p in load(tmp_path).parameters()) == document["costs"]["params"]
    assert network.cost_model.dense()["params"] == document["dense_costs"]["params"]


@pytest.mark.parametrize("schema", [2, "1", None])
def test_another_schema_is_refused_by_its_number(network, tmp_path, schema):
    save(tmp_path / "a", network)
    document = json.loads((tmp_path / "a" / "policy.json").read_text())
    (tmp_path / "a" / "policy.json").write_text(json.dumps({**document, "schema": schema}))
    with pytest.raises(CheckpointError, match=rf"unknown schema {schema!r}; this version reads schema 1"):
        load(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3"])
def test_a_damaged_document_is_refused(network, tmp_path, text):
    save(tmp_path / "a", network)
    (tmp_path / "a" / "policy.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"policy\.json"):
        load(tmp_path / "a")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no pruned model at"):
        load(tmp_path)


def test_damaged_or_missing_weights_are_refused(network, tmp_path):
    save(tmp_path / "a", network)
    weights = tmp_path / "a" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(tmp_path / "a")
    weights.unlink()
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(tmp_path / "a")


def test_weights_of_another_model_are_refused_and_the_differences_listed(network, tmp_path):
    save(tmp_path / "a", network, ratio=0.0)
    with pytest.raises(CheckpointError, match=r"(?s)does not belong to Sequential:.*missing: 0\.weight"):
        load(tmp_path / "a", lambda: nn.Sequential(nn.Linear(6, 4, bias=False)))
    smaller = {**ORIGIN["arguments"], "hidden": [4, 8]}
    with pytest.raises(CheckpointError, match="larger than dense"):
        load(tmp_path / "a", lambda: build_model(name="mlp", arguments=smaller, num_classes=3))
