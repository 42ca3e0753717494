"""The report's page and its figures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from autoprune.prices import BALANCED, ErrorCurve, Explanation, GroupPrice
from autoprune.report import (
    FailureRow,
    FrontPoint,
    PageData,
    RungPair,
    RungTime,
    SearchView,
    chosen_points,
    front_figure,
    latency_figure,
    render_page,
    sensitivity_figure,
    time_figure,
)

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"
CURVE = ErrorCurve((4, 8, 16), (0.5, 0.1, 0.0))
CURVES = {name: {"obs": CURVE, "l2": CURVE} for name in ("layer1.conv", "layer2.conv")}


def why(group: str = "layer1.conv") -> Explanation:
    row = GroupPrice(group, 16, 8, "obs", 0.1, 1.0, 0.5, None, None, 8, BALANCED)
    return Explanation("macs", 1_000_000, 500_000, 0.1, None, 500_000, 0.1, (row,))


def page_data(view: SearchView, **changes: Any) -> PageData:
    known: dict[str, Any] = {
        "about": (("model", "resnet20"), ("commit", "")),
        "curves": CURVES,
        "explanations": {0: why(), 1: why(), 3: why()},
        "policies": {1: "abc123"},
        "pairs": (RungPair("screen", "tune", ((0, 0.5, 0.6), (1, 0.7, 0.8)), 1.0, 0.0, "it ranks badly"),),
        "times": (RungTime("screen", 2, 1, {"fine_tuning": 3.0, "surgery": 0.5}, 7.0),),
        "failures": (FailureRow("tune", 4, "sampler", "diverged at epoch 2"),),
        "settings": "schema: 1\nname: digits\n",
        "commands": (("autoprune search space.yaml", "again"),),
        **changes,
    }
    return PageData(view, **known)


class Elements(HTMLParser):
    """Checks that elements are closed in order, and collects them."""

    EMPTY = frozenset({"meta", "link", "br", "wbr", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def embedded(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.S)
    assert found is not None
    return dict(json.loads(found[1]))


def test_the_page_holds_every_section_its_figures_and_nothing_from_elsewhere(view: SearchView) -> None:
    text = render_page(page_data(view))
    elements = Elements(text)
    ids = {attrs.get("id") for _, attrs in elements.seen}
    assert {"front", "chosen-points", "why-these-widths", "widths", "sensitivity", "proxy-audit", "time"} <= ids
    figures = embedded(text)
    assert set(figures) == {"figure-front", "figure-widths", "figure-sensitivity", "figure-audit-0", "figure-time"}
    assert set(figures) <= ids
    assert {href for tag, attrs in elements.seen if tag == "a" and (href := attrs["href"])} <= {f"#{i}" for i in ids}
    assert not [attrs for _, attrs in elements.seen if (attrs.get("src") or attrs.get("href") or "#")[0] != "#"]
    assert len(text.encode()) < 6e6
    for words in ("diverged at epoch 2", "it ranks badly", "abc123", "name: digits", "autoprune search space.yaml"):
        assert words in text


def test_names_from_users_are_text_in_every_section(view: SearchView) -> None:
    points = tuple(replace(p, criterion=HOSTILE, origin=HOSTILE, widths={HOSTILE: 8}) for p in view.trials)
    controls = tuple(replace(c, origin=HOSTILE) for c in view.controls)
    bad = replace(view, name=HOSTILE, rung=HOSTILE, trials=points, controls=controls, sizes={HOSTILE: 16})
    bad = replace(bad, notes=(HOSTILE,))
    data = page_data(
        bad,
        about=((HOSTILE, HOSTILE),),
        curves={HOSTILE: {HOSTILE: CURVE}},
        explanations={1: why(HOSTILE)},
        unexplained={0: HOSTILE},
        policies={1: HOSTILE},
        pairs=(RungPair(HOSTILE, HOSTILE, ((0, 0.5, 0.6),), 1.0, 0.0, HOSTILE),),
        times=(RungTime(HOSTILE, 1, 0, {HOSTILE: 1.0}),),
        failures=(FailureRow(HOSTILE, 1, HOSTILE, HOSTILE),),
        settings=HOSTILE,
        commands=((HOSTILE, HOSTILE),),
    )
    text = render_page(data)
    elements = Elements(text)
    assert not [tag for tag, _ in elements.seen if tag == "img"]
    assert len([tag for tag, _ in elements.seen if tag == "script"]) == 3
    for figure in embedded(text).values():
        drawn = dict(figure, data=[{k: v for k, v in t.items() if k != "meta"} for t in figure["data"]])
        drawn["layout"] = {k: v for k, v in figure["layout"].items() if k != "updatemenus"}  # buttons: set as text
        assert "<img" not in json.dumps(drawn)


def test_an_older_search_gets_a_page_that_says_what_is_missing(view: SearchView) -> None:
    said = "This search stored no tables."
    empty: dict[str, Any] = {"curves": {}, "explanations": {}, "settings": "", "pairs": (), "times": (), "failures": ()}
    text = render_page(page_data(view, **empty, unexplained={0: said, 1: said}, missing=said))
    assert text.count(said) == 3  # explanations, sensitivities, settings
    assert "No trial failed." in text
    assert set(embedded(text)) == {"figure-front", "figure-widths"}


def test_a_search_without_a_finished_trial_gets_a_page_too(view: SearchView) -> None:
    text = render_page(page_data(replace(view, trials=()), explanations={}))
    Elements(text)
    assert "No trial of the rung tune has finished yet." in text


def test_the_chosen_points_are_named_once_each(view: SearchView, make_point: Callable[..., FrontPoint]) -> None:
    assert [(what, p.trial) for what, p in chosen_points(view)] == [("smallest", 0), ("knee", 1), ("most accurate", 3)]
    one = replace(view, trials=(make_point(5, 0.5, 0.9),))
    assert [(what, p.trial) for what, p in chosen_points(one)] == [("smallest and most accurate", 5)]
    assert chosen_points(replace(view, trials=())) == []


def test_test_accuracies_carry_their_standard_error_or_the_spread_over_seeds(view: SearchView) -> None:
    trials = (
        replace(view.trials[0], test_accuracy=0.8),
        replace(view.trials[1], test_accuracy=0.9, metrics={"test_accuracy_spread": 0.05}),
        *view.trials[2:],
    )
    tested = replace(view, trials=trials, samples={"test": 100})
    margin = tested.margin(trials[0])
    assert margin is not None
    assert margin[0] == pytest.approx(0.04)
    assert margin[1] == "binomial standard error, 100 samples"
    assert tested.margin(trials[1]) == (0.05, "standard deviation over seeds")
    assert tested.margin(trials[2]) is None
    assert replace(tested, samples={}).margin(trials[0]) is None
    drawn = next(t for t in front_figure(tested).data if t.name == "front, test accuracy")
    assert list(drawn.error_y.array) == pytest.approx([4.0, 5.0])
    assert "± 4.00 (binomial standard error, 100 samples)" in drawn.customdata[0][0]
    assert "80.0% <span class='unit'>± 4.0</span>" in render_page(page_data(tested))


def test_trials_far_below_the_front_do_not_press_it_flat(
    view: SearchView, make_point: Callable[..., FrontPoint]
) -> None:
    assert front_figure(view).layout.yaxis.range is None
    low = replace(view, controls=(), trials=(*view.trials, make_point(8, 0.3, 0.1), make_point(9, 0.3, 0.2)))
    figure = front_figure(low)
    assert figure.layout.yaxis.range[0] == pytest.approx(80 - 8)
    assert any("2 trials lie below the picture" in note.text for note in figure.layout.annotations)


def test_each_criterion_has_its_lines_and_the_policy_is_marked_on_those_that_it_uses(view: SearchView) -> None:
    figure = sensitivity_figure(CURVES, view.sizes, why())
    assert [button.label for button in figure.layout.updatemenus[0].buttons] == ["obs", "l2"]
    shown = [t for t in figure.data if t.visible]
    assert {t.meta for t in shown} == {"obs"}
    (mark,) = [t for t in figure.data if t.mode == "markers"]
    assert (mark.name, mark.meta, list(mark.x), list(mark.y)) == ("layer1.conv", "obs", [50.0], [0.1])
    line = next(t for t in shown if t.mode == "lines")
    assert list(line.x) == [75.0, 50.0]  # an error of nothing has no place on a logarithmic axis
    assert figure.layout.yaxis.type == "log"


def test_latency_is_drawn_against_the_prediction_where_there_is_one(view: SearchView) -> None:
    timed = [replace(p, metrics={"latency_ms": 2.0, "latency_spread_ms": 0.4}) for p in view.trials]
    figure = latency_figure(replace(view, trials=tuple(timed)))
    assert "of dense" in figure.layout.xaxis.title.text
    assert list(next(t for t in figure.data if t.name == "front").error_y.array) == pytest.approx([0.2] * 3)
    known = [replace(p, metrics={**p.metrics, "latency_predicted_ms": 1.5}) for p in timed]
    figure = latency_figure(replace(view, trials=tuple(known)))
    assert figure.layout.xaxis.title.text == "predicted latency (ms)"
    assert list(next(t for t in figure.data if t.name == "front").x) == [1.5] * 3


def test_the_time_is_stacked_by_stage_longest_first() -> None:
    times = [RungTime("screen", 2, 0, {"surgery": 1.0}), RungTime("tune", 2, 0, {"surgery": 1.0, "fine_tuning": 9.0})]
    figure = time_figure(times)
    assert [(bar.name, list(bar.x)) for bar in figure.data] == [("fine tuning", [0.0, 9.0]), ("surgery", [1.0, 1.0])]
