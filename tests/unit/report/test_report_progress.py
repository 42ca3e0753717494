"""The live line and its quiet form."""

from __future__ import annotations

import io

import pytest

from autoprune.report import Progress


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_file_gets_a_line_at_the_start_and_end_of_a_rung_and_one_every_thirty_seconds() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress(file=out, clock=clock) as progress:
        progress.rung_started("screen", total=40)
        for number in range(40):
            clock.now += 1.0
            progress.trial_finished(val_accuracy=0.5 + number / 100, cost=float(number))
        progress.rung_finished()
    lines = out.getvalue().splitlines()
    assert lines == [
        "screen: 40 trials",
        "screen: 30/40 trials, best val accuracy 79.0%, front 30, 10 s left",
        "screen: finished: 40/40 trials, best val accuracy 89.0%, front 40, 40 s",
    ]
    assert "\x1b" not in out.getvalue()


def test_trials_of_an_earlier_call_count_as_done_but_not_for_the_time_left() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(file=out, clock=clock)
    progress.rung_started("tune", total=10, done=4)
    progress.trial_finished(val_accuracy=0.9, cost=1.0, known=True)
    clock.now += 31.0
    progress.trial_finished(val_accuracy=0.8, cost=0.5)
    assert out.getvalue().splitlines() == [
        "tune: 10 trials, 4 of them finished earlier",
        "tune: 5/10 trials, best val accuracy 90.0%, front 2, 2 min 35 s left",
    ]


@pytest.mark.parametrize("live", [False, True])
def test_failed_trials_are_counted_apart_and_never_as_done(live: bool) -> None:
    """A rung measures as many trials as it was asked for: another one takes the place of a failed one."""
    out, clock = io.StringIO(), Clock()
    with Progress(file=out, live=live, clock=clock) as progress:
        progress.rung_started("screen", total=8)
        for number in range(9):
            clock.now += 31.0
            failed = number == 3
            progress.trial_finished(val_accuracy=None if failed else 0.5, cost=None if failed else 1.0)
        progress.rung_finished()
    text = out.getvalue()
    assert "9/8" not in text
    assert "8/8 trials, best val accuracy 50.0%, front 1, 1 failed" in text
    if not live:
        lines = text.splitlines()
        assert lines[3] == "screen: 3/8 trials, best val accuracy 50.0%, front 1, 2 min 35 s left"
        assert lines[4].startswith("screen: 3/8 trials, best val accuracy 50.0%, front 1, 1 failed, ")


def test_a_rung_whose_failed_trials_nobody_replaces_says_how_many_are_measured() -> None:
    out = io.StringIO()
    progress = Progress(file=out, clock=Clock())
    progress.rung_started("tune", total=2)
    progress.trial_finished(val_accuracy=None, cost=None)
    progress.trial_finished(val_accuracy=0.5, cost=1.0)
    progress.rung_finished()
    assert "1/2 trials, best val accuracy 50.0%, front 1, 1 failed" in out.getvalue()


def test_a_terminal_gets_a_line_a_rung_that_stays_and_notes_above_it() -> None:
    out = io.StringIO()
    with Progress(file=out, live=True, clock=Clock()) as progress:
        for name in ("screen", "tune"):
            progress.rung_started(name, total=1)
            progress.trial_finished(val_accuracy=0.987, cost=0.5)
            progress.note(f"[note] of {name}")
            progress.rung_finished()
    text = out.getvalue()
    assert "1/1 trials, best val accuracy 98.7%, front 1" in text
    assert "[note] of screen" in text
    assert "tune" in text


def test_a_rung_without_trials_can_be_opened_and_closed() -> None:
    for live in (False, True):
        with Progress(file=io.StringIO(), live=live) as progress:
            progress.rung_started("final", total=0)
            progress.rung_finished()
            progress.close()


def test_a_trial_outside_a_rung_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(RuntimeError, match="no rung is running"):
        Progress(file=io.StringIO()).trial_finished(val_accuracy=0.5, cost=1.0)


def test_a_sentence_that_many_trials_bring_is_written_and_passed_on_once() -> None:
    out, heard = io.StringIO(), list[str]()
    with Progress(file=out, on_note=heard.append) as progress:
        for _ in range(3):
            progress.note_once(("steps run one by one", "another"))
    assert out.getvalue().splitlines() == heard == ["steps run one by one", "another"]
