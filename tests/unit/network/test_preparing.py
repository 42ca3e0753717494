"""From settings to a workbench."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.errors import BudgetError, DataError, InputError
from autoprune.network import preparing
from autoprune.network.criteria.learning import learn
from autoprune.network.devices import formats
from autoprune.network.devices.device import resolve_device
from autoprune.network.devices.precision import Precision
from autoprune.network.devices.probing import Probe
from autoprune.network.preparing import (
    choose_precision,
    ingredients_of,
    model_digest,
    splits_digest,
    trace_ingredients,
    train_baseline,
    workbench_of,
)
from autoprune.network.settings import data_settings, problem_of, recipe_of, searchable_groups
from autoprune.network.training.recipe import Iterative
from autoprune.network.training.regularisation import Regularisation
from autoprune.policy import uniform_policy
from autoprune.results import Fidelity
from autoprune.space import load_space

SPACE = """
schema: 1
name: iris
model: {{name: mlp, arguments: {{in_features: 4, hidden: [12, 8]}}}}
data: {{name: iris}}
budget: {{macs: 0.6}}
{extra}
recipe: {{precision: float32, baseline: {{epochs: 3}}}}
"""


@pytest.fixture
def make_space(tmp_path):
    def make(extra=""):
        path = tmp_path / "space.yaml"
        path.write_text(SPACE.format(extra=extra))
        return load_space(path, env={})

    return make


@pytest.fixture
def iris(make_space, tmp_path):
    return ingredients_of(make_space(), cache=tmp_path / "cache")


def test_a_missing_baseline_is_trained_once_and_read_from_the_cache_afterwards(make_space, tmp_path):
    space, cache, told = make_space(), tmp_path / "cache", []
    first, second = ingredients_of(space, cache=cache), ingredients_of(space, cache=cache)
    assert first.untrained
    untrained = model_digest(first.model)
    train_baseline(space, first, cache=cache, note=told.append)
    assert any("training a baseline" in text for text in told)
    told.clear()
    train_baseline(space, second, cache=cache, note=told.append)
    assert told == []
    assert model_digest(first.model) == model_digest(second.model) != untrained
    assert [p.stride() for p in first.model.parameters()] == [p.stride() for p in second.model.parameters()]
    assert not second.model.training


def test_a_probed_precision_is_told_and_remembered(make_space, iris, tmp_path, monkeypatch):
    recipe, cache, heard = replace(recipe_of(make_space()), precision="auto"), tmp_path / "cache", []
    ask = partial(choose_precision, iris, device="cpu", training=True, cache=cache, note=heard.append)
    first = ask(recipe)
    monkeypatch.setattr(formats, "probe_precision", lambda *_, **__: pytest.fail("probed twice"))
    monkeypatch.setattr(formats, "_doubt", lambda *_, **__: None)
    assert ask(recipe) == first
    assert [line.startswith("number format: ") for line in heard] == [True, True]
    assert [line.endswith("(measured earlier on this kind of processor)") for line in heard] == [False, True]
    heard.clear()
    assert ask(replace(recipe, precision="bfloat16")).autocast_dtype == torch.bfloat16
    assert heard == []


def test_a_number_format_is_probed_again_on_a_processor_of_another_kind(make_space, iris, tmp_path, monkeypatch):
    """A cache that was filled where bfloat16 is fast may lie before a processor that only emulates it."""
    recipe = replace(recipe_of(make_space()), precision="auto")
    half, single = Precision(torch.bfloat16, channels_last=False), Precision(None, channels_last=False)
    found = {"AVX512": half, "AVX2": single}
    now = {"kind": ""}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: now["kind"])
    monkeypatch.setattr(formats, "without_bfloat16", lambda device: None)
    probes = {kind: Probe(precision, {half: 1.0, single: 2.0}, {}) for kind, precision in found.items()}
    monkeypatch.setattr(formats, "probe_precision", lambda *_, **__: probes[now["kind"]])
    for now["kind"], precision in found.items():
        assert choose_precision(iris, recipe, device="cpu", training=False, cache=tmp_path) == precision
    monkeypatch.setattr(formats, "probe_precision", lambda *_, **__: pytest.fail("probed twice"))
    for now["kind"], precision in found.items():
        assert choose_precision(iris, recipe, device="cpu", training=False, cache=tmp_path) == precision


def test_off_the_cpu_a_number_format_is_probed_on_batches_of_the_size_that_will_run(
    make_space, iris, tmp_path, monkeypatch
):
    recipe = replace(recipe_of(make_space()), precision="auto", batch_size=7)
    seen = []
    monkeypatch.setattr(
        formats, "probe_precision", lambda model, example, **_: seen.append(len(example)) or Probe(Precision(), {}, {})
    )
    for device, training in (("meta", True), ("meta", False), ("cpu", True)):
        choose_precision(iris, recipe, device=device, training=training, cache=tmp_path)
    calibration = len(iris.splits.calibration)
    assert seen == [7, min(500, calibration), min(64, calibration)]


def test_quantities_are_evaluated_in_float32_and_the_reason_is_told(make_space, iris, tmp_path):
    recipe, heard = replace(recipe_of(make_space()), precision="auto"), []
    flowers = replace(iris, splits=replace(iris.splits, num_classes=0))
    found = choose_precision(flowers, recipe, device="cpu", training=False, cache=tmp_path, note=heard.append)
    assert found.autocast_dtype is None
    assert heard[0].startswith("number format: float32: the targets are no classes")


def test_preparing_says_once_which_number_format_the_search_has(make_space, iris, tmp_path):
    space, heard = make_space("search: {ladder: [{rung: screen}, {rung: tune, epochs: 1, trials: 2}]}"), []
    space = space.model_copy(update={"recipe": space.recipe.model_copy(update={"precision": "auto"})})
    bench = workbench_of(space, iris, trace_ingredients(iris), cache=tmp_path, models=None, note=heard.append)
    lines = [line for line in heard if line.startswith("number format")]
    assert len(lines) == (1 if bench.precision == bench.training_precision else 2)
    assert all("an evaluation pass" in line or "a training pass" in line or "only emulates" in line for line in lines)


def test_globs_choose_the_groups_and_the_scope_their_criteria(make_space, iris):
    network = trace_ingredients(iris)
    names = [g.name for g in network.groups]
    assert [g.name for g in searchable_groups(network, make_space())] == names
    chosen = searchable_groups(network, make_space(f"groups: {{exclude: ['{names[0]}']}}\ncriteria: {{scope: layer}}"))
    assert [(g.name, g.scope) for g in chosen] == [(names[1], names[1])]


def test_a_glob_that_matches_nothing_is_refused(make_space, iris):
    network = trace_ingredients(iris)
    with pytest.raises(InputError, match=r"'hiden\.\*' matches no pruning group"):
        searchable_groups(network, make_space("groups: {include: ['hiden.*']}"))
    with pytest.raises(InputError, match="leave nothing to prune"):
        searchable_groups(network, make_space("groups: {exclude: ['*']}"))


def test_a_budget_that_no_policy_meets_is_refused(make_space, iris):
    network, space = trace_ingredients(iris), make_space("groups: {max_ratio: 0.1}")
    with pytest.raises(BudgetError, match="the least possible is"):
        problem_of(network, searchable_groups(network, space), space)


def test_a_workbench_is_prepared_once_and_then_read_from_the_cache(make_space, iris, tmp_path):
    space, network, told = make_space(), trace_ingredients(iris), []
    first = workbench_of(space, iris, network, cache=tmp_path / "c", models=None, note=told.append)
    assert any("learning about" in text for text in told)
    told.clear()
    second = workbench_of(space, iris, network, cache=tmp_path / "c", models=None, note=told.append)
    assert told == []
    policy = uniform_policy(first.groups, 0.5, space.criteria.choices[0])
    a, b = (bench.evaluate(policy, Fidelity("screen")).metrics for bench in (first, second))
    assert a == b


def test_a_damaged_cache_is_learnt_anew(make_space, iris, tmp_path):
    space, network, told = make_space(), trace_ingredients(iris), []
    workbench_of(space, iris, network, cache=tmp_path / "c", models=None, note=told.append)
    (path,) = (tmp_path / "c").glob("knowledge-*.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    told.clear()
    workbench_of(space, iris, network, cache=tmp_path / "c", models=None, note=told.append)
    assert any("learning about" in text for text in told)
    assert path.stat().st_size > 50


def test_other_weights_have_other_knowledge(iris, make_space, tmp_path):
    space, network = make_space(), trace_ingredients(iris)
    workbench_of(space, iris, network, cache=tmp_path / "c", models=None, note=lambda text: None)
    with torch.no_grad():
        next(iris.model.parameters()).mul_(1.5)
    workbench_of(space, iris, network, cache=tmp_path / "c", models=None, note=lambda text: None)
    assert len(list((tmp_path / "c").glob("knowledge-*.safetensors"))) == 2


def test_what_is_learnt_covers_every_criterion_and_group(trained, bench):
    knowledge = learn(bench.network, trained.splits.calibration, criteria=["l1", "taylor"], device="cpu", seed=0)
    names = {g.name for g in bench.network.groups}
    assert {name: set(found) for name, found in knowledge.scores.items()} == {"l1": names, "taylor": names}
    assert {name: set(found) for name, found in knowledge.tables.items()} == {n: {"l1", "taylor"} for n in names}
    again = learn(bench.network, trained.splits.calibration, criteria=["l1", "taylor"], device="cpu", seed=0)
    for name in names:
        np.testing.assert_array_equal(knowledge.scores["taylor"][name], again.scores["taylor"][name])
    assert knowledge.tables == again.tables


def test_without_calibration_images_nothing_can_be_learnt(trained, bench):
    class Empty:
        def batches(self, *args, **kwargs):
            return iter(())

        def __len__(self):
            return 0

    bare = replace(trained, splits=replace(trained.splits, calibration=Empty()))
    with pytest.raises(DataError, match="no calibration images"):
        learn(bench.network, bare.splits.calibration, criteria=["l1"], device="cpu", seed=0)


def test_the_digest_of_a_model_follows_values_names_and_shapes():
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    first = model_digest(model)
    assert first == model_digest(model)
    assert model_digest(nn.Sequential(model)) != first
    with torch.no_grad():
        model.bias[0] += 1e-6
    assert model_digest(model) != first


def test_the_digest_of_data_follows_the_samples(trained):
    splits = trained.splits
    assert splits_digest(splits) == splits_digest(splits)
    assert splits_digest(replace(splits, val=splits.test)) != splits_digest(splits)


def test_a_gpu_that_is_missing_is_an_error_and_auto_takes_what_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(InputError, match="device 'cuda:1' was asked for, and 0 CUDA devices are usable"):
        resolve_device("cuda:1")


def test_settings_arrive_under_their_own_names(make_space):
    space = make_space("seed: 7")
    assert data_settings(space).name == "iris"
    assert recipe_of(space).baseline.epochs == 3
    assert recipe_of(space).distillation is not None
    assert preparing._KNOWLEDGE >= 1


def changed(tmp_path, *overrides):
    path = tmp_path / "changed.yaml"
    path.write_text(SPACE.format(extra=""))
    return load_space(path, env={}, overrides=overrides)


def test_stages_and_merging_arrive_under_their_own_names(tmp_path):
    found = recipe_of(
        changed(
            tmp_path,
            "recipe.schedule={steps: 4, share: 0.3}",
            "recipe.regularisation={kind: growing_l2}",
            "recipe.compensation=merge",
        )
    )
    assert found.schedule == Iterative(4, 0.3)
    assert found.regularisation == Regularisation("growing_l2")
    assert found.compensation == "merge"
    assert recipe_of(changed(tmp_path)).staged is False


def test_the_baseline_is_the_same_whatever_stages_follow(tmp_path):
    told = []
    stages = ("recipe.schedule=iterative", "recipe.regularisation={kind: group_lasso}", "recipe.compensation=merge")
    for overrides in ((), stages):
        space = changed(tmp_path, *overrides)
        train_baseline(space, ingredients_of(space, cache=tmp_path), cache=tmp_path, note=told.append)
    assert sum("training a baseline" in text for text in told) == 1


def test_a_regularisation_that_cannot_act_is_refused_before_the_search(iris, tmp_path):
    space = changed(tmp_path, "recipe.regularisation={kind: bn_l1}")
    with pytest.raises(InputError, match="bn_l1 acts on the scales of normalisations"):
        workbench_of(space, iris, trace_ingredients(iris), cache=tmp_path, models=None, note=lambda text: None)
