"""The recipe: schedules, distillation, determinism, and a network that really learns."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoprune.errors import InputError, TrialError
from autoprune.network.data.loading import DataSettings, as_splits, load_data
from autoprune.network.devices.precision import Precision
from autoprune.network.models.building import build_model
from autoprune.network.training.evaluation import evaluate
from autoprune.network.training.recipe import Distillation, Recipe, _distil, _rate, fine_tune

PLAIN = Recipe(batch_size=32, distillation=None, weight_decay=0.0)


def splits(n=400, classes=3):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % classes
    x = torch.randn(n, 6, generator=generator) + 2 * F.one_hot(y, 6)
    return as_splits({"train": (x, y)}, settings=DataSettings(calibration=8))


def mlp(seed=0, classes=3):
    return build_model(name="mlp", arguments={"in_features": 6, "hidden": (16,)}, num_classes=classes, seed=seed)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_lowers_the_loss_and_reports_each_epoch(optimizer):
    data, model = splits(), mlp()
    recipe = Recipe(batch_size=32, optimizer=optimizer, lr=0.02)
    epochs = []
    history = fine_tune(model, data.train, recipe=recipe, epochs=5, val=data.val, on_epoch=epochs.append)
    assert history.train_loss[-1] < 0.7 * history.train_loss[0]
    assert history.val_accuracy[-1] == evaluate(model, data.val).accuracy > 0.7
    assert [e.number for e in epochs] == [1, 2, 3, 4, 5]
    assert tuple(e.train_loss for e in epochs) == history.train_loss
    assert tuple(e.val_accuracy for e in epochs) == history.val_accuracy
    assert model.training


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    data = splits()
    teacher = mlp(9)
    models = [mlp(), mlp(), mlp()]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.manual_seed(seed + 100)
        dropping = nn.Sequential(nn.Dropout(0.2), model)
        fine_tune(dropping, data.train, recipe=Recipe(batch_size=32), epochs=2, teacher=teacher, seed=seed)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_the_global_generator_and_the_teacher_are_left_as_they_were():
    data, teacher = splits(), nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    before, state = copy.deepcopy(teacher), torch.get_rng_state()
    fine_tune(mlp(), data.train, recipe=Recipe(), epochs=1, teacher=teacher)
    assert torch.equal(state, torch.get_rng_state())
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), teacher.state_dict().values(), strict=True)
    )
    assert teacher.training
    assert all(p.grad is None for p in teacher.parameters())


def test_zero_epochs_change_nothing():
    model = mlp()
    assert fine_tune(model, splits().train, recipe=PLAIN, epochs=0).train_loss == ()
    assert same(model, mlp())


def count_steps(train, **arguments):
    model, seen = mlp(), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    history = fine_tune(model, train, **arguments)
    return seen, history


@pytest.mark.parametrize(("epochs", "steps", "entries"), [(1, 8, 1), (0.5, 4, 1), (2.25, 18, 3), (0.01, 1, 1)])
def test_epochs_may_be_fractions_and_partial_batches_are_dropped(epochs, steps, entries):
    data = splits()
    assert len(data.train) // 32 == 8
    assert len(data.train) % 32 != 0
    seen, history = count_steps(data.train, recipe=PLAIN, epochs=epochs)
    assert seen == [32] * steps
    assert len(history.train_loss) == entries


def test_fewer_samples_than_a_batch_are_one_batch():
    data = splits()
    seen, _ = count_steps(data.train, recipe=Recipe(batch_size=4096), epochs=3)
    assert seen == [len(data.train)] * 3


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine():
    rates = [_rate(step, steps=100, warmup=0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001
    assert _rate(0, steps=1, warmup=0.1) > 0
    assert _rate(0, steps=1, warmup=0.0) == 1.0


def test_the_given_rate_replaces_the_recipe_s():
    data = splits()
    _, history = count_steps(data.train, recipe=PLAIN, epochs=1, lr=0.5)
    assert history.lr[0] == pytest.approx(0.5 * _rate(7, steps=8, warmup=0.1))


def test_distillation_is_the_divergence_at_the_temperature():
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    p, q = F.softmax(teacher / 3, 1), F.softmax(student / 3, 1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    assert torch.allclose(_distil(student, teacher, 3.0), expected, atol=1e-5)
    assert _distil(teacher, teacher, 3.0).abs() < 1e-5


def test_a_student_with_full_weight_on_the_teacher_learns_the_teacher_s_answers_not_the_labels():
    data = splits()
    teacher = mlp(5)
    fine_tune(teacher, data.train, recipe=PLAIN, epochs=8, lr=0.1, loss=lambda o, y: F.cross_entropy(o, (y + 1) % 3))
    student = mlp(1)
    recipe = Recipe(batch_size=32, lr=0.05, distillation=Distillation(weight=1.0))
    fine_tune(student, data.train, recipe=recipe, epochs=8, teacher=teacher)
    x, y = next(data.test.batches(1000))
    agreement = (student(x).argmax(1) == teacher(x).argmax(1)).double().mean()
    assert agreement > 0.9
    assert (student(x).argmax(1) == y).double().mean() < 0.2


# Own loss and metric


def r2(output, target):
    return 1 - (output - target).square().sum() / (target - target.mean()).square().sum()


class Regressor(nn.Module):
    """A small perceptron with one answer, of shape `(N,)` or `(N, 1)`."""

    def __init__(self, *, flat, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1))
        self.flat = flat

    def forward(self, x):
        return self.layers(x)[:, 0] if self.flat else self.layers(x)


def measurements(*, flat):
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    y = x[:, 0] - 2 * x[:, 1] + x[:, 2].abs()
    return as_splits({"train": (x, y if flat else y[:, None])}, settings=DataSettings(calibration=16))


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_regression_is_learnt_with_an_own_loss_and_scored_by_an_own_metric(flat, dtype):
    data, model = measurements(flat=flat), Regressor(flat=flat)
    before = evaluate(model, data.val, loss=F.mse_loss, metric=r2).accuracy
    history = fine_tune(
        model,
        data.train,
        recipe=PLAIN,
        epochs=12,
        precision=Precision(dtype),
        val=data.val,
        loss=F.mse_loss,
        metric=r2,
    )
    assert before < 0.2
    assert len(history.val_accuracy) == 12
    assert evaluate(model, data.test, loss=F.mse_loss, metric=r2).accuracy > 0.95


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_usual_rate_suits_an_own_loss_of_any_scale(scale):
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    y = scale * (20 + 3 * x[:, :1] - 2 * x[:, 1:2])
    data = as_splits({"train": (x, y)}, settings=DataSettings(calibration=16))
    dense = Regressor(flat=False)
    optimizer = torch.optim.Adam(dense.parameters(), lr=0.01)
    for _ in range(400):
        optimizer.zero_grad()
        F.mse_loss(dense(x), y).backward()
        optimizer.step()
    model = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.1 * torch.randn(p.shape, generator=generator))
    before = evaluate(model, data.test, loss=F.mse_loss, metric=r2).accuracy
    fine_tune(model, data.train, recipe=Recipe(), epochs=5, teacher=dense, loss=F.mse_loss)
    assert evaluate(model, data.test, loss=F.mse_loss, metric=r2).accuracy > max(0.9, before)


class Segmenter(nn.Module):
    """A small U-Net: one level down and up again by a transposed convolution, with a skip that is concatenated."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.down = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.deep = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
            self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
            self.join = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU())
            self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        skip = self.down(x)
        joined = torch.cat([skip, self.up(self.deep(skip))], 1)
        return {"masks": self.head(self.join(joined))}


