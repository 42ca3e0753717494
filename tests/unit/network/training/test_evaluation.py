"""Scores, recalibration, latency and the choice of a number format."""

import copy
import math
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from autoprune.errors import InputError
from autoprune.network.data.loading import DataSettings, as_splits
from autoprune.network.data.tasks import check_output, check_task, first_tensor, logits_of, widened
from autoprune.network.devices.precision import Precision
from autoprune.network.graph.modules import mode
from autoprune.network.models.building import build_model
from autoprune.network.repair.batch_norms import recalibrate
from autoprune.network.training import evaluation
from autoprune.network.training.evaluation import evaluate, samples_at_once


def split(n=200, classes=4, shape=(1, 6, 6)):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((n, *shape), generator=generator)
    y = torch.arange(n) % classes
    return as_splits({"train": (x, y)}, settings=DataSettings(calibration=8)).train


def everything(data):
    batches = list(data.batches(1000))
    return batches[0]


class Constant(nn.Module):
    """Always answers with the same class."""

    def __init__(self, answer, classes=4, value=5.0):
        super().__init__()
        self.register_buffer("logits", nn.functional.one_hot(torch.tensor(answer), classes).float() * value)

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def test_accuracy_loss_and_per_class_agree_with_the_whole_set_at_once():
    data = split()
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Dropout(0.5))
    x, y = everything(data)
    logits = model.eval()(x)
    model.train()
    score = evaluate(model, data, batch_size=17)
    assert score.count == len(data)
    assert score.accuracy == pytest.approx((logits.argmax(1) == y).double().mean().item())
    assert score.loss == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-5)
    for label in range(4):
        assert score.per_class[label] == pytest.approx((logits.argmax(1) == y)[y == label].double().mean().item())


@pytest.mark.parametrize(
    ("threads", "sample_bytes", "most"),
    [
        (1, 0, 64),  # not known
        (1, 200_000, 64),  # ResNet-20 at 32 px
        (1, 1_361_664, 24),
        (1, 9_633_792, 8),  # ResNet-50 at 224 px
        (4, 9_633_792, 13),
        (4, 0, 256),
        (64, 0, 500),
    ],
)
def test_on_a_cpu_so_many_samples_are_scored_at_once_as_stay_near(threads, sample_bytes, most, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert samples_at_once("cpu", None, sample_bytes) == most
    assert samples_at_once("cuda", None, sample_bytes) == 500
    assert samples_at_once("cpu", lambda output, y: 0.0, sample_bytes) == 500


def test_a_constant_answer_is_right_for_its_class_alone():
    score = evaluate(Constant(2), split())
    assert score.per_class == (0.0, 0.0, 1.0, 0.0)
    assert score.accuracy == pytest.approx(0.25, abs=0.01)


def test_limit_scores_the_first_samples_and_absent_classes_are_nan():
    score = evaluate(Constant(1), split(), limit=2)
    assert score.count == 2
    assert sum(math.isnan(value) for value in score.per_class) == 2
    with pytest.raises(ValueError, match="no sample to score"):
        evaluate(Constant(1), split(), limit=0)


def test_a_loss_that_is_not_a_number_stays_one():
    assert math.isnan(evaluate(Constant(1, value=float("nan")), split()).loss)


def test_own_loss_and_metric_are_averaged_over_the_samples():
    seen = []

    def metric(output, target):
        seen.append(len(target))
        return float(len(target))

    score = evaluate(Constant(0), split(100), batch_size=40, loss=lambda o, t: o.sum(1).mean() * 0 + 3, metric=metric)
    assert score.loss == pytest.approx(3)
    assert score.accuracy == pytest.approx(sum(n * n for n in seen) / sum(seen))
    assert score.per_class == ()


# Tasks without classes


def r2(output, target):
    return 1 - (output - target).square().sum() / (target - target.mean()).square().sum()


def measured(n=101):
    x = torch.rand(n, 3, generator=torch.Generator().manual_seed(1))
    return as_splits({"train": (x, 500 + 10 * x.sum(1, keepdim=True))}, settings=DataSettings(calibration=8)).train


class Sum(nn.Module):
    """Gives the true answer but for `bias`, wrapped as the test wants it."""

    def __init__(self, bias=0.0, wrap=lambda answer: answer):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        nn.init.constant_(self.layer.weight, 10.0)
        nn.init.constant_(self.layer.bias, 500 + bias)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.layer(x))


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_an_own_metric_may_have_any_range(scale):
    def closeness(output, target):
        return -scale * (output - target).square().mean()

    score = evaluate(Sum(bias=3.0), measured(), loss=nn.functional.mse_loss, metric=closeness)
    assert score.accuracy == pytest.approx(-9 * scale, rel=1e-3)
    assert score.loss == pytest.approx(9, rel=1e-3)
    assert score.per_class == ()


