"""Schedules: stages add up to the rung's epochs, cuts are nested and end at the policy, and later cuts are real."""

import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.errors import InputError
from autoprune.network.artifacts.saved import load, read_document
from autoprune.network.calibration.moments import gather
from autoprune.network.models.zoo import LstmClassifier
from autoprune.network.repair.compensation import compensated_tensors
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.narrowing import narrowed
from autoprune.network.surgery.twin import masked_twin, relative_error
from autoprune.network.tracing.counting import count_macs
from autoprune.network.tracing.trace import trace
from autoprune.network.training.evaluation import evaluate
from autoprune.network.training.recipe import History, Iterative, Recipe, Stage, fine_tune
from autoprune.network.training.regularisation import STRENGTHS, Regularisation
from autoprune.network.training.schedule import Ranking, Tools, renumbered, run_schedule
from autoprune.policy import uniform_policy
from autoprune.results import Fidelity

TUNE = Fidelity("tune", epochs=2)


class Block(nn.Module):
    """A stem, a residual block with a depthwise and a grouped convolution, and a flattened head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 12, 1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.back = nn.Conv2d(12, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.back(self.deep(self.norm(self.wide(x)).relu()).relu())
        return self.head(nn.functional.adaptive_avg_pool2d(self.grouped(x).relu(), 2).flatten(1))


class Attending(nn.Module):
    """Heads whose number the module keeps, whose width it computes from its input's, and whose scale follows theirs."""

    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.stem, self.qkv = nn.Linear(4, 16), nn.Linear(16, 48)
        self.proj, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C)
        return self.head((x + self.proj(y)).mean(1))