def drawings(n=200):
    """Noisy 8x8 pictures of a bright rectangle, and where it is."""
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.randint(0, 4, (n, 2, 1), generator=generator) + shift for shift in (0, 4))
    inside = (torch.arange(8) >= low) & (torch.arange(8) <= high)  # (n, 2, 8)
    mask = (inside[:, 0, :, None] & inside[:, 1, None, :]).long()
    x = mask[:, None].float() + 0.5 * torch.randn(n, 1, 8, 8, generator=generator)
    return as_splits({"train": (x, mask)}, settings=DataSettings(calibration=16))


def pixelwise(output, mask):
    return F.cross_entropy(output["masks"], mask)


def iou(output, mask):
    found = output["masks"].argmax(1)
    return (found & mask).sum() / (found | mask).sum()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_segmentation_is_learnt_with_an_own_loss_and_scored_by_an_own_metric(dtype):
    data, model = drawings(), Segmenter()
    recipe = Recipe(batch_size=32, lr=0.1, distillation=None)
    fine_tune(model, data.train, recipe=recipe, epochs=12, precision=Precision(dtype), loss=pixelwise)
    assert evaluate(model, data.test, loss=pixelwise, metric=iou).accuracy > 0.85


@pytest.mark.parametrize("flat", [True, False])
def test_under_an_own_loss_a_student_learns_the_teacher_s_output_itself(flat):
    data = measurements(flat=flat)
    teacher = Regressor(flat=flat, seed=7)
    fine_tune(teacher, data.train, recipe=PLAIN, epochs=12, loss=lambda o, y: F.mse_loss(o, -y))
    recipe = Recipe(batch_size=32, distillation=Distillation(weight=1.0), weight_decay=0.0)
    student = Regressor(flat=flat)
    fine_tune(student, data.train, recipe=recipe, epochs=12, teacher=teacher, loss=F.mse_loss)
    x, y = next(data.test.batches(1000))
    assert r2(student(x), teacher(x)) > 0.9
    assert r2(student(x), -y) > 0.9