Pair = namedtuple("Pair", ["answer", "extra"])


@pytest.mark.parametrize(
    ("wrap", "take"),
    [
        (lambda answer: answer, lambda output: output),
        (lambda answer: (answer, None), lambda output: output[0]),
        (lambda answer: {"answer": answer, "text": "none"}, lambda output: output["answer"]),
        (lambda answer: Pair(answer, {"aux": [answer]}), lambda output: output.extra["aux"][0]),
    ],
    ids=["tensor", "tuple", "dict", "named tuple"],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_own_functions_get_whatever_the_network_returns_in_float32(wrap, take, dtype):
    kinds = set()

    def loss(output, target):
        kinds.add(take(output).dtype)
        return nn.functional.mse_loss(take(output), target)

    def metric(output, target):
        kinds.add(take(output).dtype)
        return r2(take(output), target)

    score = evaluate(Sum(wrap=wrap), measured(), autocast_dtype=dtype, loss=loss, metric=metric)
    assert kinds == {torch.float32}
    assert score.accuracy == pytest.approx(1, abs=1e-4 if dtype is None else 0.2)


def auc(output, target):
    """Area under the curve of one logit: no mean of parts."""
    order = output.flatten().argsort()
    ranks = torch.empty(len(order)).index_put_((order,), torch.arange(1.0, len(order) + 1))
    positive = target.flatten() > 0
    return (ranks[positive].mean() - (positive.sum() + 1) / 2) / (~positive).sum()


def test_an_own_metric_is_computed_once_from_all_samples():
    x, y = torch.randn(90, 4), (torch.arange(90) % 9 == 0).float()[:, None]
    data = as_splits({"train": (x, y), "val": (x, y), "test": (x, y)}, settings=DataSettings(calibration=8)).val
    model = nn.Linear(4, 1)
    score = evaluate(model, data, batch_size=7, loss=nn.functional.mse_loss, metric=auc)
    whole, targets = everything(data)
    assert score.whole
    assert score.accuracy == pytest.approx(float(auc(model(whole).detach(), targets)), abs=1e-6)


def test_outputs_of_any_form_reach_an_own_metric_whole():
    class Several(nn.Module):
        def forward(self, x):
            return {"sum": x.sum(1), "both": (x, [x.amax(1), None]), "name": "several"}

    seen = []

    def metric(output, target):
        seen.append((len(target), len(output["sum"]), len(output["both"][1][0]), output["name"]))
        return r2(output["sum"], target)

    evaluate(Several(), measured(), batch_size=9, loss=lambda o, t: o["sum"].mean(), metric=metric)
    assert seen == [(len(measured()),) * 3 + ("several",)]


class PerBatch(nn.Module):
    """Gives one number a batch beside its outputs, which joins with no other."""

    def forward(self, x):
        return Sum()(x), x.sum()


def test_outputs_that_do_not_join_are_scored_batch_by_batch_and_that_is_said():
    data, sizes = measured(), []

    def metric(output, target):
        sizes.append(len(target))
        return r2(output[0], target)

    score = evaluate(PerBatch(), data, batch_size=20, limit=21, loss=lambda o, t: o[1] * 0, metric=metric)
    assert sizes == [11, 10]  # no batch is much smaller than another
    assert not score.whole
    assert score.accuracy == pytest.approx(1, abs=1e-4)


def test_outputs_that_are_too_large_to_hold_are_scored_batch_by_batch(monkeypatch):
    monkeypatch.setattr(evaluation, "WHOLE_BYTES", 50)
    data, sizes = measured(), []

    def metric(output, target):
        sizes.append(len(target))
        return r2(output, target)

    score = evaluate(Sum(), data, batch_size=len(data) - 1, loss=nn.functional.mse_loss, metric=metric)
    assert sum(sizes) == len(data) == score.count
    assert max(sizes) - min(sizes) <= 1
    assert not score.whole
    assert score.accuracy == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "no loss and no metric"),
        ({"loss": nn.functional.mse_loss}, "there is no metric"),
        ({"metric": r2}, "there is no loss"),
    ],
    ids=["neither", "loss alone", "metric alone"],
)
def test_without_classes_both_a_loss_and_a_metric_are_asked_for(given, words):
    data = measured()
    with pytest.raises(InputError, match=words):
        check_task(data, **{"loss": None, "metric": None, **given})
    with pytest.raises(InputError, match=words):
        evaluate(Sum(), data, **given)
    check_task(data, loss=nn.functional.mse_loss, metric=r2)
    check_task(split(), loss=None, metric=None)


