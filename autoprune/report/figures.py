"""The front and the widths as pictures: interactive pages (plotly) and PNG files (matplotlib's Agg, no browser needed).

Decides colours, axes and what a point says when it is pointed at. Must not know where pictures are stored.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprune.cost import LATENCY
from autoprune.policy import CHANNEL
from autoprune.report import units
from autoprune.report.clicks import CLICK, click_script
from autoprune.report.view import FrontPoint, SearchView

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.axes import Axes

FRONT = "#c2185b"
TRIAL = "#a9b4c2"
CONTROL = "#00796b"
DENSE = "#f9a825"
TEST = "#5c6bc0"
INK = "#263238"
GRID = "#e6eaee"
_SCALE = ((0.0, "#fff4f7"), (0.25, "#f6bdd0"), (0.5, "#e2739b"), (0.75, "#c2185b"), (1.0, "#6a0d33"))
_LONGEST_NAME = 34
_NUMBERED = 20
"""A heat map of more columns has no room for numbers."""
_WIDE = 12.0
"""Costs that differ by more than this factor are drawn on a logarithmic axis: else small networks lie on a heap."""
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def front_figure(view: SearchView, *, links: Mapping[int, str] | None = None) -> go.Figure:
    """Returns the interactive front: all trials grey, the front as a line, controls, and the dense network as a star.

    x is the primary cost in percent of dense, y the validation accuracy in percent, or an own metric as it is. Pointing
    at a mark shows trial, accuracies, costs, criterion and origin.

    Args:
        view: The search.
        links: Where a click on a trial leads, by its number: addresses after the server's own, for `figure_html`.
    """
    import pandas  # noqa: F401 - plotly asks for it, and MLflow's thread may be in the middle of importing it
    import plotly.graph_objects as go

    front = view.front
    on_front = {id(p) for p in front}
    others = [p for p in view.trials if id(p) not in on_front]
    figure = go.Figure()
    figure.add_trace(_marks(view, others, "other trials", {"color": TRIAL, "size": 8, "opacity": 0.75}))
    if view.controls:
        style = {"color": CONTROL, "size": 10, "symbol": "diamond-open", "line": {"width": 2, "color": CONTROL}}
        figure.add_trace(_marks(view, view.controls, "controls (uniform, global)", style))
    line = _marks(view, front, "front", {"color": FRONT, "size": 11, "line": {"width": 1.5, "color": "white"}})
    named = _named(view)
    text = [p.name if id(p) in named else "" for p in front]
    line.update(mode="lines+markers+text", line={"color": FRONT, "width": 2.5}, text=text, textposition="top left")
    figure.add_trace(line.update(textfont={"color": FRONT, "size": 11}))
    tested = [p for p in front if p.test_accuracy is not None]
    if tested:
        figure.add_trace(_tested(view, tested))
    if view.knee is not None:
        ring = {"color": "rgba(0,0,0,0)", "size": 22, "line": {"width": 2, "color": FRONT}}
        figure.add_trace(_marks(view, [view.knee], "knee", ring).update(hoverinfo="skip", hovertemplate=None))
    star = {"color": DENSE, "size": 17, "symbol": "star", "line": {"width": 1, "color": INK}}
    figure.add_trace(_marks(view, [view.dense], "dense network", star))
    limit = view.limits.get(view.primary)
    if limit is not None:
        share = 100.0 * limit / view.dense.costs[view.primary]
        note = f"budget {units.cost(view.primary, limit)}"
        figure.add_vline(x=share, line={"dash": "dash", "width": 1.2, "color": INK})
        place = math.log10(share) if _is_wide(view) else share
        figure.add_annotation(x=place, y=1, yref="paper", yanchor="bottom", text=note, showarrow=False)
    figure.update_layout(**layout(f"{html.escape(_titled(view))} against {units.AXES[view.primary]}"))
    figure.update_xaxes(title_text=_cost_axis(view), ticksuffix="%", gridcolor=GRID, zeroline=False)
    if _is_wide(view):
        figure.update_xaxes(type="log", tickvals=list(_TICKS), ticktext=[f"{tick:g}%" for tick in _TICKS])
    title = html.escape(view.objective.axis("val", "test") if tested else view.objective.axis("val"))
    figure.update_yaxes(title_text=title, ticksuffix=view.objective.suffix, gridcolor=GRID, zeroline=False)
    _leave_out_far_below(figure, view)
    if links:
        _link(figure, view, links)
    return figure


def widths_figure(view: SearchView) -> go.Figure:
    """Returns the interactive heat map of what the front's points keep: a row a group, a column a point."""
    import pandas  # noqa: F401 - plotly asks for it, and MLflow's thread may be in the middle of importing it
    import plotly.graph_objects as go

    names, columns, kept = _kept(view)
    heads = [html.escape(p.name) for p in view.front]
    said = [
        [
            f"{html.escape(name)}<br>trial {head}: {point.widths.get(name, size)} of {size} {view.unit}"
            for head, point in zip(heads, view.front, strict=True)
        ]
        for name, size in view.sizes.items()
    ]
    figure = go.Figure(
        go.Heatmap(
            z=kept,
            x=list(range(len(columns))),
            y=list(range(len(names))),
            text=[[str(p.widths.get(name, size)) for p in view.front] for name, size in view.sizes.items()],
            texttemplate="%{text}" if len(columns) <= _NUMBERED else None,
            customdata=said,
            hovertemplate="%{customdata}<br>%{z:.0f}% kept<extra></extra>",
            colorscale=[list(stop) for stop in _SCALE],
            zmin=0,
            zmax=100,
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": f"{view.unit} kept"}, "ticksuffix": "%", "outlinewidth": 0},
        )
    )
    style = layout(f"{html.escape(view.name)}: {view.unit} that each point of the front keeps")
    figure.update_layout(**{**style, "height": max(360, 160 + 22 * len(names))})
    labels = [f"{head}<br>{column}" for head, column in zip(heads, columns, strict=True)]
    title = f"trial, and {units.LABELS[view.primary]} kept of dense"
    figure.update_xaxes(title_text=title, tickvals=list(range(len(labels))), ticktext=labels, showgrid=False)
    figure.update_yaxes(
        title_text="pruning group",
        tickvals=list(range(len(names))),
        ticktext=[html.escape(name) for name in names],
        autorange="reversed",
        showgrid=False,
    )
    return figure