def test_under_an_own_loss_the_weight_mixes_it_with_the_squared_error_to_the_first_output():
    data, teacher = drawings(), Segmenter(3)
    recipe = Recipe(batch_size=32, distillation=Distillation(weight=0.25, temperature=9.0))
    first, second = Segmenter(), Segmenter()
    arguments = {"recipe": recipe, "epochs": 0.01, "loss": pixelwise}
    history = fine_tune(first, data.train, teacher=teacher, **arguments)
    plain = fine_tune(second, data.train, **arguments)
    x, _ = next(data.train.batches(32, shuffle=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        squares = (Segmenter()(x)["masks"] - teacher.eval()(x)["masks"]).square().mean().item()
    assert history.train_loss[0] == pytest.approx(0.25 * squares + 0.75 * plain.train_loss[0], rel=1e-4)


def test_samples_without_classes_are_not_trained_on_without_a_loss_nor_scored_without_a_metric():
    data, model = measurements(flat=True), Regressor(flat=True)
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match="no loss"):
        fine_tune(model, data.train, recipe=PLAIN, epochs=1)
    with pytest.raises(InputError, match="there is no metric"):
        fine_tune(model, data.train, recipe=PLAIN, epochs=1, val=data.val, loss=F.mse_loss)
    with pytest.raises(InputError, match="the loss must be one number"):
        fine_tune(model, data.train, recipe=PLAIN, epochs=1, loss=lambda o, y: (o - y).square())
    assert same(model, before)


class Counting(nn.Module):
    """Passes on what its network returns, as a tensor or in a dict, and counts the samples of each pass."""

    def __init__(self, network, wrap=lambda logits: logits):
        super().__init__()
        self.network, self.wrap, self.passes = network, wrap, []

    def forward(self, x):
        self.passes.append(len(x))
        return self.wrap(self.network(x))


@pytest.mark.parametrize("wrap", [lambda logits: logits, lambda logits: {"logits": logits}])
def test_on_a_cpu_a_teacher_with_large_activations_sees_a_batch_in_pieces(wrap):
    data, recipe = splits(), Recipe(batch_size=32, lr=0.05, distillation=Distillation(weight=1.0))
    found = {}
    for sample_bytes, passes in ((0, {32}), (1 << 30, {8})):
        student, teacher = mlp(), Counting(mlp(4), wrap)
        history = fine_tune(student, data.train, recipe=recipe, epochs=1, teacher=teacher, sample_bytes=sample_bytes)
        assert set(teacher.passes) == passes
        found[sample_bytes] = (history.train_loss[0], torch.cat([p.flatten() for p in student.parameters()]))
    (first, whole), (second, pieces) = found.values()
    assert first == pytest.approx(second, rel=1e-5)
    assert torch.allclose(whole, pieces, atol=1e-5)
    assert not torch.allclose(pieces, torch.cat([p.flatten() for p in mlp().parameters()]), atol=1e-3)


def test_under_an_own_loss_a_teacher_sees_the_whole_batch():
    data, teacher = measurements(flat=True), Counting(Regressor(flat=True, seed=7))
    recipe = Recipe(batch_size=32, distillation=Distillation(weight=1.0))
    arguments = {"epochs": 1, "loss": F.mse_loss, "sample_bytes": 1 << 30}
    fine_tune(Regressor(flat=True), data.train, recipe=recipe, teacher=teacher, **arguments)
    assert set(teacher.passes) == {32}


def test_without_distillation_in_the_recipe_a_teacher_does_not_matter():
    data, first, second = splits(), mlp(), mlp()
    fine_tune(first, data.train, recipe=PLAIN, epochs=1, teacher=mlp(4))
    fine_tune(second, data.train, recipe=PLAIN, epochs=1)
    assert same(first, second)


def test_weight_decay_spares_biases_and_normalisations():
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    before = copy.deepcopy(model)
    recipe = Recipe(batch_size=32, weight_decay=0.5, warmup=0.0, momentum=0.0, distillation=None)
    fine_tune(model, splits().train, recipe=recipe, epochs=0.01, lr=0.1, loss=lambda o, y: o.sum() * 0)
    assert torch.allclose(model[0].weight, before[0].weight * 0.95)
    assert torch.equal(model[0].bias, before[0].bias)
    assert torch.equal(model[1].weight, before[1].weight)


def test_label_smoothing_raises_the_least_loss():
    data = splits()
    plain, smooth = (
        fine_tune(mlp(), data.train, recipe=Recipe(batch_size=32, distillation=None, label_smoothing=s), epochs=8)
        for s in (0.0, 0.4)
    )
    assert smooth.train_loss[-1] > plain.train_loss[-1] + 0.2


def test_frozen_parameters_stay():
    model = mlp()
    model.head.requires_grad_(False)
    fine_tune(model, splits().train, recipe=PLAIN, epochs=1)
    assert torch.equal(model.head.weight, mlp().head.weight)
    assert not torch.equal(model.hidden[0].weight, mlp().hidden[0].weight)


def test_a_loss_that_diverges_fails_the_trial_and_names_the_epoch():
    with pytest.raises(TrialError, match=r"became (nan|inf|-inf) in epoch \d of 3"):
        fine_tune(mlp(), splits().train, recipe=PLAIN, epochs=3, lr=1e30)


def test_an_error_raised_by_on_epoch_ends_the_training():
    def stop(epoch):
        raise KeyboardInterrupt

    model = mlp().eval()
    with pytest.raises(KeyboardInterrupt):
        fine_tune(model, splits().train, recipe=PLAIN, epochs=3, on_epoch=stop)
    assert not model.training


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="epochs must not be negative, got -1"):
        fine_tune(mlp(), splits().train, recipe=PLAIN, epochs=-1)
    one = copy.copy(splits().train)
    object.__setattr__(one, "index", one.index[:1])
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        fine_tune(mlp(), one, recipe=PLAIN, epochs=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "sdg"}, "did you mean 'sgd'"),
        ({"precision": "bf16"}, "bfloat16"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive, got 0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1"),
        ({"warmup": -0.1}, "warmup"),
        ({"ridge": -1.0}, "ridge must not be negative, got -1"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Recipe(**fields)


@pytest.mark.parametrize(("fields", "message"), [({"temperature": 0}, "temperature"), ({"weight": 1.5}, "weight")])
def test_a_distillation_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Distillation(**fields)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_resnet_learns_the_digits_within_a_few_epochs(dtype):
    data = load_data(DataSettings(name="digits", calibration=200), seed=0, cache_dir=Path("unused"))
    model = build_model(name="resnet20", arguments={"in_channels": 1}, num_classes=data.num_classes)
    precision = Precision(dtype, channels_last=True)
    history = fine_tune(model, data.train, recipe=Recipe(), epochs=4, lr=0.1, precision=precision)
    assert all(math.isfinite(value) for value in history.train_loss)
    assert evaluate(model, data.val).accuracy > 0.9
