"""Explanations and comparisons as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from autoprune.prices import BALANCED, CHEAP, DEAR, FIXED, FREE, Explanation, GroupPrice, Step
from autoprune.report import (
    Compared,
    FrontPoint,
    SearchView,
    comparison_json,
    explanation_json,
    render_comparison,
    render_explanation,
)
from autoprune.report.comparison import widest_differences
from autoprune.report.explanation import sentence

DOWN, UP = Step(11, 0.2, -50, 0.3), Step(13, -0.1, 50, 0.1)


def row(verdict: str = BALANCED, **changes: object) -> GroupPrice:
    known = GroupPrice("layer1.conv", 16, 12, "obs", 0.25, 1.0, 0.4, DOWN, UP, 10, verdict)
    return replace(known, **changes)  # type: ignore[arg-type]


def why(*rows: GroupPrice) -> Explanation:
    return Explanation("macs", 1_000_000, 500_000, 0.75, 0.2, 490_000, 1.25, rows or (row(),))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            row(),
            "keeps 12 of 16, 2 more than a uniform policy of the same cost: in balance; a step down adds 1.5 times",
        ),
        (row(uniform=12), "as a uniform policy of the same cost would"),
        (row(CHEAP, uniform=14), "2 fewer than a uniform policy of the same cost: a step down to 11 adds only 1.5"),
        (row(DEAR), "a step up to 13 takes away 0.5 times the going error for what it costs, so it could use more"),
        (row(width=16, up=None), "keeps all 16, 6 more than a uniform policy of the same cost: removing more adds"),
        (row(down=None), "as narrow as it may be"),
        (row(FIXED), "the only width that it may have"),
        (row(FREE), "its width does not change the MACs"),
        (row(down=replace(DOWN, price=0.2)), "a step down adds about the going error"),
        (row(down=replace(DOWN, price=1e9)), "a step down adds over 100 times the going error"),
        (row(down=replace(DOWN, price=None)), "a step down adds an unknown error"),
        (row(up=replace(UP, price=0.0)), "takes away less than 0.01 times the going error"),
    ],
)
def test_each_verdict_is_a_sentence(given: GroupPrice, said: str) -> None:
    assert said in sentence(why(), given)


def test_the_cheapest_quarter_is_named_as_such_where_there_are_enough_groups() -> None:
    rows = [row(CHEAP, group=f"g{i}", down=replace(DOWN, price=0.01 * (i + 1))) for i in range(8)]
    found = [sentence(why(*rows), r) for r in rows]
    assert ["cheapest quarter" in text for text in found] == [True] * 2 + [False] * 6
    assert ["dearest quarter" in text for text in found] == [False] * 6 + [True] * 2
    assert "cheapest quarter" not in sentence(why(*rows[:4]), rows[0])


def test_weights_are_a_column_where_there_are_any_and_unusual_ones_a_sentence(view: SearchView) -> None:
    heavy, usual = row(weight=1.7), row(group="layer2.conv", weight=0.9)
    assert sentence(why(), heavy).endswith(" Its error matters 1.7 times the average.")
    assert "average" not in sentence(why(), usual)
    text = render_explanation(view, view.trials[1], why(heavy, usual))
    assert "weight" in text
    assert "as this search's trials teach" in text
    assert "weight" not in render_explanation(view, view.trials[1], why())


def test_the_text_holds_a_row_and_a_sentence_a_group(view: SearchView) -> None:
    text = render_explanation(view, view.trials[1], why(row(), row(DEAR, group="layer2.conv")))
    assert "digits, trial 1: validation accuracy 93.0% (dense 96.0%)" in text
    assert "Keeps 500k MACs (50% of dense) at a total error of 0.750; a uniform policy of 490k MACs has 1.250" in text
    assert text.count("layer2.conv") == 2
    assert "▲" in text
    assert "\x1b" not in text
    assert "\x1b[" in render_explanation(view, view.trials[1], why(), color=True)


def test_the_explanation_is_plain_json(view: SearchView) -> None:
    data = json.loads(json.dumps(explanation_json(view, view.trials[1], why(row(down=None, share=None)))))
    assert data["trial"] == 1
    (group,) = data["groups"]
    assert group["down"] is None
    assert group["up"] == {"width": 13, "error": -0.1, "cost": 50, "error_per_percent": 0.1}
    assert group["sentence"].startswith("keeps 12 of 16")


def compared(view: SearchView) -> list[Compared]:
    first = replace(view.trials[0], widths={"layer1.conv": 4, "layer2.conv": 8}, metrics={"latency_ms": 0.4321})
    second = replace(view.trials[1], widths={"layer1.conv": 12, "layer2.conv": 16})
    return [
        Compared(first, "final", {"layer1.conv": "obs", "layer2.conv": "l2"}),
        Compared(second, "final", {"layer1.conv": "obs", "layer2.conv": "obs"}),
    ]


def test_the_group_that_differs_most_is_marked(view: SearchView) -> None:
    assert widest_differences(view, compared(view)) == ["layer1.conv", "layer2.conv"]
    text = render_comparison(view, compared(view))
    line = next(line for line in text.splitlines() if line.startswith("layer1.conv"))
    assert line.split() == ["layer1.conv", "16", "4", "obs", "25%", "12", "obs", "75%", "◄", "differs", "most"]
    assert "0.432 ms" in text
    assert "different rungs" not in text


def test_equal_widths_are_not_marked_and_mixed_rungs_are_named(view: SearchView) -> None:
    same = compared(view)[0]
    assert widest_differences(view, [same, same]) == []
    text = render_comparison(view, [same, replace(same, rung="tune")])
    assert "◄" not in text
    assert "measured on different rungs (final, tune)" in text


def test_the_comparison_is_plain_json(view: SearchView, make_point: Callable[..., FrontPoint]) -> None:
    data = json.loads(json.dumps(comparison_json(view, compared(view))))
    assert [t["trial"] for t in data["trials"]] == [0, 1]
    assert data["trials"][0]["widths"] == {"layer1.conv": 4, "layer2.conv": 8}
    assert data["trials"][0]["fractions"]["macs"] == 0.25
    assert data["largest_differences"] == ["layer1.conv", "layer2.conv"]
