"""Pictures of how a search went: sensitivities, how rungs rank, where the time went, latency.

Decides colours, axes and what a mark says when it is pointed at. Must not know where the values come from.
"""

from __future__ import annotations

import html
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autoprune.objective import ACCURACY, Objective
from autoprune.prices import Curves, Explanation
from autoprune.report import units
from autoprune.report.figures import CONTROL, DENSE, FRONT, GRID, INK, TRIAL, layout
from autoprune.report.view import SearchView

if TYPE_CHECKING:
    import plotly.graph_objects as go

_DEPTH = ((0.0, "#00796b"), (0.5, "#f9a825"), (1.0, "#c2185b"))
_STAGES = ("#c2185b", "#00796b", "#f9a825", "#5c6bc0", "#8d6e63", "#78909c", "#26a69a", "#ab47bc")
_LEGEND = 16
"""More groups than this have no legend: pointing at a line names it."""


@dataclass(frozen=True, slots=True)
class RungTime:
    """Where the time of a rung went.

    `trials` counts the evaluations (a result that was taken over is none), `seconds` adds up their stages, and `span`
    is the wall time from the rung's first trial to its last end; None where nobody knows.
    """

    rung: str
    trials: int
    failed: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    span: float | None = None


@dataclass(frozen=True, slots=True)
class RungPair:
    """Two rungs in a row: what both measured, as (trial, first accuracy, second accuracy), and the audit's numbers.

    `objective` says what the accuracies are.
    """

    first: str
    second: str
    points: tuple[tuple[int, float, float], ...]
    tau: float | None
    regret: float | None
    warning: str | None = None
    objective: Objective = ACCURACY


def sensitivity_figure(
    curves: Curves, sizes: Mapping[str, int], marked: Explanation | None = None, *, unit: str = "channels"
) -> go.Figure:
    """Returns the error of every group against the fraction of it that is removed; a button a criterion.

    Args:
        curves: Group → criterion → error curve.
        sizes: Dense widths, in the network's order, which colours the lines.
        marked: An explained policy, whose widths are marked on the lines of the criteria that it uses.
        unit: What widths count.
    """
    import plotly.graph_objects as go

    names = [name for name in sizes if curves.get(name)]
    marks = {row.group: row for row in marked.groups if row.width < row.size} if marked is not None else {}
    used = Counter(row.criterion for row in marks.values())
    criteria = sorted(dict.fromkeys(c for name in names for c in curves[name]), key=lambda c: -used[c])
    figure = go.Figure()
    for criterion in criteria:
        for place, name in enumerate(names):
            curve, size = curves[name].get(criterion), sizes[name]
            if curve is None:
                continue
            color = _along(place / max(1, len(names) - 1))
            said = f"{html.escape(name)}<br>%{{x:.0f}}% of {size} {unit} removed<br>error %{{y:.3g}}<extra></extra>"
            common = {"name": html.escape(name), "visible": criterion == criteria[0], "meta": criterion}
            # A logarithmic axis has no place for an error of nothing, at full width.
            known = [(w, e) for w, e in zip(curve.widths, curve.errors, strict=True) if e > 0]
            x, y = [100.0 * (1.0 - w / size) for w, _ in known], [e for _, e in known]
            line = {"color": color, "width": 1.8}
            figure.add_trace(go.Scatter(x=x, y=y, mode="lines", line=line, hovertemplate=said, **common))
            row = marks.get(name)
            if row is not None and row.criterion == criterion and row.error > 0:
                ring = {"color": color, "size": 9, "line": {"width": 1.2, "color": "white"}}
                x, y = [100.0 * (1.0 - row.width / size)], [row.error]
                mark = go.Scatter(x=x, y=y, mode="markers", marker=ring, hovertemplate=said, **common)
                figure.add_trace(mark.update(showlegend=False))
    figure.update_layout(**layout("error of each pruning group", height=560), showlegend=len(names) <= _LEGEND)
    if len(criteria) > 1:
        figure.update_layout(updatemenus=[_buttons(figure, criteria)], margin={"t": 100})
    figure.update_xaxes(title_text=f"{unit} removed (%)", ticksuffix="%", gridcolor=GRID, zeroline=False)
    title = "error (part of the consumers' output)"
    figure.update_yaxes(title_text=title, type="log", exponentformat="power", gridcolor=GRID, zeroline=False, dtick=1)
    return figure


