"""What is remembered of a probe, when it is believed, and how a choice is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import InputError
from autoprune.network.devices import formats, probing
from autoprune.network.devices.formats import (
    Choice,
    named_choice,
    precision_from,
    precision_text,
    remembered_choice,
    told,
)
from autoprune.network.devices.precision import Precision

BASE = Precision(None, channels_last=False)
HALF = Precision(torch.bfloat16, channels_last=False)
LAST = Precision(None, channels_last=True)
HALF_LAST = Precision(torch.bfloat16, channels_last=True)


class Viewing(nn.Module):
    """Takes it that what a convolution returns lies channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(len(x), -1))


class Machine:
    """A processor, and how long passes take on it; `ran` counts them."""

    def __init__(self) -> None:
        self.refusal: str | None = None
        self.taken = {BASE: 0.039, LAST: 0.030, HALF: 0.020, HALF_LAST: 0.010}
        self.ran = 0

    def seconds(self, model: nn.Module, example: Tensor, precision: Precision, **_: Any) -> float:
        self.ran += 1
        return self.taken[precision]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(probing, "_processor_seconds", made.seconds)
    for module in (formats, probing):
        monkeypatch.setattr(module, "without_bfloat16", lambda device: made.refusal)
    monkeypatch.setattr(formats, "processor_text", lambda device: "some processor")
    return made


def ask(path: Path, *, images: bool = True, training: bool = True) -> tuple[Precision, str]:
    model, example = (nn.Conv2d(3, 4, 3), torch.rand(64, 3, 8, 8)) if images else (nn.Linear(3, 4), torch.rand(64, 3))
    choice = remembered_choice(path, model, lambda: example, device="cpu", training=training)
    (line,) = told({"training" if training else "evaluation": choice})
    return choice.precision, line


