"""The pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from autoprune.report import SearchView, figure_html, front_figure, front_png, widths_figure, widths_png


def trace(figure: Any, name: str) -> Any:
    return next(t for t in figure.data if t.name == name)


def test_the_figure_draws_front_trials_controls_dense_and_budget(view: SearchView) -> None:
    figure = front_figure(view)
    names = [t.name for t in figure.data]
    assert names == ["other trials", "controls (uniform, global)", "front", "knee", "dense network"]
    assert list(trace(figure, "front").x) == [25.0, 50.0, 75.0]
    assert list(trace(figure, "front").y) == pytest.approx([80.0, 93.0, 95.0])
    assert list(trace(figure, "other trials").x) == [50.0, 80.0]
    assert figure.layout.shapes[0].x0 == 80.0
    assert "1.00M" in figure.layout.xaxis.title.text
    assert figure.layout.yaxis.title.text == "validation accuracy (%)"


def test_pointing_at_a_trial_tells_number_accuracy_costs_and_criterion(view: SearchView) -> None:
    said = trace(front_figure(view), "front").customdata[1][0]
    for words in (
        "trial 1",
        "validation accuracy 93.00%",
        "MACs 500k (50.0% of dense)",
        "size 80.0 kB",
        "criterion obs",
    ):
        assert words in said


def test_hostile_names_do_not_become_html(view: SearchView) -> None:
    hostile = "<script>alert(1)</script>"
    control = replace(view.controls[0], origin=hostile, criterion=hostile)
    sizes = {hostile: 16}
    bad = replace(view, name=hostile, controls=(control,), sizes=sizes)
    for figure in (front_figure(bad), widths_figure(bad)):
        assert hostile not in figure.to_json()
        assert "&lt;script&gt;" in figure.to_json()


def test_the_page_needs_no_network(view: SearchView) -> None:
    page = figure_html(widths_figure(view))
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page


def test_the_heat_map_holds_the_percentage_that_each_point_keeps(view: SearchView) -> None:
    (heat,) = widths_figure(view).data
    assert [list(row) for row in heat.z] == [[25.0, 50.0, 75.0], [25.0, 50.0, 75.0]]


@pytest.mark.parametrize("draw", [front_png, widths_png])
def test_a_png_is_drawn_without_a_browser(
    view: SearchView, tmp_path: Path, draw: Callable[[SearchView, Path], Path]
) -> None:
    path = draw(replace(view, name="cost $x$ of [digits]"), tmp_path / "picture.png")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) >= 400
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10


@pytest.mark.parametrize("count", [0, 1])
def test_a_front_of_none_or_one_point_can_be_drawn(view: SearchView, tmp_path: Path, count: int) -> None:
    small = replace(view, trials=view.trials[:count], controls=(), limits={})
    assert front_png(small, tmp_path / "front.png").stat().st_size > 0
    assert widths_png(small, tmp_path / "widths.png").stat().st_size > 0
    assert len(front_figure(small).data) == 3
    assert len(widths_figure(small).data) == 1
