"""Masks in tables and figures: costs are called non-zeros wherever they are shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from autoprune import report
from autoprune.report import LayerRow, SearchView

SENTENCE = "costs count non-zeros, and give no latency without a sparse kernel"


def test_every_table_of_a_masked_search_says_what_its_costs_are(view: SearchView) -> None:
    masked = replace(view, pruning="unstructured")
    rows = [LayerRow("layer1.conv", "conv", 144, 72, 1000, 500, 150, 78)]
    texts = [report.render_front(masked, console_width=width) for width in (60, 140)]
    texts.append(report.render_layers(masked, 1, rows, console_width=140))
    for text in texts:
        assert SENTENCE in " ".join(text.split())
    assert "non-zeros" in texts[-1].splitlines()[2]
    assert report.front_json(masked)["pruning"] == "unstructured"
    for table in (report.front_table(masked), report.controls_table(masked)):
        assert table["caveat"].str.contains(SENTENCE).all()


def test_figures_of_a_masked_search_count_weights_and_say_what_the_axis_is(view: SearchView, tmp_path: Path) -> None:
    masked = replace(view, pruning="2:4")
    front = report.figure_html(report.front_figure(masked))
    assert "non-zeros, no latency without a sparse kernel" in front
    widths = report.figure_html(report.widths_figure(masked))
    assert "weights that each point of the front keeps" in widths
    assert "channels" not in widths.split("Plotly.newPlot")[-1]
    assert report.widths_png(masked, tmp_path / "widths.png").stat().st_size > 1000


def test_a_search_of_channels_says_nothing_of_the_kind(view: SearchView) -> None:
    assert "non-zeros" not in report.render_front(view, console_width=140)
    assert "caveat" not in report.front_table(view).columns
    assert report.front_json(view)["caveat"] == ""


def test_an_inspection_counts_weights_where_they_are_masked() -> None:
    group = {
        "name": "conv",
        "size": 144,
        "widths": [72, 144],
        "macs_share": 0.5,
        "params_share": 0.5,
        "stage": "stage1",
        "producers": ["conv"],
        "consumers": [],
        "approximate": None,
    }
    data = {
        "pruning": "2:4",
        "groups": [group],
        "frozen": [{"name": "stem", "size": 27, "reason": "each output reads 3 input channels"}],
        "notes": [],
        "dense": {"macs": 100, "params": 171, "size_bytes": 684, "activation_bytes": 40},
        "narrowest": {"macs": 50, "params": 99, "size_bytes": 396, "activation_bytes": 40},
        "input_shape": [3, 8, 8],
    }
    text = report.render_inspection(data, title="masked", console_width=140)
    assert SENTENCE in text
    assert "their weights all stay" in text
    assert "72–144" in text
    assert "channels" not in text.replace("input channels", "")