def figure_html(figure: go.Figure, *, address: str | None = None) -> str:
    """Returns a page that holds `figure` and all that it needs, so that it opens without a network (about 5 MB).

    With the `address` of a server, a click on a point that has a link opens it there.
    """
    config = {"displaylogo": False, "responsive": True}
    script = None if address is None else click_script(address)
    page: str = figure.to_html(include_plotlyjs=True, full_html=True, config=config, post_script=script)
    return page


def front_png(view: SearchView, path: Path) -> Path:
    """Draws the front into a PNG file and returns `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    front = view.front
    on_front = {id(p) for p in front}
    _scatter(axes, view, [p for p in view.trials if id(p) not in on_front], label="other trials", color=TRIAL, s=26)
    if view.controls:
        style = {"marker": "D", "facecolors": "none", "edgecolors": CONTROL, "linewidths": 1.5, "s": 36, "zorder": 3}
        _scatter(axes, view, view.controls, label="controls (uniform, global)", **style)
    if front:
        x, y = _coordinates(view, front)
        marks: dict[str, Any] = {"marker": "o", "markersize": 7, "markeredgecolor": "white"}
        axes.plot(x, y, color=FRONT, linewidth=2, label="front", zorder=4, **marks)
        named = _named(view)
        for point, px, py in ((p, px, py) for p, px, py in zip(front, x, y, strict=True) if id(p) in named):
            place: dict[str, Any] = {
                "xytext": (-5, 6),
                "textcoords": "offset points",
                "ha": "right",
                "color": FRONT,
                "fontsize": 8,
            }
            axes.annotate(_plain(point.name), (px, py), **place)
    if view.knee is not None:
        ring = {"facecolors": "none", "edgecolors": FRONT, "linewidths": 1.4, "s": 190, "zorder": 5}
        _scatter(axes, view, [view.knee], label="knee", **ring)
    star = {"marker": "*", "color": DENSE, "edgecolors": INK, "linewidths": 0.7, "s": 210, "zorder": 5}
    _scatter(axes, view, [view.dense], label="dense network", **star)
    limit = view.limits.get(view.primary)
    if limit is not None:
        share = 100.0 * limit / view.dense.costs[view.primary]
        label = f"budget {units.cost(view.primary, limit)}"
        axes.axvline(share, color=INK, linewidth=1, linestyle="--", label=label, zorder=1)
    _dress(axes, f"{_plain(_titled(view))} against {units.AXES[view.primary]}")
    axes.set_xlabel(_cost_axis(view))
    axes.set_ylabel(_plain(view.objective.axis("val")))
    if _is_wide(view):
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        shown = [tick for tick in _TICKS if low <= tick <= high]
        axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
        axes.set_xticks([], minor=True)
    axes.grid(color=GRID)
    axes.margins(x=0.05, y=0.08)
    axes.legend(fontsize=8, loc="lower right", facecolor="white", edgecolor="white", framealpha=1.0)
    figure.savefig(path, format="png", facecolor="white")
    return path


def widths_png(view: SearchView, path: Path) -> Path:
    """Draws the heat map of kept channels into a PNG file and returns `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    names, columns, kept = _kept(view)
    height = max(3.2, 1.5 + 0.26 * len(names))
    figure = Figure(figsize=(max(6.5, 3.4 + 0.62 * len(columns)), height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _dress(axes, f"{_plain(view.name)}: {view.unit} that each point of the front keeps")
    colors = LinearSegmentedColormap.from_list("kept", list(_SCALE))
    if columns and names:
        image = axes.pcolormesh(kept, cmap=colors, vmin=0, vmax=100, edgecolors="white", linewidth=1.5)
        bar = figure.colorbar(image, ax=axes, label=f"{view.unit} kept (%)")
        bar.outline.set_visible(False)
        for row, values in enumerate(kept):
            for column, value in enumerate(values):
                ink = "white" if value > 60 else INK
                axes.text(column + 0.5, row + 0.5, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=7)
    labels = [f"{_plain(p.name)}\n{column}" for p, column in zip(view.front, columns, strict=True)]
    axes.set_xticks([i + 0.5 for i in range(len(labels))], labels, fontsize=7.5)
    axes.set_yticks([i + 0.5 for i in range(len(names))], [_plain(name) for name in names], fontsize=7.5)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set_xlabel(f"trial, and {units.LABELS[view.primary]} kept of dense")
    figure.savefig(path, format="png", facecolor="white")
    return path


def _marks(view: SearchView, chosen: Sequence[FrontPoint], name: str, marker: dict[str, Any]) -> go.Scatter:
    import plotly.graph_objects as go

    x, y = _coordinates(view, chosen)
    return go.Scatter(
        x=x,
        y=y,
        mode="markers",
        name=name,
        marker=marker,
        customdata=[[_said(view, p)] for p in chosen],
        hovertemplate="%{customdata[0]}<extra></extra>",
    )


def _tested(view: SearchView, chosen: Sequence[FrontPoint]) -> go.Scatter:
    """Returns the test values of the front, with a bar of one standard deviation or error to either side."""
    import plotly.graph_objects as go

    scale, name = view.objective.scale, html.escape(view.objective.label("test"))
    margins = [view.margin(p) for p in chosen]
    bars = [scale * margin[0] if margin is not None else 0.0 for margin in margins]
    return go.Scatter(
        x=[100.0 * view.fraction(p) for p in chosen],
        y=[scale * p.test_accuracy for p in chosen if p.test_accuracy is not None],
        error_y={"array": bars, "color": TEST, "thickness": 1.4, "width": 4},
        mode="markers",
        name=f"front, {name}",
        marker={"color": TEST, "size": 7, "symbol": "square"},
        customdata=[[_said(view, p)] for p in chosen],
        hovertemplate="%{customdata[0]}<extra></extra>",
    )


def _link(figure: go.Figure, view: SearchView, links: Mapping[int, str]) -> None:
    """Adds links to the marks of trials, after what they say; and to what they say, that they can be clicked."""
    on_front = {id(p) for p in view.front}
    drawn = {
        "other trials": [p for p in view.trials if id(p) not in on_front],
        "front": view.front,
        f"front, {html.escape(view.objective.label('test'))}": [p for p in view.front if p.test_accuracy is not None],
    }
    for trace in figure.data:
        if trace.name not in drawn:
            continue
        found = ["" if p.trial is None else links.get(p.trial, "") for p in drawn[trace.name]]
        said = zip(trace.customdata, found, strict=True)
        trace.customdata = [[f"{text}<br><i>{CLICK}</i>", link] if link else [text] for (text, *_), link in said]


def _leave_out_far_below(figure: go.Figure, view: SearchView) -> None:
    """Ends the picture below the front where other trials lie so far below that they would press it flat; says so."""
    scale = view.objective.scale
    near = [scale * p.val_accuracy for p in (*view.front, *view.controls, view.dense)]
    near += [scale * p.test_accuracy for p in view.front if p.test_accuracy is not None]
    near = [value for value in near if math.isfinite(value)]
    if len(near) < 2:
        return
    span = max(near) - min(near)
    least = 1.0 if view.objective.percent else 0.01 * max(map(abs, near))  # a percentage point, or a part of a number
    floor = min(near) - max(0.5 * span, least)
    below = [p for p in view.trials if scale * p.val_accuracy < floor]
    if below:
        figure.update_yaxes(range=[floor, max(near) + max(0.12 * span, 0.5 * least)])
        trials = "1 trial lies" if len(below) == 1 else f"{len(below)} trials lie"
        place = {"xref": "paper", "x": 1, "xanchor": "right", "yref": "paper", "y": 0, "yanchor": "bottom"}
        figure.add_annotation(text=f"{trials} below the picture (double-click shows all)", showarrow=False, **place)


def _said(view: SearchView, point: FrontPoint) -> str:
    name = point.origin if point.trial is None else f"trial {point.trial}"
    if point is view.dense:
        name = "dense network"
    own = view.objective
    lines = [f"<b>{html.escape(name)}</b>", f"{html.escape(own.long('val'))} {own.text(point.val_accuracy, 2)}"]
    if point.test_accuracy is not None:
        margin = view.margin(point)
        spread = "" if margin is None else own.spread(margin[0], near=point.test_accuracy, digits=2)
        around = "" if margin is None else f" ± {spread} ({margin[1]})"
        lines.append(f"{html.escape(own.long('test'))} {own.text(point.test_accuracy, 2)}{around}")
    for cost in view.costs:
        share = units.percent(view.fraction(point, cost), 1)
        lines.append(f"{units.LABELS[cost]} {units.cost(cost, point.costs[cost])} ({share} of dense)")
    if "latency_ms" in point.metrics:
        lines.append(f"{'measured' if LATENCY in view.costs else 'latency'} {units.latency(point.metrics)}")
    if point.criterion:
        lines.append(f"criterion {html.escape(point.criterion)}")
    if point.widths and point is not view.dense:
        kept = ", ".join(str(point.widths.get(name, size)) for name, size in view.sizes.items())
        lines.append(f"widths {_folded(kept)}")
    if point.origin and point.trial is not None:
        lines.append(f"proposed by {html.escape(point.origin)}")
    return "<br>".join(lines)


def _folded(text: str) -> str:
    """Breaks a long list into lines, and ends it after the sixth."""
    lines = textwrap.wrap(text, 46)
    return "<br>&nbsp;&nbsp;".join(lines[:6] + (["…"] if len(lines) > 6 else []))


def _coordinates(view: SearchView, chosen: Sequence[FrontPoint]) -> tuple[list[float], list[float]]:
    return [100.0 * view.fraction(p) for p in chosen], [view.objective.scale * p.val_accuracy for p in chosen]


def _is_wide(view: SearchView) -> bool:
    """Whether the costs call for a logarithmic axis."""
    costs = [view.fraction(p) for p in (*view.trials, *view.controls, view.dense)]
    return min(costs) > 0 and max(costs) / min(costs) > _WIDE


def _named(view: SearchView) -> set[int]:
    """Chooses the points (by `id`) whose numbers are written beside them, so that no two numbers lie on each other."""
    front = view.front
    scale = math.log10 if _is_wide(view) else float

    def places(points: Sequence[FrontPoint]) -> tuple[list[float], list[float]]:
        costs, accuracies = _coordinates(view, points)
        return [scale(cost) for cost in costs], accuracies

    x, y = places((*view.trials, *view.controls, view.dense))
    wide, high = (max(x) - min(x)) or 1.0, (max(y) - min(y)) or 1.0
    ordered = sorted(front, key=lambda p: p is not view.knee)
    chosen: list[FrontPoint] = []
    for point in ordered:
        (px, *near_x), (py, *near_y) = places((point, *chosen))
        crowd = zip(near_x, near_y, strict=True)
        if all(abs(px - qx) > 0.03 * wide or abs(py - qy) > 0.035 * high for qx, qy in crowd):
            chosen.append(point)
    return {id(p) for p in chosen}


def _cost_axis(view: SearchView) -> str:
    dense = units.cost(view.primary, view.dense.costs[view.primary])
    counted = "" if view.pruning == CHANNEL else ": non-zeros, no latency without a sparse kernel"
    return f"{units.AXES[view.primary]} (% of the dense network's {dense}){counted}"


def _kept(view: SearchView) -> tuple[list[str], list[str], list[list[float]]]:
    front = view.front
    kept = [[100.0 * p.widths.get(name, size) / size for p in front] for name, size in view.sizes.items()]
    return [_short(name) for name in view.sizes], [units.share(view.fraction(p)) for p in front], kept


def _titled(view: SearchView) -> str:
    return f"{view.name}: {view.objective.name}"


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def _plain(text: str) -> str:
    """Escapes the sign with which matplotlib starts a formula."""
    return text.replace("$", r"\$")


def layout(title: str, *, height: int = 620) -> dict[str, Any]:
    """Returns what all interactive figures share: fonts, margins, the legend below."""
    return {
        "title": {"text": title, "x": 0.02, "font": {"size": 18}},
        "template": "plotly_white",
        "font": {"family": "Inter, Helvetica, Arial, sans-serif", "color": INK, "size": 13},
        "legend": {"orientation": "h", "yanchor": "top", "y": -66.0 / (height - 160), "x": 0, "traceorder": "normal"},
        "hoverlabel": {"bgcolor": "white", "bordercolor": GRID, "font": {"color": INK, "size": 12}, "align": "left"},
        "margin": {"l": 80, "r": 40, "t": 70, "b": 90},
        "height": height,
    }


def _scatter(axes: Axes, view: SearchView, chosen: Sequence[FrontPoint], *, label: str, **style: Any) -> None:
    if chosen:
        x, y = _coordinates(view, chosen)
        axes.scatter(x, y, label=label, **style)


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
