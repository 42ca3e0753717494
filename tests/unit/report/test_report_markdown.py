"""The texts of the web pages and the model card."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autoprune.cost import COSTS, LATENCY
from autoprune.report import FrontPoint, SearchView
from autoprune.report.card import Card, ClassScores, card_markdown
from autoprune.report.markdown import (
    comparison_markdown,
    front_markdown,
    search_markdown,
    table,
    version_markdown,
    widths_markdown,
)

SIZES = {"stem": 16, "layer|1": 8}


def point(trial: int | None, accuracy: float, cost: int, **changes: Any) -> FrontPoint:
    settings: dict[str, Any] = {"widths": {"stem": 4}, "origin": "sampler", "criterion": "l2"} | changes
    return FrontPoint(trial, accuracy, dict.fromkeys(COSTS, cost), **settings)


def make_view(**changes: Any) -> SearchView:
    dense = point(None, 0.97, 1000, origin="dense", widths=SIZES, metrics={"latency_ms": 2.0, "test_accuracy": 0.96})
    trials = (
        point(3, 0.9, 200, test_accuracy=0.89, metrics={"latency_ms": 1.25}),
        point(5, 0.95, 400, test_accuracy=0.94, metrics={"latency_ms": 1.5}),
        point(7, 0.96, 900, test_accuracy=0.95, metrics={"latency_ms": float("nan")}),
        point(8, 0.5, 950),
    )
    view = SearchView("digits", "final", dense, trials, SIZES, limits={"macs": 900}, notes=("Proxy audit: fine.",))
    return replace(view, **changes)


def test_cells_with_a_bar_do_not_break_the_table() -> None:
    assert table(["a|b", "n"], [["x", "1"]]).splitlines() == ["| a\\|b | n |", "| --- | ---: |", "| x | 1 |"]


def test_the_front_is_a_table_of_linked_trials_in_order_of_rising_cost() -> None:
    text = front_markdown(make_view(), {5: "/#/runs/abc"}, names={5: "knee"})
    lines = text.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["dense", "3", "[5](/#/runs/abc) (knee)", "7"]
    assert "| 95.00% | 94.00% | 400 (40%) |" in text
    assert "| 1.50 ms |" in text
    assert "nan" not in text


def test_a_predicted_latency_stands_beside_the_measured_one() -> None:
    timed = {LATENCY: 2_000_000}
    view = make_view()
    dense = replace(view.dense, costs={**view.dense.costs, **timed})
    trial = replace(view.trials[1], costs={**view.trials[1].costs, LATENCY: 500_000})
    view = replace(view, dense=dense, trials=(trial,), primary=LATENCY, limits={LATENCY: 1_000_000})
    head, _, _, row = front_markdown(view, {}).splitlines()
    assert "| size | latency | measured |" in head
    assert "| 0.500 ms (25%) | 1.50 ms |" in row
    assert "| predicted latency | 2.00 ms | 0.500 ms | 25% of dense |" in comparison_markdown(view, trial)


def test_columns_that_nobody_measured_are_left_out() -> None:
    plain = make_view(trials=(point(1, 0.9, 300),))
    head = front_markdown(plain, {}).splitlines()[0]
    assert "test" not in head
    assert "latency" not in head


def test_a_search_tells_its_budget_its_pages_and_how_to_pick() -> None:
    text = search_markdown(
        make_view(), links={}, pages={"charts": "/#/c"}, picture="get-artifact?x", commands="Then `make export`."
    )
    for part in (
        "**3 networks on the front** of 4 trials of the rung `final` (multiply-accumulates at most 900)",
        "[charts](/#/c)",
        "![the front](get-artifact?x)",
        "`picked`",
        "Then `make export`.",
        "- Proxy audit: fine.",
    ):
        assert part in text
    empty = search_markdown(make_view(trials=(), limits={}), links={}, pages={}, picture=None, commands="")
    assert "**0 networks on the front** of 0 trials of the rung `final` (no budget)" in empty


def test_a_version_tells_what_it_saves_and_how_it_is_loaded() -> None:
    view = make_view()
    text = version_markdown(view, view.front[1], address="models:/autoprune-digits/2", export="make export TRIAL=5")
    assert "| val accuracy | 97.00% | 95.00% | -2.0 points |" in text
    assert "| test accuracy | 96.00% | 94.00% | -2.0 points |" in text
    assert "| multiply-accumulates | 1.00k | 400 | 40% of dense |" in text
    assert 'mlflow.pyfunc.load_model("models:/autoprune-digits/2")' in text
    assert "`make export TRIAL=5`" in text


def test_widths_have_a_bar_a_row_even_where_one_channel_is_left() -> None:
    text = widths_markdown({"a": 100, "b": 10}, {"a": 1}, {"a": "l2"})
    assert "| `a` | 1 of 100 | █░░░░░░░░░ | l2 |" in text
    assert "| `b` | 10 of 10 | ██████████ | – |" in text


def make_card(**changes: Any) -> Card:
    document = {
        "policy": {"schema": 1, "groups": {"stem": {"criterion": "l2", "ratio": 0.75}}},
        "result": {"metrics": {"val_accuracy": 0.95, "test_accuracy": 0.94}, "widths": {"stem": 4}},
        "dense_costs": dict.fromkeys(COSTS, 1000),
        "costs": dict.fromkeys(COSTS, 400),
        "input_shape": [1, 8, 8],
        "origin": {"name": "resnet20", "classes": ["zero", "one"]},
    }
    settings: dict[str, Any] = {
        "title": "digits, trial 5",
        "document": document,
        "dense": {"val_accuracy": 0.97},
        "files": ["model.safetensors", "policy.json", "model.onnx"],
        "made": {"search": "digits"},
    }
    return Card(**(settings | changes))


def test_a_card_tells_what_was_measured_and_nothing_else() -> None:
    text = card_markdown(make_card())
    assert text.startswith("# digits, trial 5\n\nA structurally pruned network with 40% of the MACs")
    assert "| val accuracy | 97.00% | 95.00% | -2.0 points |" in text
    assert "| test accuracy | – | 94.00% | – |" in text
    assert "| `stem` | 4 of 16 |" in text
    assert "autoprune.load(folder)" in text
    assert "onnxruntime" in text
    assert "torch.export.load" not in text
    assert "By class" not in text
    assert "latency" not in text.lower()
    assert "zero, one" in text


def test_a_card_tells_latency_classes_and_settings_where_they_are_given() -> None:
    times = {"device": "cpu", "dense_ms": 2.0, "dense_spread_ms": 0.1, "pruned_ms": 1.0, "pruned_spread_ms": 0.1}
    times |= {"batch": 4, "dtype": "bfloat16", "threads": 1}
    nan = float("nan")
    scores = ClassScores("val", 10, 0.9, 0.8, [("one", 10, 0.9, 0.8), ("none", 0, nan, nan)])
    text = card_markdown(make_card(latency=times, scores=[scores], settings={"schema": 1, "name": "digits"}))
    assert "| measured latency | 2.00 ms (IQR 0.1) | 1.00 ms (IQR 0.1) | 2.00 times as fast |" in text
    assert "Latency: median of repeated passes, batch 4, bfloat16, on cpu with 1 thread." in text
    assert "## By class, val (10 samples)" in text
    assert "| one | 10 | 90.0% | 80.0% | -10.0 |" in text
    assert "| none | 0 | – | – | – |" in text
    assert '"name": "digits"' in text


def test_a_model_without_a_known_builder_says_that_a_factory_is_needed() -> None:
    document = {**make_card().document, "origin": {"class": "my.Net"}}
    assert "autoprune.load(folder, factory)" in card_markdown(make_card(document=document))
