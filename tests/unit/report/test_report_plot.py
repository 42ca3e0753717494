"""The front as a picture made of characters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from autoprune.report import FrontPoint, SearchView, plot_front


def rows(text: str) -> list[str]:
    return [line[9:] for line in text.splitlines() if line[8:9] in {"│", "|"}]


def test_points_stand_where_their_numbers_are(view: SearchView) -> None:
    picture = rows(plot_front(view, width=80, height=10))
    assert len(picture) == 10
    assert picture[0].rstrip().endswith("★")  # the dense network is the dearest and the most accurate
    front = {(r, c) for r, line in enumerate(picture) for c, mark in enumerate(line) if mark in "●◉"}
    assert len(front) == 3
    columns = sorted(c for _, c in front)
    assert [r for r, _ in sorted(front, key=lambda place: place[1])] == sorted((r for r, _ in front), reverse=True)
    assert sum(line.count("◉") for line in picture) == 1
    # 0.2 to 1 of dense over 70 columns: 0.25, 0.5 and 0.75.
    assert columns == [round(69 * (x - 0.2) / 0.8) for x in (0.25, 0.5, 0.75)]
    assert any("┊" in line for line in picture)


def test_a_terminal_without_unicode_gets_ascii(view: SearchView) -> None:
    text = plot_front(view, width=90, unicode=False)
    assert text.isascii()
    assert "@ knee" in text
    assert "* dense" in text


def test_no_line_is_wider_than_the_terminal(view: SearchView) -> None:
    assert max(len(line) for line in plot_front(view, width=75).splitlines() if line[8:9] in "│└") <= 75
    assert plot_front(view, width=69) == ""


def test_costs_of_very_different_size_are_spread_logarithmically(
    view: SearchView, make_point: Callable[..., FrontPoint]
) -> None:
    tiny = make_point(9, 0.01, 0.5)
    text = plot_front(replace(view, trials=(*view.trials, tiny)))
    assert "logarithmic" in text
    assert "10%" in text


def test_a_search_without_points_or_with_a_single_one_is_drawn_too(
    view: SearchView, make_point: Callable[..., FrontPoint]
) -> None:
    assert plot_front(replace(view, trials=())) == ""
    alone = replace(view, trials=(make_point(0, 1.0, 0.96),), controls=(), limits={})
    assert "★" in plot_front(alone)
    lost = replace(view, trials=(*view.trials, make_point(7, 0.6, float("nan"))))
    assert len(rows(plot_front(lost))) == 14
    with pytest.raises(ValueError, match="at least 3 lines"):
        plot_front(view, height=2)
