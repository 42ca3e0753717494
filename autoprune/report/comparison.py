"""Trials side by side.

Decides which differences are marked. Must not know where the trials come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from autoprune.cost import LATENCY
from autoprune.objective import Objective
from autoprune.report import units
from autoprune.report.console import text_console, text_of
from autoprune.report.view import FrontPoint, SearchView

SCHEMA = 1
_MARKED = 3


@dataclass(frozen=True, slots=True)
class Compared:
    """A trial to compare: its point, the rung that measured it, and the criterion of each group."""

    point: FrontPoint
    rung: str
    criteria: Mapping[str, str]


def widest_differences(view: SearchView, trials: Sequence[Compared], count: int = _MARKED) -> list[str]:
    """Returns the groups of which the trials keep the most different fractions, most different first."""
    spread = {group: _spread(view, trials, group) for group in view.sizes}
    ordered = sorted((group for group in spread if spread[group] > 0), key=lambda group: -spread[group])
    return ordered[:count]


def render_comparison(
    view: SearchView, trials: Sequence[Compared], *, console_width: int = 120, color: bool = False
) -> str:
    """Returns a table with a column a trial: scores, costs, and the width and criterion of every group."""
    console = text_console(console_width, color)
    names = ", ".join(trial.point.name for trial in trials)
    console.print(Text.assemble((view.name, "bold"), f": trials {names} beside the dense network"))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("", overflow="fold")
    table.add_column("dense", justify="right", style="dim", no_wrap=True)
    for trial in trials:
        table.add_column(f"trial {trial.point.name}", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, dense, values in _scores(view, trials):
        table.add_row(name, dense, *values, "")
    table.add_section()
    marked = widest_differences(view, trials)
    mixed = any(len(set(trial.criteria.values())) > 1 for trial in trials)
    for group, size in view.sizes.items():
        cells = [_kept(trial, group, size, criterion=mixed) for trial in trials]
        mark = "◄ differs most" if group in marked[:1] else "◄" if group in marked else ""
        table.add_row(group, str(size), *cells, mark, style="bold" if mark else "")
    console.print(table)
    rungs = {trial.rung for trial in trials}
    if len(rungs) > 1:
        console.print(
            f"The trials were measured on different rungs ({', '.join(sorted(rungs))}): by different recipes."
        )
    return text_of(console)


def comparison_json(view: SearchView, trials: Sequence[Compared]) -> dict[str, Any]:
    """Returns the comparison as plain JSON values."""

    def row(point: FrontPoint) -> dict[str, Any]:
        return {
            "trial": point.trial,
            "val_accuracy": point.val_accuracy,
            "test_accuracy": point.test_accuracy,
            "costs": dict(point.costs),
            "fractions": {name: view.fraction(point, name) for name in view.costs},
            "widths": {group: point.widths.get(group, size) for group, size in view.sizes.items()},
            "metrics": dict(point.metrics),
            "origin": point.origin,
        }

    return {
        "schema": SCHEMA,
        "name": view.name,
        "dense": row(view.dense),
        "trials": [{**row(t.point), "rung": t.rung, "criteria": dict(t.criteria)} for t in trials],
        "largest_differences": widest_differences(view, trials),
    }


def _spread(view: SearchView, trials: Sequence[Compared], group: str) -> float:
    size = view.sizes[group]
    kept = [trial.point.widths.get(group, size) / size for trial in trials]
    return max(kept) - min(kept)


def _scores(view: SearchView, trials: Sequence[Compared]) -> list[tuple[str, str, list[str]]]:
    dense, points, own = view.dense, [trial.point for trial in trials], view.objective
    rows = [
        ("rung", "", [trial.rung for trial in trials]),
        (f"{own.label('val')}{own.hint}", own.text(dense.val_accuracy), [own.text(p.val_accuracy) for p in points]),
    ]
    if any(p.test_accuracy is not None for p in points):
        tested = [_text(own, p.test_accuracy) for p in points]
        rows.append((own.label("test"), _text(own, dense.test_accuracy), tested))
    for name in view.costs:
        cells = [f"{units.cost(name, p.costs[name])} {units.share(view.fraction(p, name)):>4}" for p in points]
        rows.append((units.LABELS[name], units.cost(name, dense.costs[name]), cells))
    if any("latency_ms" in p.metrics for p in points):
        what = "measured" if LATENCY in view.costs else "latency"
        rows.append((what, units.latency(dense.metrics), [units.latency(p.metrics) for p in points]))
    rows.append(("criterion", "", [p.criterion for p in points]))
    rows.append(("proposed by", "", [p.origin for p in points]))
    return rows


def _text(own: Objective, value: float | None) -> str:
    return "–" if value is None else own.text(value)


def _kept(trial: Compared, group: str, size: int, *, criterion: bool) -> str:
    width = trial.point.widths.get(group, size)
    name = f" {trial.criteria[group]}" if criterion and group in trial.criteria and width < size else ""
    return f"{width}{name} {units.share(width / size):>4}"
