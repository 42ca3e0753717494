"""Views of a search by a metric of the user's own: nothing assumes that its values lie between 0 and 1."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from autoprune.objective import Objective
from autoprune.report import (
    Compared,
    FrontPoint,
    PageData,
    Progress,
    RungPair,
    SearchView,
    audit_figure,
    front_figure,
    front_json,
    front_png,
    plot_front,
    render_comparison,
    render_front,
    render_page,
    render_status,
    status_page,
)
from autoprune.report.intervals import hypervolume_interval
from autoprune.report.markdown import comparison_markdown, front_markdown

OWN = Objective("r2", percent=False)
SCALES = {"large": 2e3, "negative": -2e2, "huge": 1e300, "tiny": -1e-9, "equal": 0.0}


def scaled(view: SearchView, scale: float) -> SearchView:
    """Returns the same search measured by an own metric: negative ones fall where the accuracy does."""

    def of(point: FrontPoint) -> FrontPoint:
        value = scale * (point.val_accuracy if scale >= 0 else 1.0 - point.val_accuracy)
        return replace(point, val_accuracy=value, test_accuracy=value)

    dense = of(view.dense)
    return replace(
        view,
        dense=dense,
        trials=tuple(map(of, view.trials)),
        controls=tuple(map(of, view.controls)),
        objective=OWN,
        reference=(1.0 - OWN.worst(dense.val_accuracy), 1.0),
        notes=(OWN.note,),
    )


@pytest.fixture(params=SCALES.values(), ids=SCALES.keys())
def own(view: SearchView, request: pytest.FixtureRequest) -> SearchView:
    return scaled(view, request.param)


def test_the_front_its_knee_and_the_order_are_those_of_the_accuracy(view: SearchView) -> None:
    for scale in (2e3, -2e2, 1e300, -1e-9):
        own = scaled(view, scale)
        assert [p.trial for p in own.front] == [p.trial for p in view.front]
        assert own.knee is not None
        assert view.knee is not None
        assert own.knee.trial == view.knee.trial


def test_the_hypervolume_is_never_negative_and_says_where_it_begins(own: SearchView) -> None:
    text = " ".join(render_front(own).split())
    worst = OWN.worst(own.dense.val_accuracy)
    assert own.hypervolume >= 0
    assert f"(reference point: val r2 {OWN.text(worst)}, MACs 1 of dense" in text
    worse = sum(p.val_accuracy <= worst for p in own.front)
    assert ("of the front are worse and add nothing" in text) == (worse > 0)
    assert hypervolume_interval(own, own.trials) is None
    assert own.margin(own.trials[0]) is None


def test_no_view_of_it_shows_a_percent_sign_behind_it_or_calls_it_accuracy(own: SearchView) -> None:
    points = [p for p in own.trials if p.trial is not None][:2]
    texts = {
        "front": render_front(own),
        "narrow": render_front(own, console_width=90),
        "compare": render_comparison(own, [Compared(p, "tune", {}) for p in points]),
        "markdown": front_markdown(own, {}),
        "comparison": comparison_markdown(own, points[0]),
        "picture": plot_front(own),
    }
    for name, text in texts.items():
        assert "accuracy" not in text, name
        assert "val acc" not in text, name
        assert "val r2" in text, name
        assert "points |" not in text, name
        if name != "picture":
            assert OWN.text(points[0].val_accuracy) in text or OWN.text(points[0].val_accuracy, 2) in text, name
        assert not re.search(rf"(?<![0-9]){re.escape(OWN.text(own.dense.val_accuracy))}%", text), name


def test_the_picture_of_characters_keeps_its_axis_straight(own: SearchView) -> None:
    lines = plot_front(own).splitlines()
    assert lines[0] == "val r2 (higher is better)"
    assert len({re.search("[│└]", line).start() for line in lines[1:-2]}) == 1  # type: ignore[union-attr]
    assert any("★" in line for line in lines)


def test_figures_are_drawn_to_the_scale_of_the_metric(own: SearchView, tmp_path: Path) -> None:
    figure = json.loads(front_figure(own).to_json())
    assert figure["layout"]["yaxis"]["title"]["text"] == "r2 (higher is better): validation, and test"
    assert not figure["layout"]["yaxis"].get("ticksuffix")
    assert figure["layout"]["title"]["text"] == "digits: r2 against multiply-accumulates"
    front = next(trace for trace in front_figure(own).data if trace.name == "front")
    assert list(front.y) == [p.val_accuracy for p in own.front]
    assert front_png(own, tmp_path / "front.png").stat().st_size > 1000


def test_the_page_tells_name_and_direction(own: SearchView) -> None:
    pair = RungPair("screen", "tune", ((0, -192.4, 1924.0),), 1.0, 0.5, objective=OWN)
    page = render_page(PageData(own, (), pairs=(pair,)))
    body = page.split("<body>")[1].split("<script")[0]
    assert "accura" not in body
    assert "`r2` is maximised: higher is better." in body
    assert "<td>0.500</td>" in body  # the regret
    drawn = json.loads(audit_figure(pair).to_json())
    assert drawn["layout"]["xaxis"]["title"]["text"] == "validation r2 on screen (higher is better)"
    assert (drawn["data"][0]["x"], drawn["data"][0]["y"]) == ([-192.4], [1924.0])


def test_the_live_line_names_it_and_its_direction() -> None:
    out = io.StringIO()
    progress = Progress(file=out)
    progress.objective = OWN
    progress.rung_started("tune", total=2)
    progress.trial_finished(val_accuracy=-192.4, cost=1.0)
    progress.trial_finished(val_accuracy=-300.0, cost=0.5)
    progress.rung_finished()
    assert "best val r2 -192.4 (higher is better), front 2" in out.getvalue()


def test_the_state_of_searches_shows_each_best_value_in_its_own_way() -> None:
    row = {"state": "finished", "rung": "tune", "done": 4, "total": 4, "priority": None, "reason": ""}
    rows = [
        {**row, "name": "a", "best": 0.834},
        {**row, "name": "b", "best": -192.4, "objective": OWN.to_json()},
        {**row, "name": "c", "best": None, "objective": OWN.to_json()},
    ]
    data = {"service": None, "runner": False, "rows": rows, "home": "/h"}
    for text in (render_status(data), status_page(data)):
        assert "best on val" in text
        assert "83.4%" in text
        assert "r2 -192.4" in text
        assert "-192.4%" not in text
    assert "best val acc" in render_status({**data, "rows": rows[:1]})


def test_programs_read_what_the_metric_is(view: SearchView) -> None:
    assert front_json(view)["objective"] == {"name": "accuracy", "percent": True}
    assert front_json(scaled(view, 2e3))["objective"] == {"name": "r2", "percent": False}
