"""The workbench: from a policy to a result, the same every time."""

import copy
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from autoprune.errors import PolicyError, TrialError
from autoprune.network.artifacts.saved import load, read_document
from autoprune.network.calibration.targets import DEEP_ROWS, ROWS
from autoprune.network.repairs import repair_images
from autoprune.network.tracing.counting import count_macs, count_params
from autoprune.network.training.evaluation import evaluate
from autoprune.policy import Choice, Policy, uniform_policy
from autoprune.results import Fidelity, TrialResult

SCREEN, TUNE = Fidelity("screen"), Fidelity("tune", epochs=1)


def test_a_screened_policy_reports_what_it_costs_and_how_it_scores(bench):
    policy = uniform_policy(bench.groups, 0.5, "l2")
    result = bench.evaluate(policy, SCREEN)
    small = bench.repair(bench.selection(policy))
    assert result.widths == {"0": 4, "3": 4}
    assert result.costs["macs"] == count_macs(small, bench.network.example_inputs)
    assert result.costs["params"] == count_params(small)
    assert result.metrics["val_accuracy"] == result.metrics["val_accuracy_recalibrated"]
    assert result.metrics["val_accuracy"] == evaluate(small, bench.splits.val).accuracy
    assert not any(name.startswith("test_") or name.startswith("latency") for name in result.metrics)
    assert result.model_path is None


def test_the_same_policy_gives_the_same_numbers_twice(bench):
    policy = uniform_policy(bench.groups, 0.5, "obs")
    first, second = bench.evaluate(policy, TUNE), bench.evaluate(policy, TUNE)
    timeless = [{k: v for k, v in r.metrics.items() if not k.startswith("latency")} for r in (first, second)]
    assert timeless[0] == timeless[1]
    assert first.curves == second.curves
    assert first.identity == second.identity


def test_evaluations_leave_the_dense_network_alone(bench):
    before = {name: value.clone() for name, value in bench.network.model.state_dict().items()}
    bench.evaluate(uniform_policy(bench.groups, 0.5, "l2"), TUNE)
    assert all(torch.equal(value, before[name]) for name, value in bench.network.model.state_dict().items())


def test_policies_that_keep_the_same_channels_share_an_identity_whatever_chose_them(bench):
    whole = [uniform_policy(bench.groups, 0.0, name) for name in ("l2", "random")]
    assert bench.identity(whole[0]) == bench.identity(whole[1])
    rounded = [Policy({g.name: Choice("l2", ratio) for g in bench.groups}) for ratio in (0.5, 0.51)]
    assert rounded[0].id != rounded[1].id
    assert bench.identity(rounded[0]) == bench.identity(rounded[1])
    halves = {bench.identity(uniform_policy(bench.groups, 0.5, name)) for name in ("l2", "random")}
    assert len(halves) == 2


def test_each_group_keeps_the_channels_with_the_highest_scores_of_its_own_criterion(bench):
    policy = Policy({"0": Choice("random", 0.5), "3": Choice("l2", 0.25)})
    selection = bench.selection(policy)
    for name, criterion, width in (("0", "random", 4), ("3", "l2", 6)):
        scores = bench.knowledge.scores[criterion][name]
        assert set(selection[name]) == set(np.argsort(-scores)[:width])
    assert bench.selection(uniform_policy(bench.groups, 0.0, "l2")) == {}


def test_a_fine_tuned_policy_reports_every_step_by_its_own_name(bench):
    result = bench.evaluate(uniform_policy(bench.groups, 0.75, "random"), TUNE)
    steps = ("val_accuracy_pruned", "val_accuracy_recalibrated", "val_accuracy_tuned")
    assert set(steps) <= set(result.metrics)
    assert result.metrics["val_accuracy"] == result.metrics["val_accuracy_tuned"]
    assert result.metrics["latency_ms"] > 0
    assert len(result.curves["train_loss"]) == 1
    assert {"surgery", "compensation", "fine_tuning", "evaluation"} <= set(result.seconds)


def test_compensation_beats_doing_nothing_on_a_trained_network(bench):
    policy = uniform_policy(bench.groups, 0.75, "random")
    metrics = bench.evaluate(policy, TUNE).metrics
    assert metrics["val_accuracy_recalibrated"] > metrics["val_accuracy_pruned"] + 0.1
    none = replace(bench, recipe=replace(bench.recipe, compensation=False, recalibration_batches=0))
    plain = none.evaluate(policy, SCREEN).metrics["val_accuracy"]
    assert plain == metrics["val_accuracy_pruned"]
    cached = replace(bench, knowledge=replace(bench.knowledge, targets=None))
    for repairing in (bench, cached):
        loss = repairing.evaluate(policy, SCREEN).metrics["val_loss"]
        assert loss < none.evaluate(policy, SCREEN).metrics["val_loss"]


