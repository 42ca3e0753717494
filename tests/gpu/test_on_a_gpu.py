"""What only a GPU can show: captured steps, their fallback, equal scores, a whole search, sparse kernels.

These tests have not been run yet: they were written on a machine without a GPU. `pytest tests/gpu -m slow` runs them.
"""

import copy
import gc
from dataclasses import replace

import pytest
import torch
from torch import nn

import autoprune
from autoprune.errors import InputError
from autoprune.network.artifacts.sparse import to_semi_structured
from autoprune.network.data.loading import DataSettings, as_splits
from autoprune.network.data.samples import Transform
from autoprune.network.devices.precision import Precision
from autoprune.network.devices.replay import WARM_UP
from autoprune.network.models.building import build_model
from autoprune.network.repair.batch_norms import recalibrate
from autoprune.network.training.evaluation import evaluate
from autoprune.network.training.recipe import Distillation, Recipe, fine_tune

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]
RECIPE = Recipe(batch_size=64, distillation=None, lr=0.05)
FLOAT32 = Precision(None)


def splits(count=2048):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 4
    patterns = torch.randint(0, 256, (4, 3, 16, 16), generator=generator)
    noise = torch.randint(0, 256, (count, 3, 16, 16), generator=generator)
    images = ((patterns[y] + noise) // 2).to(torch.uint8)
    return as_splits({"train": (images, y)}, settings=DataSettings(calibration=64, flip=True, crop_padding=2))


def resnet(*, dropout=0.0):
    model = build_model(name="resnet20", arguments={}, num_classes=4, seed=0)
    return nn.Sequential(model, nn.Dropout(dropout)) if dropout else model


def trained(*, eager=False, model=None, recipe=RECIPE, epochs=3, **arguments):
    model = resnet() if model is None else model
    graphs = {"graphs": lambda device: None} if eager else {}
    history = fine_tune(
        model, splits().train, recipe=recipe, epochs=epochs, device="cuda", precision=FLOAT32, **graphs, **arguments
    )
    return model, history


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("taught", [False, True])
def test_replayed_steps_train_as_steps_run_one_by_one(deterministic, optimizer, taught):
    """Losses of whole trainings; the rate is a tensor of float32 in one and a Python number in the other."""
    distillation = Distillation() if taught else None
    rate = 0.05 if optimizer == "sgd" else 0.002
    recipe = replace(RECIPE, optimizer=optimizer, distillation=distillation, lr=rate)
    teacher = resnet() if taught else None
    _, history = trained(recipe=recipe, teacher=teacher)
    _, plain = trained(recipe=recipe, teacher=teacher, eager=True)
    assert history.notes == ()
    steps = 3 * (len(splits().train) // 64)
    assert history.replayed == steps - WARM_UP
    assert plain.replayed == 0
    assert history.train_loss == pytest.approx(plain.train_loss, rel=0.02)
    assert history.train_loss[-1] < history.train_loss[0]


def test_dropout_draws_anew_in_every_replay():
    """The device's own generator is registered with the graph; a frozen mask would leave half of the logits at zero."""
    seen = torch.zeros(64, 4, device="cuda")

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            dropped = self.drop(torch.ones_like(x))
            if self.training:
                seen.add_(dropped.detach() > 0)
            return x * dropped

    _, history = trained(model=nn.Sequential(resnet(), Watching()))
    assert history.notes == ()
    assert history.replayed > 0
    steps = 3 * (len(splits().train) // 64)
    assert (seen / steps - 0.5).abs().max() < 0.35
    assert seen.unique().numel() > 4


class Branching(nn.Module):
    def forward(self, x):
        return 2 * x if x.mean().item() > 0.5 else x


class Synchronising(nn.Module):
    """Waits where no rehearsal hears it, so that the capture itself fails."""

    def forward(self, x):
        torch.cuda.synchronize()
        return x


@pytest.mark.parametrize(("kind", "reason"), [(Branching, "it waits for the device"), (Synchronising, "Error")])
def test_a_step_that_cannot_be_captured_is_told_and_the_training_goes_on_and_so_does_the_next(kind, reason):
    _, history = trained(model=nn.Sequential(resnet(), kind()), epochs=2)
    assert len(history.notes) == 1
    assert reason in history.notes[0]
    assert history.replayed == 0
    assert all(value == value for value in history.train_loss)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.rand(4, device="cuda")  # the generator is not left in the middle of a capture
    _, after = trained(epochs=2)
    assert after.notes == ()
    assert after.replayed > 0


def test_memory_of_a_trial_comes_back():
    def once():
        trained(epochs=2)
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    once()
    before = once()
    for _ in range(5):
        once()
    assert once() <= before + 8 * 2**20


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_scores_and_statistics_are_those_of_a_cpu(dtype):
    data, model = splits(), resnet()
    fine_tune(model, data.train, recipe=RECIPE, epochs=2, precision=FLOAT32)
    there = copy.deepcopy(model)
    recalibrate(model, data.calibration, batch_size=32)
    recalibrate(there, data.calibration, batch_size=32, device="cuda")
    for (name, here), value in zip(model.named_buffers(), there.buffers(), strict=True):
        torch.testing.assert_close(here, value.cpu(), rtol=1e-4, atol=1e-5, msg=name)
    first = evaluate(model, data.val, autocast_dtype=dtype)
    second = evaluate(there, data.val, device="cuda", autocast_dtype=dtype)
    assert second.loss == pytest.approx(first.loss, rel=1e-4 if dtype is None else 0.05)
    assert second.accuracy == pytest.approx(first.accuracy, abs=1e-9 if dtype is None else 0.02)


def test_the_same_images_are_seen_on_a_gpu_as_on_a_cpu():
    data = splits()
    passes = []
    for device in ("cpu", "cuda"):
        order = torch.Generator().manual_seed(5)
        passes.append(
            [(x.cpu(), y.cpu()) for x, y in data.train.batches(100, shuffle=order, augment=True, device=device)]
        )
    for (x, y), (there, targets) in zip(*passes, strict=True):
        torch.testing.assert_close(x, there, rtol=1e-6, atol=1e-6)
        assert torch.equal(y, targets)


def test_streamed_batches_arrive_whole_while_the_device_works():
    from torch.utils.data import TensorDataset

    images = torch.randint(0, 256, (256, 3, 64, 64), dtype=torch.uint8)
    settings = DataSettings(calibration=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    train = as_splits({"train": TensorDataset(images, torch.arange(256) % 2)}, settings=settings).train
    expected = torch.cat([x for x, _ in train.batches(16)])
    work = torch.randn(2048, 2048, device="cuda")
    found = []
    for x, _ in train.batches(16, device="cuda"):
        work = torch.tanh(work @ work)  # keeps the device behind the host
        found.append(x.clone())
    torch.testing.assert_close(torch.cat(found).cpu(), expected)
    assert isinstance(train.transform, Transform)


def test_a_whole_search_runs_on_the_gpu(tmp_path, monkeypatch):
    """Candidates are screened, tuned by replayed steps and finished; the front is within what dense networks cost."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # a store that is away
    monkeypatch.chdir(tmp_path)
    data = splits()
    model, _ = trained(epochs=4)
    ladder = [
        {"rung": "screen", "epochs": 0},
        {"rung": "tune", "epochs": 2, "trials": 3},
        {"rung": "final", "epochs": 2, "trials": 2, "test": True},
    ]
    found = autoprune.search(
        model.cpu(),
        data=data,
        budget={"macs": 0.7},
        trials=6,
        name="on-a-gpu",
        home=tmp_path / "home",
        device="cuda",
        recipe={"batch_size": 32, "lr": 0.02},
        search={"controls": 1, "ladder": ladder},
    )
    assert found.complete
    assert 1 <= len(found.front) <= 3
    assert all(point.metrics["val_accuracy"] > 0.25 for point in found.front)
    assert all(result.device == "cuda" for result in tuned_results(found))
    assert all(result.notes == () for result in tuned_results(found))


def tuned_results(found):
    return [trial.result for trial in found.stored.rungs["tune"] if trial.result is not None]


def test_2_to_4_weights_run_on_sparse_kernels():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("2:4 kernels need compute capability 8.0")
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)).cuda().half()
    for layer in (model[0], model[2]):
        with torch.no_grad():
            layer.weight.mul_(torch.tensor([1, 0, 1, 0], device="cuda").repeat(32).half())
    x = torch.randn(64, 128, device="cuda").half()
    with torch.inference_mode():
        expected = model(x)
        assert to_semi_structured(model) == ["0", "2"]
        torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)


def test_a_gpu_that_is_not_there_is_refused():
    from autoprune.network.devices.device import resolve_device

    with pytest.raises(InputError, match="was asked for"):
        resolve_device(f"cuda:{torch.cuda.device_count()}")
