"""Staged recipes on networks that lose whole blocks and get other activations: every stage works on what is left."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.network.artifacts.saved import load, read_document
from autoprune.network.calibration.moments import gather
from autoprune.network.calibration.targets import gather_targets
from autoprune.network.criteria.learning import learn
from autoprune.network.repair.sequential import refit_sequentially
from autoprune.network.surgery.activations import activation_sites
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.narrowing import narrowed
from autoprune.network.surgery.stand_ins import Absent
from autoprune.network.surgery.twin import relative_error
from autoprune.network.tracing.counting import count_macs, count_params
from autoprune.network.tracing.removable import with_removable
from autoprune.network.tracing.trace import trace
from autoprune.network.training.evaluation import evaluate
from autoprune.network.training.recipe import Iterative, fine_tune
from autoprune.network.training.regularisation import STRENGTHS, Regularisation
from autoprune.network.training.schedule import Ranking, renumbered
from autoprune.policy import Choice, Group, Policy, feasible_widths
from autoprune.results import Fidelity

TUNE = Fidelity("tune", epochs=2)
NONE = np.empty(0, dtype=np.int64)


class Inner(nn.Module):
    """A residual block whose inside may go whole; without a norm its second convolution has a bias."""

    def __init__(self, *, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1, bias=not norm)
        self.bn2 = nn.BatchNorm2d(8) if norm else nn.Identity()

    def forward(self, x):
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def residual():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Inner(norm=True), Inner(norm=False),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


@pytest.fixture(scope="module")
def deep(bench):
    """A workbench for a residual network whose blocks may go and whose activations may be replaced."""
    torch.manual_seed(0)
    model = residual()
    fine_tune(model, bench.splits.train, recipe=replace(bench.recipe, distillation=None), epochs=4, lr=0.1)
    network, _ = with_removable(trace(model.eval(), torch.zeros(2, 2, 6, 6)))
    assert network.removable == {"3.conv1", "4.conv1"}
    groups = tuple(
        Group(g.name, g.size, ((0,) if g.name in network.removable else ()) + feasible_widths(g.size))
        for g in network.groups
    )
    knowledge = learn(network, bench.splits.calibration, criteria=("l2", "obs"), device="cpu", seed=0)
    sites = activation_sites(network)
    return replace(bench, network=network, groups=groups, knowledge=knowledge, activations=sites)


def policy_of(bench, gone, kind="hardswish"):
    choices = {g.name: Choice("l2", 1.0 if g.name in gone else 0.5) for g in bench.groups}
    return Policy(choices, {"model/relu": kind})


STAGED = {
    "one shot, merged": {"compensation": "merge"},
    "iterative": {"schedule": Iterative(3, 0.5)},
    "iterative, uncompensated": {"schedule": Iterative(2, 0.5), "compensation": False},
    "iterative, merged": {"schedule": Iterative(3, 0.5), "compensation": "merge"},
    **{kind: {"regularisation": Regularisation(kind)} for kind in STRENGTHS},
    "both": {"schedule": Iterative(2, 0.4), "regularisation": Regularisation("group_lasso", share=0.2)},
}


@pytest.mark.parametrize("gone", [("3.conv1",), ("3.conv1", "4.conv1")], ids=["one", "both"])
@pytest.mark.parametrize("options", STAGED.values(), ids=STAGED)
def test_a_staged_recipe_removes_whole_blocks_and_replaces_activations(deep, tmp_path, options, gone):
    bench = replace(deep, recipe=replace(deep.recipe, **options), models=tmp_path)
    result = bench.evaluate(policy_of(bench, gone), TUNE)
    assert {name for name, width in result.widths.items() if width == 0} == set(gone)
    assert {"val_accuracy_pruned", "val_accuracy_recalibrated", "val_accuracy_tuned"} <= set(result.metrics)
    assert result.metrics["val_accuracy"] > 0.5
    loaded = load(result.model_path, lambda: copy.deepcopy(bench.network.model))
    assert tuple(name for name, module in loaded.named_modules() if isinstance(module, Absent)) == gone
    assert not any(isinstance(module, nn.ReLU) for module in loaded.modules())
    assert sum(isinstance(module, nn.Hardswish) for module in loaded.modules()) == 3
    assert evaluate(loaded, bench.splits.val).accuracy == result.metrics["val_accuracy"]
    assert count_macs(loaded, bench.network.example_inputs) == result.costs["macs"]
    assert count_params(loaded) == result.costs["params"]
    document = read_document(tmp_path / f"tune-{result.identity}")
    assert set(document["activations"].values()) == {"hardswish"}


def test_in_stages_too_other_activations_are_another_policy(deep):
    staged = replace(deep, recipe=replace(deep.recipe, schedule=Iterative()))
    plain, other = (policy_of(staged, (), kind) for kind in ("relu", "hardswish"))
    assert staged.identity(plain) != staged.identity(other)
    assert staged.identity(plain) == staged.identity(Policy(plain.choices))


def test_a_block_that_an_earlier_cut_emptied_stays_away_in_the_later_ones(deep, output):
    network, x = deep.network, torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    first = {"3.conv1": NONE, "0": np.arange(6)}
    last = {"3.conv1": NONE, "4.conv1": np.array([1, 4]), "0": np.arange(3)}
    once, half = cut(network, last), cut(network, first)
    between = narrowed(network, first, half)
    stay = renumbered(between, first, last)
    assert set(stay) == {"4.conv1", "0"}
    twice = cut(between, stay)
    assert relative_error(output(twice, x), output(once, x)) < 1e-6
    assert between.cost_model.dense() == network.cost_model.costs({k: len(v) for k, v in first.items()})
    targets = gather_targets(between, x, seed=0)
    assert gather(between, [x]).keys() <= {"4.conv1", "4.conv2", "7", "0"}
    refit_sequentially(between, twice, stay, targets)
    assert torch.isfinite(output(twice, x)).all()


def test_a_network_that_lost_every_group_can_still_be_cut(output):
    torch.manual_seed(0)
    x = torch.randn(4, 8, 6, 6)
    network, _ = with_removable(trace(Inner(norm=False).eval(), x))
    assert network.removable == {group.name for group in network.groups} == {"conv1"}
    gone = {"conv1": NONE}
    between = narrowed(network, gone, cut(network, gone))
    assert renumbered(between, gone, gone) == {}
    assert torch.equal(output(cut(between, {}), x), output(between.model, x))


def test_a_removable_group_is_gone_only_in_the_last_of_its_steps(deep):
    names = [group.name for group in deep.groups]
    scores = {name: deep.knowledge.scores["l2"][name] for name in names}
    widths = {name: 0 if name == "3.conv1" else 4 for name in names}
    plan = Ranking(dict.fromkeys(names, "l2"), scores, widths)
    kept = [len(plan.selection(step / 3)["3.conv1"]) for step in (1, 2, 3)]
    assert kept == [4, 2, 0]
