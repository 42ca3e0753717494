"""Profiles: the stages of a trial beside the passes that it cannot do without."""

import gzip
import itertools
import json
from dataclasses import replace

import pytest
import torch

from autoprune.network import profiling
from autoprune.network.training.evaluation import evaluate
from autoprune.policy import uniform_policy
from autoprune.results import Fidelity

SCREEN, TUNE = Fidelity("screen"), Fidelity("tune", epochs=3)


@pytest.fixture
def ticking(monkeypatch):
    """A clock that goes on by one second each time that it is read: what is timed no longer matters."""
    ticks = itertools.count()
    monkeypatch.setattr(profiling, "clock_of", lambda device: lambda: float(next(ticks)))


def profiled(bench, fidelity, **options):
    return profiling.profile_trial(bench, uniform_policy(bench.groups, 0.5, "l2"), fidelity, **options)


def test_a_screened_trial_is_surgery_repair_and_scoring_and_the_passes_of_two_of_them(bench, ticking):
    found = profiled(bench, SCREEN, repeats=2)
    assert {stage.name: stage.floor for stage in found.stages} == {
        "surgery": 0.0,
        "compensation": 1.0,
        "evaluation": 1.0,
        "other": 0.0,
    }
    assert found.ratio == found.seconds / 2.0
    assert (found.steps, found.whole_steps) == (1, 1)


def test_training_is_cut_to_some_steps_and_scaled_with_its_floor(bench, ticking):
    found = profiled(bench, TUNE, repeats=1, steps=2)
    stage = {stage.name: stage for stage in found.stages}["fine_tuning"]
    assert found.steps == 2
    assert found.whole_steps > 4
    assert stage.seconds == stage.floor == found.whole_steps / 2


def test_measuring_latency_is_its_own_floor(bench, ticking):
    found = profiled(bench, TUNE, repeats=1, steps=1)
    stage = {stage.name: stage for stage in found.stages}["measurement"]
    assert stage.seconds == stage.floor > 0


def test_a_real_clock_gives_times_that_add_up(bench):
    found = profiled(bench, SCREEN, repeats=1)
    assert found.seconds == sum(stage.seconds for stage in found.stages) > 0
    assert all(stage.seconds >= 0 <= stage.floor for stage in found.stages)
    assert found.floor > 0


def test_a_recipe_without_compensation_or_teacher_is_timed_too(bench):
    plain = replace(bench, recipe=replace(bench.recipe, compensation=False, distillation=None))
    found = profiled(replace(plain, knowledge=replace(bench.knowledge, targets=None)), TUNE, repeats=1, steps=1)
    assert {"compensation", "fine_tuning"} <= {stage.name for stage in found.stages}


def test_profiling_leaves_the_dense_network_and_its_mode_alone(bench):
    before = {name: value.clone() for name, value in bench.network.model.state_dict().items()}
    modes = [module.training for module in bench.network.model.modules()]
    score = evaluate(bench.network.model, bench.splits.val)
    profiled(bench, TUNE, repeats=1, steps=2)
    assert all(torch.equal(value, before[name]) for name, value in bench.network.model.state_dict().items())
    assert modes == [module.training for module in bench.network.model.modules()]
    assert evaluate(bench.network.model, bench.splits.val) == score


@pytest.mark.parametrize("options", [{"repeats": 0}, {"steps": 0}], ids=str)
def test_fewer_than_one_repeat_or_step_is_refused(bench, options):
    with pytest.raises(ValueError, match="at least 1"):
        profiled(bench, SCREEN, **options)


def test_a_trace_holds_the_operators_of_a_trial(bench, tmp_path):
    path = tmp_path / "deep" / "trace.json.gz"
    profiling.trace_trial(bench, uniform_policy(bench.groups, 0.5, "l2"), TUNE, path)
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"aten::linalg_cholesky_ex", "aten::convolution"} <= names
    assert any("backward" in str(name).lower() for name in names)