def _buttons(figure: go.Figure, criteria: Sequence[str]) -> dict[str, Any]:
    """Returns a row of buttons that show the lines of one criterion each."""
    buttons = [
        {"label": c, "method": "restyle", "args": [{"visible": [trace.meta == c for trace in figure.data]}]}
        for c in criteria
    ]
    place = {"type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1.12, "yanchor": "bottom"}
    return {**place, "buttons": buttons, "showactive": True}


def audit_figure(pair: RungPair) -> go.Figure:
    """Returns what two rungs measured of the same policies: the first across, the second upwards."""
    import plotly.graph_objects as go

    own = pair.objective
    said = [
        f"trial {number} of {html.escape(pair.first)}<br>{html.escape(pair.first)} {own.text(a, 2)}"
        f"<br>{html.escape(pair.second)} {own.text(b, 2)}"
        for number, a, b in pair.points
    ]
    figure = go.Figure(
        go.Scatter(
            x=[own.scale * a for _, a, _ in pair.points],
            y=[own.scale * b for _, _, b in pair.points],
            mode="markers",
            marker={"color": FRONT, "size": 9, "opacity": 0.8},
            customdata=said,
            hovertemplate="%{customdata}<extra></extra>",
            name="policies",
        )
    )
    figure.update_layout(**layout(f"{html.escape(pair.first)} against {html.escape(pair.second)}", height=400))
    axis = {"ticksuffix": own.suffix, "gridcolor": GRID, "zeroline": False}
    figure.update_xaxes(title_text=html.escape(own.axis("val", on=pair.first)), **axis)
    figure.update_yaxes(title_text=html.escape(own.axis("val", on=pair.second)), **axis)
    return figure


def time_figure(times: Sequence[RungTime]) -> go.Figure:
    """Returns the seconds that each rung's evaluations took, by stage."""
    import plotly.graph_objects as go

    stages = sorted(
        {stage for time in times for stage in time.seconds},
        key=lambda stage: -sum(time.seconds.get(stage, 0.0) for time in times),
    )
    figure = go.Figure()
    for place, stage in enumerate(stages):
        name = html.escape(stage.replace("_", " "))
        figure.add_trace(
            go.Bar(
                y=[html.escape(time.rung) for time in times],
                x=[time.seconds.get(stage, 0.0) for time in times],
                customdata=[units.seconds(time.seconds.get(stage, 0.0)) for time in times],
                orientation="h",
                name=name,
                marker={"color": _STAGES[place % len(_STAGES)]},
                hovertemplate=f"%{{y}}, {name}: %{{customdata}}<extra></extra>",
            )
        )
    figure.update_layout(**layout("time by rung and stage", height=190 + 42 * len(times)), barmode="stack", bargap=0.35)
    figure.update_xaxes(title_text="time of all evaluations (s)", gridcolor=GRID, zeroline=False)
    figure.update_yaxes(title_text="rung", autorange="reversed", showgrid=False)
    return figure


def latency_figure(view: SearchView) -> go.Figure:
    """Returns the measured latency of every trial: against the predicted one where there is one, else against cost.

    A bar is the spread (the distance of the quartiles) of the repeated measurements.
    """
    import plotly.graph_objects as go

    predicted = [p for p in view.trials if "latency_predicted_ms" in p.metrics and _latency(p) is not None]
    measured = predicted or [p for p in view.trials if _latency(p) is not None]
    on_front = {id(p) for p in view.front}

    def across(point: Any) -> float:
        return float(point.metrics["latency_predicted_ms"]) if predicted else 100.0 * view.fraction(point)

    def marks(points: Sequence[Any], name: str, marker: dict[str, Any]) -> go.Scatter:
        spread = [0.5 * p.metrics.get("latency_spread_ms", 0.0) for p in points]
        below = [min(bar, p.metrics["latency_ms"]) for bar, p in zip(spread, points, strict=True)]
        return go.Scatter(
            x=[across(p) for p in points],
            y=[p.metrics["latency_ms"] for p in points],
            error_y={"array": spread, "arrayminus": below, "color": TRIAL, "thickness": 1.2, "width": 3},
            mode="markers",
            name=name,
            marker=marker,
            customdata=[html.escape("dense network" if p is view.dense else f"trial {p.name}") for p in points],
            hovertemplate="%{customdata}: %{y:.3g} ms<extra></extra>",
        )

    figure = go.Figure()
    others = [p for p in measured if id(p) not in on_front]
    if others:
        figure.add_trace(marks(others, "other trials", {"color": TRIAL, "size": 8}))
    figure.add_trace(marks([p for p in measured if id(p) in on_front], "front", {"color": FRONT, "size": 10}))
    if "latency_ms" in view.dense.metrics and (not predicted or "latency_predicted_ms" in view.dense.metrics):
        star = {"color": DENSE, "size": 15, "symbol": "star", "line": {"width": 1, "color": INK}}
        figure.add_trace(marks([view.dense], "dense network", star))
    figure.update_layout(**layout("measured latency", height=430))
    if predicted:
        most = max(max(across(p), p.metrics["latency_ms"]) for p in measured)
        line = {"color": CONTROL, "dash": "dot", "width": 1.2}
        figure.add_trace(
            go.Scatter(x=[0, most], y=[0, most], mode="lines", line=line, name="as predicted", hoverinfo="skip")
        )
        figure.update_xaxes(title_text="predicted latency (ms)", gridcolor=GRID, zeroline=False)
    else:
        figure.update_xaxes(title_text=f"{units.AXES[view.primary]} (% of dense)", ticksuffix="%", gridcolor=GRID)
        figure.update_xaxes(zeroline=False)
    # A bar may run off the picture: on a busy machine a spread is many times the median.
    top = 1.3 * max(value for trace in figure.data for value in trace.y)
    figure.update_yaxes(title_text="measured latency (ms)", range=[0, top], gridcolor=GRID, zeroline=False)
    return figure


def has_latency(view: SearchView) -> bool:
    """Whether any trial's latency was measured."""
    return any(_latency(point) is not None for point in view.trials)


def _latency(point: Any) -> float | None:
    value = point.metrics.get("latency_ms", math.nan)
    return float(value) if math.isfinite(value) else None


def _along(part: float) -> str:
    """Returns the colour at `part` of the way from the network's first group to its last."""
    for (low, first), (high, second) in itertools.pairwise(_DEPTH):
        if part <= high:
            share = (part - low) / (high - low)
            mixed = [
                round(int(first[i : i + 2], 16) * (1 - share) + int(second[i : i + 2], 16) * share) for i in (1, 3, 5)
            ]
            return "#" + "".join(f"{value:02x}" for value in mixed)
    return _DEPTH[-1][1]
