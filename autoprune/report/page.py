"""The report: everything about a search in one HTML page that needs no network.

Decides the order of the sections and how the page is put together. Must not know where the values come from; what is
missing is named in the page, in its place.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from autoprune.prices import Curves, Explanation
from autoprune.report import sections
from autoprune.report.diagnostics import (
    RungPair,
    RungTime,
    audit_figure,
    has_latency,
    latency_figure,
    sensitivity_figure,
    time_figure,
)
from autoprune.report.figures import GRID, INK, TRIAL, front_figure, widths_figure
from autoprune.report.view import FrontPoint, SearchView

if TYPE_CHECKING:
    import plotly.graph_objects as go

_DARK = {
    INK: "#e4e9ec",
    GRID: "#313c44",
    TRIAL: "#71828d",
    "white": "#1b2227",
    "#2a3f5f": "#e4e9ec",
    "#EBF0F8": "#313c44",
    "#c2185b": "#ff5c98",
    "#00796b": "#3fbfae",
    "#5c6bc0": "#8f9df0",
    "#fff4f7": "#241a1f",
    "#f6bdd0": "#5a2038",
    "#e2739b": "#99305a",
    "#6a0d33": "#ffd3e2",
}
"""What the colours of the figures become on a dark page."""


@dataclass(frozen=True, slots=True)
class FailureRow:
    """A trial that failed."""

    rung: str
    trial: int
    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class PageData:
    """Everything that the report tells.

    `about` holds readable pairs for the head of the page, `explanations` one for each chosen point, by trial,
    `unexplained` why there is none, and `policies` their policies' ids. `settings` is the text of the space file, and
    `commands` what reproduces the search (command, what it does). What an older search did not store is empty, and
    `missing` says why.
    """

    view: SearchView
    about: tuple[tuple[str, str], ...]
    curves: Curves = field(default_factory=dict)
    explanations: Mapping[int, Explanation] = field(default_factory=dict)
    unexplained: Mapping[int, str] = field(default_factory=dict)
    policies: Mapping[int, str] = field(default_factory=dict)
    pairs: tuple[RungPair, ...] = ()
    times: tuple[RungTime, ...] = ()
    failures: tuple[FailureRow, ...] = ()
    settings: str = ""
    commands: tuple[tuple[str, str], ...] = ()
    missing: str = ""


def render_page(data: PageData) -> str:
    """Returns the report as the text of an HTML file (about 5 MB: it holds the library that draws the figures)."""
    from plotly.offline import get_plotlyjs

    figures = {name: figure for name, figure in _figures(data).items() if figure is not None}
    body = "\n".join(
        [
            sections.head(data.view, data.about),
            sections.navigation(list(_parts(data, figures))),
            *_parts(data, figures).values(),
            f"<footer>Made by autoprune. {_plural(data.view)} named val are of the validation split, which the search"
            " has seen; those named test are of the test set, which it has not.</footer>",
        ]
    )
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(f"{data.view.name}: {data.view.objective.name} against complexity"),
        body=body,
        plotly=get_plotlyjs(),
        figures=_embedded({name: json.loads(figure.to_json()) for name, figure in figures.items()}),
        dark=_embedded(_DARK),
    )


def chosen_points(view: SearchView) -> list[tuple[str, FrontPoint]]:
    """Returns the points that a person would look at first, without repeats: smallest, knee, most accurate."""
    front = view.front
    if not front:
        return []
    found = [("smallest", front[0])]
    if view.knee is not None:
        found.append(("knee", view.knee))
    found.append((view.objective.best, front[-1]))
    names: dict[int, list[str]] = {}
    for what, point in found:
        names.setdefault(id(point), []).append(what)
    points = {id(point): point for _, point in found}
    return [(" and ".join(whats), points[key]) for key, whats in names.items()]


def _plural(view: SearchView) -> str:
    return "Accuracies" if view.objective.percent else "Values"


def _figures(data: PageData) -> dict[str, go.Figure | None]:
    view = data.view
    knee = view.knee or (view.front[-1] if view.front else None)
    figures: dict[str, go.Figure | None] = {"figure-front": front_figure(view)}
    if view.front:
        figures["figure-widths"] = widths_figure(view).update_layout(meta={"tall": True})
    if data.curves:
        marked = data.explanations.get(knee.trial) if knee is not None and knee.trial is not None else None
        figures["figure-sensitivity"] = sensitivity_figure(data.curves, view.sizes, marked, unit=view.unit)
    if has_latency(view):
        figures["figure-latency"] = latency_figure(view)
    for number, pair in enumerate(data.pairs):
        figures[f"figure-audit-{number}"] = audit_figure(pair) if pair.points else None
    if any(time.seconds for time in data.times):
        figures["figure-time"] = time_figure(data.times).update_layout(meta={"tall": True})
    return figures


def _parts(data: PageData, figures: Mapping[str, Any]) -> dict[str, str]:
    """Returns the sections by their names, in order."""
    view, chosen = data.view, chosen_points(data.view)
    parts = {"Front": sections.front(view)}
    if chosen:
        parts["Chosen points"] = sections.chosen(view, chosen)
        parts["Why these widths"] = sections.why(chosen, data.explanations, data.unexplained)
        parts["Widths"] = sections.widths(view)
    parts["Sensitivity"] = sections.sensitivity(data.curves, view, data.missing)
    parts["Latency"] = sections.latency(view, drawn="figure-latency" in figures)
    if data.pairs:
        parts["Proxy audit"] = sections.audit(data.pairs, figures)
    parts["Time"] = sections.time(data.times, drawn="figure-time" in figures)
    parts["Failures"] = sections.failures([(f.rung, f.trial, f.source, f.reason) for f in data.failures])
    parts["Reproduce"] = sections.reproduce(data.commands, data.settings, data.policies, data.missing)
    return parts


def _embedded(value: Any) -> str:
    """Returns JSON that may stand in a script element: nothing in it can end the element."""
    return (
        json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    )