def test_the_test_set_is_scored_only_where_the_fidelity_says_so(bench):
    policy = uniform_policy(bench.groups, 0.5, "l2")
    result = bench.evaluate(policy, Fidelity("final", epochs=1, seeds=2, test=True))
    assert 0 <= result.metrics["test_accuracy"] <= 1
    assert result.metrics["val_accuracy_spread"] >= 0
    assert bench.evaluate(policy, Fidelity("screen", test=True)).metrics["test_accuracy"] >= 0
    assert "test_accuracy" in bench.dense_result(Fidelity("final", test=True))
    assert "test_accuracy" not in bench.dense_result(SCREEN)


def test_fewer_images_may_be_asked_for(bench):
    policy = uniform_policy(bench.groups, 0.75, "random")
    accuracy = bench.evaluate(policy, Fidelity("screen", images=8)).metrics["val_accuracy"]
    assert (accuracy * 8) == round(accuracy * 8)


def test_results_survive_json(bench):
    result = bench.evaluate(uniform_policy(bench.groups, 0.5, "l2"), TUNE)
    text = json.dumps(result.to_json(), allow_nan=False)
    again = TrialResult.from_json(json.loads(text))
    assert again == result


def test_a_finished_model_is_kept_where_there_is_a_folder_for_it(bench, tmp_path, output):
    keeping = replace(bench, models=tmp_path / "models")
    policy = uniform_policy(bench.groups, 0.5, "l2")
    assert keeping.evaluate(policy, SCREEN).model_path is None
    result = keeping.evaluate(policy, TUNE)
    assert Policy.from_json(read_document(tmp_path / "models" / f"tune-{result.identity}")["policy"]) == policy
    loaded = load(result.model_path, lambda: copy.deepcopy(bench.network.model))
    assert evaluate(loaded, bench.splits.val).accuracy == result.metrics["val_accuracy"]


def test_a_score_that_is_not_finite_fails_the_trial(bench):
    broken = replace(bench, metric=lambda output, target: float("nan"))
    with pytest.raises(TrialError, match="validation metric is nan"):
        broken.evaluate(uniform_policy(bench.groups, 0.5, "l2"), SCREEN)


def test_training_that_diverges_fails_the_trial(bench):
    hot = replace(bench, recipe=replace(bench.recipe, lr=1e30, warmup=0.0))
    with pytest.raises(TrialError):
        hot.evaluate(uniform_policy(bench.groups, 0.5, "l2"), Fidelity("tune", epochs=2))


def test_a_policy_for_other_groups_is_refused(bench):
    with pytest.raises(PolicyError, match="no pruning group 'conv'"):
        bench.evaluate(Policy({"conv": Choice("l2", 0.5)}), SCREEN)


def test_a_workbench_travels_to_a_worker_and_finds_the_same_there(bench):
    policy = uniform_policy(bench.groups, 0.5, "obs")
    twin = pickle.loads(pickle.dumps(bench))
    assert twin.evaluate(policy, SCREEN).metrics == bench.evaluate(policy, SCREEN).metrics


def test_another_seed_draws_other_batches_and_repairs_alike(bench):
    policy = uniform_policy(bench.groups, 0.5, "l2")
    losses = [replace(bench, seed=seed).evaluate(policy, SCREEN).metrics["val_loss"] for seed in (0, 1, 7)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[2] == pytest.approx(losses[0], rel=0.05)


def test_a_rung_may_repair_on_more_images_than_are_set_aside_for_calibration(bench):
    chosen = uniform_policy(bench.groups, 0.5, "l2")
    plain = bench.evaluate(chosen, Fidelity("screen"))
    same = bench.evaluate(chosen, Fidelity("screen", calibration=64))
    more = bench.evaluate(chosen, Fidelity("final", calibration=256))
    assert same.metrics == plain.metrics
    assert more.identity == plain.identity
    assert more.metrics["val_loss"] != plain.metrics["val_loss"]
    assert len(bench.deeper[256].images) == 256
    assert bench.deeper[256].rows == 4 * DEEP_ROWS
    assert bench.knowledge.targets.rows == ROWS < DEEP_ROWS
    again = bench.evaluate(chosen, Fidelity("final", calibration=256))
    assert again.metrics == more.metrics


def test_a_repair_takes_every_training_image_where_it_asks_for_more_than_there_are(bench):
    images = repair_images(bench.splits, 10**6, seed=0, device="cpu")
    assert len(images) == len(bench.splits.calibration) + len(bench.splits.train)
    few = repair_images(bench.splits, 10, seed=0, device="cpu")
    torch.testing.assert_close(few, images[:10])
