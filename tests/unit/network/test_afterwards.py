"""A saved model that is trained longer, timed, scored by class, and served as arrays."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoprune.errors import CheckpointError, InputError, TrialError
from autoprune.network import afterwards, preparing
from autoprune.network.afterwards import Target, Training
from autoprune.network.artifacts import serving
from autoprune.network.artifacts.saved import load, read_document
from autoprune.policy import uniform_policy
from autoprune.results import Fidelity
from autoprune.space import Space

SETTINGS: dict[str, Any] = {
    "schema": 1,
    "name": "iris",
    "model": {"name": "mlp", "arguments": {"in_features": 4, "hidden": [16, 8]}},
    "data": {"name": "iris", "validation": {"source": "train", "fraction": 0.3}, "calibration": 32},
    "budget": {"macs": 0.9},
    "recipe": {"batch_size": 16, "lr": 0.02, "precision": "float32", "baseline": {"epochs": 20, "lr": 0.05}},
    "search": {"ladder": [{"rung": "tune", "epochs": 2, "test": True}]},
    "device": "cpu",
}


def quiet(text: str) -> None:
    """Takes what would be told."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def space() -> Space:
    return Space.from_mapping(SETTINGS)


@pytest.fixture(scope="module")
def saved(space: Space, cache: Path) -> Path:
    """The folder of a model that a trial saved."""
    ingredients = preparing.ingredients_of(space, cache=cache)
    network = preparing.trace_ingredients(ingredients)
    preparing.train_baseline(space, ingredients, cache=cache, note=quiet)
    bench = preparing.workbench_of(space, ingredients, network, cache=cache, models=cache / "models", note=quiet)
    result = bench.evaluate(uniform_policy(bench.groups, 0.5, "l2"), Fidelity("tune", epochs=2, test=True))
    assert result.model_path is not None
    return Path(result.model_path)


def test_training_longer_gives_a_model_with_the_same_channels_and_its_own_numbers(
    space: Space, saved: Path, cache: Path, tmp_path: Path
) -> None:
    target = Target(tmp_path / "1", {"from": "iris.tune/0", "trial": 0})
    said: list[str] = []
    result = afterwards.finetune(
        space, saved, training=Training(3, seed=1), cache=cache, target=target, note=said.append
    )
    assert {"val_accuracy_before", "val_accuracy", "test_accuracy", "latency_ms"} <= set(result.metrics)
    assert sum("epoch" in text for text in said) == 3
    before, after = read_document(saved), read_document(tmp_path / "1")
    assert after["kept"] == before["kept"]
    assert after["costs"] == before["costs"]
    assert after["finetune"]["from"] == "iris.tune/0"
    assert after["result"]["fidelity"] == asdict(Fidelity("finetune", epochs=3, test=True))
    old, new = load(saved).state_dict(), load(tmp_path / "1").state_dict()
    assert {k: v.shape for k, v in old.items()} == {k: v.shape for k, v in new.items()}
    assert any(not torch.equal(old[k], new[k]) for k in old)
    again = afterwards.finetune(
        space, saved, training=Training(3, seed=1), cache=cache, target=Target(tmp_path / "2", {}), note=quiet
    )
    assert again.metrics["val_loss"] == result.metrics["val_loss"]


def test_training_that_fails_leaves_nothing(
    space: Space, saved: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*args: Any, **settings: Any) -> None:
        raise TrialError("the loss is nan")

    monkeypatch.setattr(afterwards, "fine_tune", diverge)
    target = Target(tmp_path / "folder/1", {})
    with pytest.raises(TrialError, match="nan"):
        afterwards.finetune(space, saved, training=Training(1), cache=cache, target=target, note=quiet)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings", [{"epochs": 0}, {"epochs": -1}, {"epochs": math.nan}, {"epochs": math.inf}, {"epochs": 1, "lr": 0}]
)
def test_epochs_and_rates_that_mean_nothing_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must be positive and finite"):
        Training(**settings)  # type: ignore[arg-type]


def test_classes_are_scored_one_by_one_and_add_up_to_the_whole(space: Space, saved: Path, cache: Path) -> None:
    for scores in afterwards.score_by_class(space, saved, cache=cache, note=quiet):
        assert [name for name, *_ in scores.classes] == ["setosa", "versicolor", "virginica"]
        assert sum(count for _, count, _, _ in scores.classes) == scores.count
        for column, whole in ((2, scores.dense), (3, scores.pruned)):
            mean = sum(row[1] * row[column] for row in scores.classes) / scores.count
            assert mean == pytest.approx(whole)


def test_dense_and_pruned_are_timed_alike(saved: Path) -> None:
    threads = torch.get_num_threads()
    times = afterwards.time_both(saved, device="cpu")
    assert torch.get_num_threads() == threads
    assert [times[key] for key in ("device", "batch", "dtype", "threads")] == ["cpu", 1, "float32", 1]
    assert all(times[f"{name}_ms"] > 0 for name in ("dense", "pruned"))


def test_a_recorded_evaluation_gives_the_very_same_numbers(space: Space, saved: Path, cache: Path) -> None:
    recorded = read_document(saved)["result"]
    facts = {"threads": str(torch.get_num_threads()), "precision": "float32, channels last"}
    result = afterwards.evaluate_again(
        space,
        lambda groups: uniform_policy(groups, 0.5, "l2"),
        Fidelity("tune", epochs=2, test=True),
        facts=facts,
        cache=cache,
        note=quiet,
    )
    assert result.identity == recorded["identity"]
    names = [name for name in recorded["metrics"] if not name.startswith("latency")]
    assert {name: result.metrics[name] for name in names} == {name: recorded["metrics"][name] for name in names}
    assert result.model_path is None


def test_an_evaluation_is_repeated_in_the_way_of_pruning_of_its_space(space: Space, cache: Path) -> None:
    masked = space.model_copy(update={"pruning": "unstructured"})
    result = afterwards.evaluate_again(
        masked,
        lambda groups: uniform_policy(groups, 0.5, "l2"),
        Fidelity("screen"),
        facts={"precision": "float32, channels last"},
        cache=cache,
        note=quiet,
    )
    dense = preparing.trace_ingredients(preparing.ingredients_of(space, cache=cache)).cost_model.dense()
    assert result.costs["params"] < dense["params"]
    assert result.costs["activation_bytes"] == dense["activation_bytes"]  # single weights go, no channels


def test_a_served_model_takes_lists_and_doubles_and_refuses_another_shape(saved: Path) -> None:
    served = serving._load_pyfunc(str(saved))
    with torch.no_grad():
        expected = load(saved)(torch.ones(2, 4)).numpy()
    np.testing.assert_allclose(served.predict([[1, 1, 1, 1]] * 2), expected, rtol=1e-6)
    np.testing.assert_allclose(served.predict(np.ones((2, 4))), expected, rtol=1e-6)
    for wrong in (np.zeros(4), np.zeros((2, 5)), np.zeros((2, 4, 1))):
        with pytest.raises(InputError, match=r"expected samples of shape \(N, 4\)"):
            served.predict(wrong)


def test_a_model_that_does_not_say_how_it_is_built_is_neither_served_nor_timed(saved: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "policy.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    document = json.loads((tmp_path / "policy.json").read_text())
    document["origin"] = {"class": "my.Net"}
    (tmp_path / "policy.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="does not say how its dense model is built"):
        serving._load_pyfunc(str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot be timed"):
        afterwards.time_both(tmp_path)
