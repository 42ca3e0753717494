"""Which number format and memory format wins a probe, and by which readings."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.network.devices import probing
from autoprune.network.devices.precision import Precision
from autoprune.network.devices.probing import BASE, Probe, probe_precision
from autoprune.network.models.building import build_model

HALF = Precision(torch.bfloat16, channels_last=False)
LAST = Precision(None, channels_last=True)
HALF_LAST = Precision(torch.bfloat16, channels_last=True)


@pytest.fixture(autouse=True)
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor has arithmetic for bfloat16, whichever runs the tests."""
    monkeypatch.setattr(probing, "without_bfloat16", lambda device: None)


Clock = Callable[[dict[Precision, float]], list[Precision]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Makes passes take what a test says, and returns the list of those that were run."""

    def set_clock(taken: dict[Precision, float]) -> list[Precision]:
        ran: list[Precision] = []

        def seconds(model: nn.Module, example: Tensor, precision: Precision, **_: Any) -> float:
            ran.append(precision)
            return taken[precision]

        monkeypatch.setattr(probing, "_processor_seconds", seconds)
        return ran

    return set_clock


@pytest.mark.parametrize("training", [False, True])
def test_the_probe_leaves_the_model_as_it_was(training: bool) -> None:
    model = build_model(name="resnet20", arguments={"in_channels": 1}, num_classes=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    found = probe_precision(model, torch.rand(4, 1, 8, 8), training=training, seconds=0.2)
    assert set(found.milliseconds) == {BASE, LAST, HALF, HALF_LAST}
    assert all(took > 0 for took in found.milliseconds.values())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.get_num_threads() == threads


def test_passes_run_on_one_thread() -> None:
    seen = set()

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.add(torch.get_num_threads())
            return x

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        probe_precision(Watching(), torch.rand(2, 3), seconds=0.05)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {1}


@pytest.mark.parametrize(
    ("half", "keep", "chosen"),
    [
        (0.5, None, HALF),
        (0.89, None, HALF),
        (0.91, None, BASE),
        (12.0, None, BASE),
        (0.95, HALF, HALF),
        (1.05, HALF, HALF),
        (1.2, HALF, BASE),
        (0.95, BASE, BASE),
        (0.5, BASE, HALF),
    ],
)
def test_bfloat16_must_win_clearly_and_what_was_chosen_must_lose_clearly(
    half: float, keep: Precision | None, chosen: Precision, clock: Clock
) -> None:
    clock({BASE: 1.0, HALF: half})
    assert probe_precision(nn.Linear(3, 3), torch.rand(4, 3), keep=keep).precision == chosen


@pytest.mark.parametrize("wrong", range(20))
def test_one_reading_in_twenty_that_is_wrong_does_not_decide(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass in emulated bfloat16 that seems short, a pass in float32 that seems long."""
    number = iter(range(10_000))

    def seconds(model: nn.Module, example: Tensor, precision: Precision, **_: Any) -> float:
        right, other = (3.64, 0.031) if precision == HALF else (0.31, 36.4)
        return other if next(number) % 20 == wrong else right

    monkeypatch.setattr(probing, "_processor_seconds", seconds)
    found = probe_precision(nn.Linear(3, 3), torch.rand(4, 3), training=True)
    assert found.precision == BASE
    assert found.milliseconds == {BASE: pytest.approx(310), HALF: pytest.approx(3640)}
    assert found.readings >= 5


def test_the_variants_take_turns_and_short_passes_are_read_often(clock: Clock) -> None:
    ran = clock({BASE: 4.0, HALF: 3.0, LAST: 2.0, HALF_LAST: 1.0})
    found = probe_precision(nn.Conv2d(3, 3, 3), torch.rand(4, 3, 8, 8))
    assert found.precision == HALF_LAST
    assert ran[:2] == [BASE, BASE]  # how many samples fit
    rounds = [ran[2:][start : start + 4] for start in range(0, len(ran) - 2, 4)]
    assert all(part == [BASE, HALF, LAST, HALF_LAST] for part in rounds)
    assert found.readings == len(rounds) - 1 == 25  # the first round prepares kernels


def test_a_slow_network_is_probed_on_a_few_samples_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight passes of 64 large images, forward and backward, would take minutes on a CPU."""
    now, seen = [0.0], []

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            now[0] += 0.3 * len(x)
            return x

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    found = probe_precision(Slow(), torch.rand(64, 3))
    assert set(seen) == {2}
    assert found.readings == 1
    assert found.milliseconds == {BASE: pytest.approx(600), HALF: pytest.approx(600)}
    assert now[0] < 5


def test_a_fast_network_is_probed_on_all_samples() -> None:
    assert probe_precision(nn.Identity(), torch.rand(64, 3), seconds=0.05).samples == 64


def test_bfloat16_is_not_tried_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "without_bfloat16", lambda device: "emulated")
    tried = set()

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tried.add(torch.is_autocast_enabled("cpu"))
            return x

    found = probe_precision(Watching(), torch.rand(2, 3), seconds=0.05)
    assert tried == {False}
    assert (found.precision, found.refused) == (BASE, "emulated")


def test_a_network_that_cannot_run_in_bfloat16_runs_in_float32() -> None:
    class NoHalf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                raise RuntimeError("not implemented for BFloat16")
            return x

    found = probe_precision(NoHalf(), torch.rand(2, 3), seconds=0.05)
    assert found.precision == BASE
    assert "not implemented for BFloat16" in found.left_out[HALF]


class Viewing(nn.Module):
    """Takes it that what a convolution returns lies channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(len(x), -1))


@pytest.mark.parametrize("training", [False, True])
def test_a_network_with_a_view_behind_a_convolution_gets_contiguous_images(training: bool) -> None:
    images = torch.rand(4, 3, 6, 6).contiguous(memory_format=torch.channels_last)  # as the data come
    found = probe_precision(Viewing(), images, training=training, seconds=0.05)
    assert not found.precision.channels_last
    assert set(found.left_out) == {LAST, HALF_LAST}
    assert all("view" in error for error in found.left_out.values())


def test_a_network_that_runs_in_no_format_says_why() -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        probe_precision(Never(), torch.rand(2, 3), seconds=0.05)


@pytest.mark.parametrize("shape", [(4, 5), (4, 2, 3, 5)])
@pytest.mark.parametrize("training", [False, True])
def test_whole_numbers_reach_the_network_as_they_are(shape: tuple[int, ...], training: bool) -> None:
    seen = set()

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 3)

        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            seen.add((ids.dtype, ids.stride()))
            return {"answer": self.table(ids).flatten(1)}

    ids = torch.randint(0, 10, shape)
    found = probe_precision(Tokens(), ids, training=training, seconds=0.05)
    assert set(found.milliseconds) == {BASE, HALF}
    assert {dtype for dtype, _ in seen} == {torch.int64}
    assert {strides for _, strides in seen} == {ids.stride()}


def test_bfloat16_beat_the_fastest_float32_and_float32_the_fastest_other_variant() -> None:
    took = {BASE: 4.0, LAST: 3.0, HALF: 2.0, HALF_LAST: 1.0}
    assert Probe(HALF_LAST, took, {}).rival == LAST
    assert Probe(LAST, {**took, HALF: 5.0, HALF_LAST: 6.0}, {}).rival == BASE
    assert Probe(BASE, {BASE: 1.0}, {}).rival is None