def test_own_functions_that_do_not_give_one_number_are_refused():
    with pytest.raises(InputError, match=r"the loss must be one number a batch.*\(\d+, 1\)"):
        evaluate(Sum(), measured(111), loss=lambda o, t: (o - t).square(), metric=r2)
    with pytest.raises(InputError, match="the metric must be one number, not a tensor"):
        evaluate(Sum(), measured(), loss=nn.functional.mse_loss, metric=lambda o, t: (o - t).abs())


def test_the_first_tensor_is_found_in_tuples_and_dicts_however_deep():
    value, whole = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    named = type("Output", (), {"logits": value})()
    nested = OrderedDict(count=whole, maps=[None, (whole, value)], later=torch.ones(3))
    for output in (value, (value, None), named, {"b": torch.ones(1), "logits": value}, nested):
        assert first_tensor(output) is value
    with pytest.raises(TypeError, match="no tensor of real numbers"):
        first_tensor({"count": whole})


def test_widening_leaves_what_is_no_real_number_and_the_given_output_alone():
    half, whole = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.int64)
    output = {"a": half, "b": Pair(whole, [half, "text"])}
    wide = widened(output)
    assert wide["a"].dtype == wide["b"].extra[0].dtype == torch.float32
    assert isinstance(wide["b"], Pair)
    assert wide["b"].answer is whole
    assert wide["b"].extra[1] == "text"
    assert output["a"] is half


def test_evaluation_changes_neither_modes_nor_statistics():
    model = build_model(name="resnet20", arguments={"in_channels": 1}, num_classes=4)
    model.layer1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, split())
    assert model.training
    assert not model.layer1.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bfloat16_gives_nearly_the_same_score():
    model = build_model(name="resnet20", arguments={"in_channels": 1}, num_classes=4)
    recalibrate(model, split())
    plain, half = (evaluate(model, split(), autocast_dtype=dtype) for dtype in (None, torch.bfloat16))
    assert half.loss == pytest.approx(plain.loss, rel=0.02)
    assert half.loss != plain.loss


def test_logits_are_found_in_tensors_tuples_and_named_outputs():
    value = torch.zeros(1, 2)
    named = type("Output", (), {"logits": value})()
    assert all(logits_of(output) is value for output in (value, (value, None), named, {"logits": value}))
    with pytest.raises(TypeError, match="dict"):
        logits_of({"a": value})


def test_mode_is_restored_module_by_module_even_after_an_error():
    model = nn.Sequential(nn.Linear(1, 1).eval(), nn.Linear(1, 1))
    seen = []

    def fail():
        with mode(model, training=False):
            seen.append(model[1].training)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert seen == [False]
    assert [m.training for m in model] == [False, True]


def test_recalibration_is_the_exact_average_of_the_batches():
    norm = nn.BatchNorm2d(1)
    nn.init.constant_(norm.running_mean, 50.0)
    data = split(200)
    recalibrate(norm, data, batches=1, batch_size=1000)
    x, _ = everything(data)
    assert norm.running_mean.item() == pytest.approx(x.mean().item(), rel=1e-5)
    assert norm.running_var.item() == pytest.approx(x.var().item(), rel=1e-4)
    recalibrate(norm, data, batches=3, batch_size=32, seed=4)
    order = torch.Generator().manual_seed(4)
    taken = [x for x, _ in data.batches(32, shuffle=order)][:3]
    assert norm.running_mean.item() == pytest.approx(torch.stack([x.mean() for x in taken]).mean().item(), rel=1e-5)
    assert norm.num_batches_tracked.item() == 3