class Packed(nn.Module):
    """Cross-attention: queries, keys and values are rows of one parameter that are used one by one."""

    def __init__(self):
        super().__init__()
        self.stem, self.attention = nn.Linear(4, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        first = x[:, :2]
        return self.head((first + self.attention(first, x, x, need_weights=False)[0]).mean(1))


def models():
    torch.manual_seed(0)
    return {
        "block": (Block().eval(), torch.randn(2, 3, 6, 6)),
        "attention": (Attending().eval(), torch.randn(2, 5, 4)),
        "packed": (Packed().eval(), torch.randn(2, 5, 4)),
        "lstm": (LstmClassifier(in_features=4, hidden=8, layers=2, num_classes=3).eval(), torch.randn(2, 5, 4)),
    }


def halfway(network, select):
    """A selection, and a smaller one inside it."""
    first = select(network, 0.3)
    rng = np.random.default_rng(1)
    return first, {
        name: np.sort(rng.choice(kept, max(1, len(kept) // 2), replace=False)) for name, kept in first.items()
    }


def narrowed_halfway(network, select):
    """The network after the first of two cuts, and what stays in the second."""
    first, second = halfway(network, select)
    between = narrowed(network, first, cut(network, first))
    return between, renumbered(between, first, second)


@pytest.mark.parametrize("name", ["attention", "block", "lstm", "packed"])
def test_two_cuts_give_the_network_of_one(name, select, output):
    model, x = models()[name]
    network = trace(model, x)
    first, second = halfway(network, select)
    once = cut(network, second)
    half = cut(network, first)
    between = narrowed(network, first, half)
    twice = cut(between, renumbered(between, first, second))
    assert relative_error(output(twice, x), output(once, x)) < 1e-6
    for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)  # queries take the change of their scale twice


@pytest.mark.parametrize("name", ["attention", "block", "lstm", "packed"])
def test_a_narrowed_network_prices_and_describes_the_smaller_model(name, select):
    model, x = models()[name]
    network = trace(model, x)
    first, _ = halfway(network, select)
    between = narrowed(network, first, cut(network, first))
    fresh = trace(between.model, x)
    assert between.cost_model.dense() == network.cost_model.costs({k: len(v) for k, v in first.items()})
    for cost in ("macs", "params", "size_bytes"):
        assert between.cost_model.dense()[cost] == fresh.cost_model.dense()[cost]
    assert [(g.name, g.size, g.offset) for g in between.groups] == [(g.name, g.size, g.offset) for g in fresh.groups]
    assert between.cost_model.dense()["macs"] == count_macs(between.model, (x,))
    for parameter, dims in fresh.index_map.items():
        for dim, units in dims.items():
            assert np.array_equal(between.index_map[parameter][dim], units), (parameter, dim)


@pytest.mark.parametrize("name", ["attention", "block", "lstm", "packed"])
def test_a_narrowed_network_equals_its_masked_twin(name, select, output):
    model, x = models()[name]
    between, stay = narrowed_halfway(trace(model, x), select)
    assert relative_error(output(cut(between, stay), x), output(masked_twin(between, stay), x)) < 1e-5


@pytest.mark.parametrize("name", ["block", "packed"])
def test_compensation_works_on_a_narrowed_network(name, select, output):
    model, x = models()[name]
    between, stay = narrowed_halfway(trace(model, x), select)
    images = torch.randn(64, *x.shape[1:], generator=torch.Generator().manual_seed(3))
    tensors = compensated_tensors(between, stay, gather(between, [images]))
    small = cut(between, stay)
    wanted = output(between.model, images)
    bare = (output(small, images) - wanted).square().mean()
    for weight, refitted in ((small.state_dict()[n], t) for n, t in tensors.items() if t.ndim > 1):
        assert (weight != refitted).flatten(1).any(1).all()  # each row of it, of packed ones too
    small.load_state_dict({**small.state_dict(), **tensors})
    assert (output(small, images) - wanted).square().mean() < bare


# --- the order of stages ------------------------------------------------------------------------------------------


def ranking(network, keep=0.4, criterion="random"):
    rng = np.random.default_rng(0)
    return Ranking(
        {g.name: criterion for g in network.groups},
        {g.name: rng.uniform(size=g.size) for g in network.groups},
        {g.name: max(1, round(g.size * keep)) for g in network.groups},
    )


def told(network, plan, recipe):
    """Runs a schedule without training; returns the stages, the widths of each cut and the outcome."""
    stages, widths, watched, altered = [], [], [], []

    def train(model, stage, number):
        stages.append((number, round(stage.start, 9), round(stage.stop, 9)))
        return History((float(number),), (), (0.1,), 1.0)

    def repair(current, model, selection):
        widths.append({g.name: len(selection.get(g.name, range(g.size))) for g in current.groups})

    outcome = run_schedule(
        network, plan, recipe, Tools(train, repair, lambda step, model: watched.append(step), altered.append)
    )
    assert watched == ["pruned", "recalibrated"]
    assert len(altered) == 1, "later cuts are made from the altered model"
    return stages, widths, outcome


def test_an_iterative_schedule_ends_at_exactly_the_widths_and_channels_of_one_shot():
    model, x = models()["block"]
    network = trace(model, x)
    plan = ranking(network)
    stages, widths, outcome = told(network, plan, Recipe(schedule=Iterative(4, 0.6)))
    assert stages == [(1, 0.0, 0.2), (2, 0.2, 0.4), (3, 0.4, 0.6), (4, 0.6, 1.0)]
    assert widths[-1] == plan.widths
    for before, after in pairwise(widths):
        assert all(before[name] >= after[name] for name in before)
    assert widths[0] != widths[1] != widths[2]
    expected = plan.selection()
    assert {k: v.tolist() for k, v in outcome.selection.items()} == {k: v.tolist() for k, v in expected.items()}
    direct = cut(network, expected).state_dict()
    assert all(torch.equal(value, direct[name]) for name, value in outcome.model.state_dict().items())
    assert outcome.history.train_loss == (1.0, 2.0, 3.0, 4.0)


@pytest.mark.parametrize("done", [0.0, 0.25, 0.5, 0.99])
def test_the_channels_of_an_earlier_cut_hold_those_of_a_later_one(done):
    network = trace(*models()["block"])
    plan = ranking(network)
    earlier, last = plan.selection(done), plan.selection()
    assert all(name not in earlier or set(last[name]) <= set(earlier[name]) for name in last)


def test_the_regularised_stage_comes_first_and_the_shares_add_up():
    network = trace(*models()["block"])
    recipe = Recipe(schedule=Iterative(2, 0.5), regularisation=Regularisation("growing_l2", share=0.2))
    stages, _, _ = told(network, ranking(network), recipe)
    assert stages == [(0, 0.0, 0.2), (1, 0.2, 0.7), (2, 0.7, 1.0)]


@pytest.mark.parametrize(("criterion", "renewed"), [("l2", True), ("random", False)])
def test_channels_are_chosen_anew_after_a_regularised_stage_where_weights_alone_decide(criterion, renewed):
    network = trace(*models()["block"])
    plan = ranking(network, criterion=criterion)
    small = int(plan.selection()["stem"][0])  # one that the plan would keep

    def train(model, stage, number):
        if number == 0:
            with torch.no_grad():
                model.stem.weight[small] *= 1e-6
                model.back.weight[small] *= 1e-6
        return History()

    tools = Tools(train, lambda *_: None, lambda *_: None, lambda model: None)
    outcome = run_schedule(network, plan, Recipe(regularisation=Regularisation("group_lasso")), tools)
    assert (small not in outcome.selection["stem"]) == renewed
    assert {name: len(kept) for name, kept in outcome.selection.items()} == plan.widths


def test_the_stages_of_a_training_take_all_of_its_steps_and_one_learning_rate_curve(trained):
    rates = []
    for stage in (Stage(0.0, 0.3), Stage(0.3, 0.31), Stage(0.31, 1.0)):
        model = copy.deepcopy(trained.model)
        history = fine_tune(model, trained.splits.train, recipe=Recipe(batch_size=32), epochs=2, stage=stage)
        rates.append(history.lr[-1])
    whole = fine_tune(copy.deepcopy(trained.model), trained.splits.train, recipe=Recipe(batch_size=32), epochs=2)
    assert rates[-1] == whole.lr[-1]
    assert rates[0] > rates[1] > rates[2]
    bounds = [Stage(a, b).bounds(7) for a, b in ((0.0, 0.3), (0.3, 0.5), (0.5, 1.0))]
    assert [a for a, _ in bounds[1:]] == [b for _, b in bounds[:-1]]
    assert (bounds[0][0], bounds[-1][1]) == (0, 7)
    assert all(a < b <= 2 for a, b in (Stage(s / 4, (s + 1) / 4).bounds(2) for s in range(4)))


@pytest.mark.parametrize("arguments", [{"steps": 1}, {"share": 0.0}, {"share": 1.0}])
def test_a_schedule_that_means_nothing_is_refused(arguments):
    with pytest.raises(InputError):
        Iterative(**arguments)
    with pytest.raises(InputError, match="no epochs for the rest"):
        Recipe(schedule=Iterative(3, 0.6), regularisation=Regularisation("bn_l1", share=0.4))


# --- in a workbench -----------------------------------------------------------------------------------------------

STAGED = {
    "iterative": {"schedule": Iterative(3, 0.5)},
    "iterative, uncompensated": {"schedule": Iterative(2, 0.5), "compensation": False},
    "iterative, merged": {"schedule": Iterative(3, 0.5), "compensation": "merge"},
    **{kind: {"regularisation": Regularisation(kind)} for kind in STRENGTHS},
    "both": {"schedule": Iterative(2, 0.4), "regularisation": Regularisation("group_lasso", share=0.2)},
}


@pytest.mark.parametrize("options", STAGED.values(), ids=STAGED)
def test_a_staged_recipe_gives_a_network_of_the_policys_widths_that_loads_back(bench, tmp_path, options):
    staged = replace(bench, recipe=replace(bench.recipe, **options), models=tmp_path)
    policy = uniform_policy(bench.groups, 0.5, "l2")
    before = {name: value.clone() for name, value in bench.network.model.state_dict().items()}
    result = staged.evaluate(policy, TUNE)
    assert all(torch.equal(value, before[name]) for name, value in bench.network.model.state_dict().items())
    assert result.widths == {"0": 4, "3": 4}
    assert {"val_accuracy_pruned", "val_accuracy_recalibrated", "val_accuracy_tuned"} <= set(result.metrics)
    assert result.metrics["val_accuracy"] > 0.5
    loaded = load(result.model_path, lambda: copy.deepcopy(bench.network.model))
    assert evaluate(loaded, bench.splits.val).accuracy == result.metrics["val_accuracy"]
    assert count_macs(loaded, bench.network.example_inputs) == result.costs["macs"]
    again = staged.evaluate(policy, TUNE)
    assert again.metrics["val_loss"] == result.metrics["val_loss"]


def test_a_staged_recipe_screens_as_any_other(bench):
    policy = uniform_policy(bench.groups, 0.5, "l2")
    staged = replace(bench, recipe=replace(bench.recipe, schedule=Iterative(), regularisation=Regularisation("bn_l1")))
    assert staged.evaluate(policy, Fidelity("screen")).metrics == bench.evaluate(policy, Fidelity("screen")).metrics


def test_each_seed_runs_all_stages_and_the_first_ones_channels_are_kept(bench, tmp_path):
    recipe = replace(bench.recipe, regularisation=Regularisation("group_lasso"))
    staged = replace(bench, recipe=recipe, models=tmp_path)
    result = staged.evaluate(uniform_policy(bench.groups, 0.5, "l2"), Fidelity("final", epochs=1, seeds=2, test=True))
    assert {"val_accuracy_spread", "test_accuracy"} <= set(result.metrics)
    kept = read_document(tmp_path / f"final-{result.identity}")["kept"]
    assert {name: len(channels) for name, channels in kept.items()} == result.widths


def test_in_stages_the_criteria_belong_to_a_policys_identity(bench):
    names = ("l2", "obs")
    width = bench.groups[0].size
    assert width == 8
    policies = [uniform_policy(bench.groups, 0.0, name) for name in names]
    staged = replace(bench, recipe=replace(bench.recipe, schedule=Iterative()))
    assert len({staged.identity(policy) for policy in policies}) == 1  # nothing goes, so nothing is chosen
    policies = [uniform_policy(bench.groups, 0.5, name) for name in names]
    same = replace(bench.knowledge, scores=dict.fromkeys(names, bench.knowledge.scores["l2"]))
    assert len({replace(bench, knowledge=same).identity(policy) for policy in policies}) == 1
    assert len({replace(staged, knowledge=same).identity(policy) for policy in policies}) == 2
