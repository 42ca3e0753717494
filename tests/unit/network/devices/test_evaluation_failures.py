"""What an evaluation does where memory runs out, where the user's code raises, and where somebody waits for it."""

import errno
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoprune.errors import InputError, TrialError
from autoprune.network.data.loading import DataSettings, as_splits
from autoprune.network.data.progress import watched
from autoprune.network.devices.failures import described, out_of_memory
from autoprune.network.latency.timing import one_at_a_time
from autoprune.network.training.recipe import Recipe, fine_tune
from autoprune.network.workers import WorkerFactory
from autoprune.policy import uniform_policy
from autoprune.results import Fidelity

SCREEN, TUNE = Fidelity("screen"), Fidelity("tune", epochs=1)
CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


class Hungry:
    """A loss for which memory runs out as soon as a training step brings more than `room` samples."""

    def __init__(self, room: int, error: Exception) -> None:
        self.room = room
        self.error = error
        self.seen: list[int] = []

    def __call__(self, output, target):
        if output.requires_grad:
            self.seen.append(len(target))
            if len(target) > self.room:
                raise self.error
        return F.cross_entropy(output, target)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(), RuntimeError(CPU)], ids=str
)
def test_a_trial_without_memory_is_tried_again_with_parts_of_the_same_batch(bench, error):
    batch = bench.recipe.batch_size
    loss = Hungry(batch // 4, error)
    result = replace(bench, loss=loss).evaluate(uniform_policy(bench.groups, 0.5, "l2"), TUNE)
    assert result.metrics["batch_parts"] == 4
    assert loss.seen[:2] == [batch, batch // 2]
    assert set(loss.seen[2:]) == {batch // 4}
    assert len(loss.seen) - 2 == 4 * (len(bench.splits.train) // batch)


def test_a_trial_for_which_no_part_is_small_enough_fails_and_says_so(bench):
    hungry = replace(bench, loss=Hungry(0, RuntimeError(CPU)))
    with pytest.raises(TrialError, match=r"out of memory on cpu, even with 1/4 of a batch at a time: \[enforce fail"):
        hungry.evaluate(uniform_policy(bench.groups, 0.5, "l2"), TUNE)


def test_a_trial_with_enough_memory_says_nothing_of_parts(bench):
    assert "batch_parts" not in bench.evaluate(uniform_policy(bench.groups, 0.5, "l2"), TUNE).metrics


@pytest.mark.parametrize("batch", [32, 30])
def test_accumulated_gradients_are_those_of_the_whole_batch(batch):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 3
    x = torch.randn(120, 6, generator=generator) + 2 * F.one_hot(y, 6)
    data = as_splits({"train": (x, y)}, settings=DataSettings(calibration=8))
    trained = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).double()
        model.register_forward_pre_hook(lambda module, args: tuple(a.double() for a in args))
        recipe = Recipe(batch_size=batch, distillation=None)
        history = fine_tune(model, data.train, recipe=recipe, epochs=3, parts=parts)
        trained.append((history, [p.detach() for p in model.parameters()]))
    for whole, added in zip(trained[0][1], trained[1][1], strict=True):
        torch.testing.assert_close(whole, added, rtol=1e-4, atol=1e-6)
    assert trained[0][0].train_loss == pytest.approx(trained[1][0].train_loss, rel=1e-5)


def test_parts_never_hold_a_single_sample_which_a_batch_norm_refuses():
    x, y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    data = as_splits({"train": (x, y)}, settings=DataSettings(calibration=2))
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    history = fine_tune(model, data.train, recipe=Recipe(batch_size=5, distillation=None), epochs=1, parts=4)
    assert len(history.train_loss) == 1


def test_an_error_of_the_users_own_code_fails_the_trial_with_its_place(bench):
    def loss(output, target):
        raise KeyError("weights")

    with pytest.raises(TrialError, match=r"raised KeyError: 'weights' \(.*test_evaluation_failures\.py:\d+, in loss\)"):
        replace(bench, loss=loss).evaluate(uniform_policy(bench.groups, 0.5, "l2"), SCREEN)


def test_outputs_that_are_nan_fail_the_trial_although_they_have_an_accuracy(bench):
    loss = lambda output, target: F.cross_entropy(output * float("nan"), target)  # noqa: E731
    with pytest.raises(TrialError, match="the validation loss is nan"):
        replace(bench, loss=loss).evaluate(uniform_policy(bench.groups, 0.5, "l2"), SCREEN)


def test_bad_input_and_a_full_disk_stop_the_search_and_not_only_a_trial(bench):
    policy = uniform_policy(bench.groups, 0.5, "l2")
    with pytest.raises(InputError, match="one number a batch"):
        replace(bench, loss=lambda output, target: output).evaluate(policy, TUNE)

    def full(output, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace(bench, metric=full).evaluate(policy, SCREEN)


def test_errors_that_only_mention_memory_are_told_from_others():
    assert out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("out of memory"))


def test_an_error_without_words_is_described_by_its_kind():
    assert described(ValueError()) == "ValueError"


def test_every_batch_of_every_split_is_told_and_otherwise_unchanged(bench):
    beats = []
    splits = watched(bench.splits, lambda: beats.append(1))
    for name in ("train", "calibration", "val", "test"):
        told, plain = getattr(splits, name), getattr(bench.splits, name)
        assert (len(told), told.num_classes) == (len(plain), plain.num_classes)
        beats.clear()
        batches = list(told.batches(16, limit=40))
        assert len(beats) == len(batches)
        for (x, y), (x2, y2) in zip(batches, plain.batches(16, limit=40), strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)


def test_an_evaluation_beats_with_every_batch_and_ends_where_the_beat_says_so(bench):
    beats = []
    policy = uniform_policy(bench.groups, 0.5, "l2")
    result = WorkerFactory(bench)(lambda: beats.append(1))(policy, TUNE)
    assert len(beats) > len(bench.splits.train) // bench.recipe.batch_size
    assert result.metrics["val_accuracy"] == bench.evaluate(policy, TUNE).metrics["val_accuracy"]

    def end() -> None:
        raise TrialError("the evaluation took longer than its limit of 1 s")

    with pytest.raises(TrialError, match="took longer"):
        WorkerFactory(bench)(end)(policy, TUNE)


def test_who_waits_to_measure_shows_progress_and_ends_at_its_limit(tmp_path):
    beats = []

    def beat() -> None:
        beats.append(1)
        if len(beats) == 3:
            raise TrialError("the evaluation took longer than its limit of 1 s")

    with (
        one_at_a_time(tmp_path / "lock"),
        pytest.raises(TrialError, match="took longer"),
        one_at_a_time(tmp_path / "lock", beat),
    ):
        raise AssertionError("the lock was given twice")
    with one_at_a_time(tmp_path / "lock", beats.clear):
        assert beats == []