def test_the_choice_is_told_with_its_reason_and_remembered(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "precision.json"
    expected = (
        "number format: bfloat16, channels last: a training pass takes 0.33 of float32's processor time (10 and 30 ms,"
        " median of 25) and 0.50 of channels first's"
    )
    assert ask(path) == (HALF_LAST, expected)
    stored = json.loads(path.read_text())
    assert (stored["schema"], stored["processor"], stored["precision"]) == (
        1,
        "some processor",
        "bfloat16, channels last",
    )
    assert stored["milliseconds"]["float32, channels first"] == 39.0
    before = machine.ran
    assert ask(path) == (HALF_LAST, f"{expected} (measured earlier on this kind of processor)")
    assert 0 < machine.ran - before <= 2 * 26  # a check of the choice and what it beat


def test_where_bfloat16_is_emulated_float32_is_chosen_and_the_reason_told(machine: Machine, tmp_path: Path) -> None:
    machine.refusal = "this processor (AVX2) only emulates bfloat16"
    assert ask(tmp_path / "tokens", images=False) == (
        BASE,
        "number format: float32: this processor (AVX2) only emulates bfloat16",
    )
    assert ask(tmp_path / "images", training=False) == (
        LAST,
        "number format: float32, channels last: this processor (AVX2) only emulates bfloat16; an evaluation pass takes"
        " 0.77 of channels first's processor time (30 and 39 ms, median of 25)",
    )


@pytest.mark.parametrize(
    ("half", "words"),
    [
        (0.037, "bfloat16 takes 0.95 of float32's processor time (37 and 39 ms, median of 25), no clear gain"),
        (0.4, "bfloat16 takes 10.26 of float32's processor time (400 and 39 ms, median of 25)"),
    ],
)
def test_why_bfloat16_was_not_chosen_is_told(half: float, words: str, machine: Machine, tmp_path: Path) -> None:
    machine.taken[HALF] = half
    assert ask(tmp_path / "p", images=False) == (BASE, f"number format: float32: a training pass in {words}")


@pytest.mark.parametrize(
    "stored",
    [
        {"bfloat16": True, "channels_last": True},  # as versions before wrote it
        {"schema": 2, "precision": "bfloat16, channels last"},
        {"schema": 1, "precision": "bfloat16, channels last", "processor": "some processor"},
        {"schema": 1, "precision": "bfloat16, channels last", "processor": "another one"},
        "nonsense",
        [1],
    ],
)
def test_files_of_other_versions_or_processors_are_ignored_and_overwritten(
    stored: Any, machine: Machine, tmp_path: Path
) -> None:
    path = tmp_path / "precision.json"
    path.write_text(json.dumps(stored) if stored != "nonsense" else "{")
    machine.taken = {BASE: 0.31, LAST: 0.32, HALF: 3.64, HALF_LAST: 3.64}
    precision, line = ask(path)
    assert precision == BASE
    assert "measured earlier" not in line
    assert json.loads(path.read_text())["precision"] == "float32, channels first"


def test_a_remembered_bfloat16_is_refused_where_the_processor_has_no_arithmetic_for_it(
    machine: Machine, tmp_path: Path
) -> None:
    path = tmp_path / "precision.json"
    assert ask(path)[0] == HALF_LAST
    machine.refusal = "this processor (AVX2) only emulates bfloat16"
    precision, line = ask(path)
    assert precision == LAST
    assert line.startswith("number format: float32, channels last: this processor (AVX2) only emulates bfloat16; ")
    assert json.loads(path.read_text())["precision"] == "float32, channels last"


def test_a_remembered_choice_that_is_clearly_slower_than_what_it_beat_is_measured_anew(
    machine: Machine, tmp_path: Path
) -> None:
    path = tmp_path / "precision.json"
    ask(path, images=False)
    machine.taken[HALF] = 1.25 * machine.taken[BASE]
    assert ask(path, images=False)[0] == HALF  # not clearly
    machine.taken[HALF] = 4.0 * machine.taken[BASE]
    precision, line = ask(path, images=False)
    assert precision == BASE
    assert line == (
        "number format: float32: measured anew, as bfloat16, chosen earlier, now takes 4.00 of the time of float32;"
        " a training pass in bfloat16 takes 4.00 of float32's processor time (156 and 39 ms, median of 25)"
    )
    assert "measured earlier" in ask(path, images=False)[1]


@pytest.mark.parametrize("ratio", [0.7, 1.0, 1.29])
def test_a_resumed_search_goes_on_in_the_same_format(ratio: float, machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "precision.json"
    for training in (False, True):
        first = ask(path.with_stem(f"p{training}"), training=training)[0]
        machine.taken[first] = ratio * machine.taken[LAST]
        assert ask(path.with_stem(f"p{training}"), training=training)[0] == first


def test_a_check_of_what_is_remembered_is_short(machine: Machine, tmp_path: Path) -> None:
    """Where two samples take long already nothing is run: a long pass is not read wrong."""
    path = tmp_path / "precision.json"
    ask(path)
    stored = json.loads(path.read_text())
    stored["samples"], stored["milliseconds"] = 2, dict.fromkeys(stored["milliseconds"], 600.0)
    path.write_text(json.dumps(stored))
    before = machine.ran
    assert "measured earlier" in ask(path)[1]
    assert machine.ran == before


def test_a_remembered_format_that_the_network_no_longer_runs_in_is_measured_anew(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "precision.json"
    ask(path)

    def seconds(model: nn.Module, example: Tensor, precision: Precision, **_: Any) -> float:
        if precision.channels_last:
            raise RuntimeError("no such kernel")
        return machine.taken[precision]

    monkeypatch.setattr(probing, "_processor_seconds", seconds)
    precision, line = ask(path)
    assert precision == HALF
    assert "the network does not run in bfloat16, channels last as it did: RuntimeError: no such kernel" in line


def test_equal_choices_are_told_in_one_sentence_and_different_ones_apart() -> None:
    why = "this processor (AVX2) only emulates bfloat16"
    one = {use: Choice(BASE, (why, f"{use} counts")) for use in ("evaluation", "training")}
    assert told(one) == [
        f"number format: float32, channels first: {why}; evaluation counts; training counts",
    ]
    assert told({**one, "training": Choice(LAST, ("it is faster",), earlier=True)}) == [
        f"number format of evaluation: float32, channels first: {why}; evaluation counts",
        "number format of training: float32, channels last: it is faster (measured earlier on this kind of processor)",
    ]
    assert told({"training": Choice(BASE)}) == []


@pytest.mark.parametrize("training", [False, True])
def test_a_named_format_has_channels_last_images_where_the_network_runs_in_them(training: bool) -> None:
    images = torch.rand(4, 3, 6, 6)
    model = Viewing()
    assert named_choice(torch.bfloat16, nn.Conv2d(3, 4, 3), images, training=training) == Choice(HALF_LAST)
    found = named_choice(None, model, images, training=training)
    assert found.precision == BASE
    (line,) = told({"training": found})
    assert line.startswith(
        "number format: float32, channels first: the network does not run in channels last: RuntimeErr"
    )
    assert all(p.grad is None and p.is_contiguous() for p in model.parameters())
    assert named_choice(torch.bfloat16, nn.Linear(3, 4), torch.rand(4, 3), training=training).precision == HALF


def test_a_network_that_runs_in_neither_memory_format_says_so_elsewhere() -> None:
    assert named_choice(None, nn.Conv2d(9, 4, 3), torch.rand(4, 3, 6, 6), training=False) == Choice(LAST)


def test_number_formats_are_written_and_read_back() -> None:
    for text in ("float32, channels last", "bfloat16, channels first"):
        assert precision_text(precision_from(text)) == text
    with pytest.raises(InputError, match="unknown number format 'float8'"):
        precision_from("float8")
