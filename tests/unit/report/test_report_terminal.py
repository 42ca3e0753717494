"""The report as text."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autoprune.errors import StudyError
from autoprune.report import LayerRow, SearchView, render_front, render_layers, units


def line_of(text: str, start: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [start])


def test_the_dense_row_comes_first_and_each_point_says_what_it_saves(view: SearchView) -> None:
    text = render_front(view, console_width=140)
    rows = [
        line.split()[0]
        for line in text.splitlines()
        if line.split()[:1] and line.split()[0] in ["dense", "3", "1", "0"]
    ]
    assert rows == ["dense", "3", "1", "0"]
    assert line_of(text, "1") == [
        "1",
        "93.0%",
        "500k",
        "50%",
        "20.0k",
        "50%",
        "80.0",
        "kB",
        "50%",
        "500k",
        "20.0k",
        "80.0",
        "kB",
        "obs",
        "◄",
        "knee",
    ]


def test_a_narrow_terminal_gets_the_savings_in_a_second_table(view: SearchView) -> None:
    text = render_front(view, console_width=72)
    assert "What each point saves" in text
    assert max(len(line) for line in text.splitlines()) <= 72
    assert "…" not in text
    assert "-3.0 points" in text


def test_text_for_a_file_holds_no_escape_codes_and_text_for_a_terminal_does(view: SearchView) -> None:
    assert "\x1b" not in render_front(view)
    assert "\x1b[" in render_front(view, color=True)


def test_the_test_accuracy_is_shown_only_where_it_was_measured(view: SearchView) -> None:
    assert "test acc" not in render_front(view)
    tested = replace(view, trials=(replace(view.trials[0], test_accuracy=0.79), *view.trials[1:]))
    text = render_front(tested, console_width=140)
    assert "test acc" in text
    assert line_of(text, "0")[2] == "79.0%"
    assert line_of(text, "1")[2] == "–"


def test_controls_and_the_hypervolume_with_its_reference_point_stand_below(view: SearchView) -> None:
    text = render_front(view, console_width=140)
    assert text.index("uniform l2") < text.index("Hypervolume")
    assert "+8.0" in next(line for line in text.splitlines() if line.startswith("uniform l2"))
    assert "reference point: validation error 1, MACs 1 of dense" in text
    assert "Budget: at most MACs 800k, memory 8.00 kB." in text
    assert text.rstrip().endswith("A note.")


def test_the_cost_on_the_axis_is_always_a_column(view: SearchView) -> None:
    assert "memory" in render_front(replace(view, primary="activation_bytes", limits={}))


def test_a_search_without_a_finished_trial_says_so(view: SearchView) -> None:
    assert "no trial of the rung tune has finished yet" in render_front(replace(view, trials=()))


def test_names_that_look_like_markup_are_shown_as_they_are(view: SearchView) -> None:
    control = replace(view.controls[0], origin="[/red] [bold]x")
    text = render_front(replace(view, controls=(control,), name="a[b]", notes=("[/] note",)), console_width=140)
    assert "[/red] [bold]x" in text
    assert "a[b]: the front" in text
    assert "[/] note" in text


def test_layers_are_shown_before_and_after_with_their_sum(view: SearchView) -> None:
    rows = [LayerRow("conv1", "conv", 16, 16, 1000, 1000, 10, 10), LayerRow("conv2", "conv", 16, 4, 8000, 2000, 80, 20)]
    text = render_layers(view, 1, rows)
    assert line_of(text, "conv1") == ["conv1", "16", "1.00k", "–", "10", "–"]
    assert line_of(text, "conv2") == ["conv2", "16", "→", "4", "8.00k", "→", "2.00k", "6.00k", "80", "→", "20", "60"]
    assert line_of(text, "sum") == ["sum", "9.00k", "→", "3.00k", "6.00k", "90", "→", "30", "60"]
    assert "validation accuracy 93.0% (dense 96.0%)" in text


def test_the_layers_of_a_trial_that_does_not_exist_are_an_error_that_names_those_that_do(view: SearchView) -> None:
    with pytest.raises(StudyError, match="no finished trial 99 on the rung tune; finished: 0, 1, 2, 3, 4"):
        render_layers(view, 99, [])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (812, "812"),
        (999.6, "1.00k"),
        (27_249, "27.2k"),
        (40_810_000, "40.8M"),
        (999_950_000, "1.00G"),
        (-1500, "-1.50k"),
    ],
)
def test_counts_are_written_with_three_digits(value: float, text: str) -> None:
    assert units.quantity(value) == text


@pytest.mark.parametrize(("value", "text"), [(812, "812 B"), (1_090_000, "1.09 MB"), (float("nan"), "–")])
def test_sizes_are_written_in_bytes(value: float, text: str) -> None:
    assert units.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(-1, "0 s"), (8.4, "8 s"), (60, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (7200, "2 h")],
)
def test_times_are_written_in_two_units(value: float, text: str) -> None:
    assert units.seconds(value) == text