def test_a_norm_that_is_called_twice_in_a_pass_averages_all_of_its_calls():
    """As it does with a momentum of None, which would read its number of calls back from a GPU each time."""
    norm = nn.BatchNorm2d(1)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(self.norm(x) + 1.0)

    plain = copy.deepcopy(model := Twice())
    recalibrate(model, split(), batches=2, batch_size=32, seed=4)
    plain.norm.reset_running_stats()
    plain.norm.momentum = None
    order = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for number, (x, _) in enumerate(split().batches(32, shuffle=order)):
            if number < 2:
                plain(x)
    assert torch.equal(norm.running_mean, plain.norm.running_mean)
    assert torch.equal(norm.running_var, plain.norm.running_var)
    assert int(norm.num_batches_tracked) == 4
    assert not norm._forward_pre_hooks


def test_recalibration_leaves_weights_modes_momentum_and_gradients_alone():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, momentum=0.3), nn.Dropout(0.9), nn.BatchNorm2d(2))
    model[3].eval()
    weight = model[0].weight.clone()
    recalibrate(model, split())
    assert torch.equal(model[0].weight, weight)
    assert [m.training for m in model] == [True, True, True, False]
    assert model[1].momentum == 0.3
    assert all(p.grad is None for p in model.parameters())
    assert model[3].running_var.mean() < 1.5  # dropout was off: it would have made it ten times as large


def test_recalibration_leaves_a_partial_last_batch_out_and_a_network_without_batchnorm_alone():
    norm = nn.BatchNorm2d(1)
    data = split(200)
    recalibrate(norm, data, batches=100, batch_size=len(data) - 1)
    assert norm.num_batches_tracked.item() == 1
    model = nn.Linear(2, 2)
    recalibrate(model, split(shape=(2,)))
    frozen = nn.BatchNorm2d(1, track_running_stats=False)
    recalibrate(frozen, split())
    assert model.training
    assert frozen.running_mean is None


def test_a_precision_arranges_images_and_weights_and_keeps_their_values():
    model = nn.Conv2d(3, 4, 3)
    weight = model.weight.detach().clone()
    for precision in (Precision(None, channels_last=True), Precision(None, channels_last=False)):
        precision.arrange_model(model)
        memory = torch.channels_last if precision.channels_last else torch.contiguous_format
        assert model.weight.is_contiguous(memory_format=memory)
        assert torch.equal(model.weight, weight)
        assert precision.arrange(torch.rand(2, 3, 4, 4)).is_contiguous(memory_format=memory)
    for other in (torch.rand(2, 3), torch.ones((2, 3, 4, 4), dtype=torch.int64)):
        assert Precision().arrange(other) is other


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (torch.zeros(2, 1), "gives 1 numbers a sample, but the data has 2 classes: let it give two logits"),
        (torch.zeros(2, 5), "gives 5 numbers a sample.*let it give 2 logits a sample, or give both a `loss`"),
        ((torch.zeros(2, 4), torch.zeros(2, 2)), "4 numbers a sample, the first of its outputs,.*return the logits"),
        (torch.zeros(2, 2, 8, 8), r"output has the shape \(2, 2, 8, 8\), but the data has 2 classes"),
        ("nothing", "the network returned str, in which there are no logits: return them as a tensor"),
    ],
    ids=["one logit", "other classes", "boxes first", "maps", "text"],
)
def test_an_output_that_is_no_score_for_each_class_is_refused_in_words(output, words):
    with pytest.raises(InputError, match=words):
        check_output(output, 2, loss=None, metric=None)
    with pytest.raises(InputError, match=words):
        check_output(output, 2, loss=None, metric=r2)
    check_output(output, 2, loss=nn.functional.mse_loss, metric=r2)
    check_output(output, 0, loss=nn.functional.mse_loss, metric=r2)


def test_logits_by_name_or_first_of_several_outputs_are_accepted():
    for output in (torch.zeros(2, 2), {"logits": torch.zeros(2, 2)}, (torch.zeros(2, 2), torch.zeros(2, 7))):
        check_output(output, 2, loss=None, metric=None)
