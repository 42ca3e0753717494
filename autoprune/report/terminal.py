"""The front and the layers as text for a terminal, or for a file that the text is piped into.

Decides the words and the columns that fit. Must not print: it returns text.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from autoprune.cost import LATENCY, MACS, MEMORY, PARAMS, SIZE
from autoprune.errors import StudyError
from autoprune.policy import CHANNEL
from autoprune.report import units
from autoprune.report.console import text_console, text_of
from autoprune.report.intervals import hypervolume_sentence, reference_sentence
from autoprune.report.view import FrontPoint, LayerRow, SearchView

_SHOWN = (MACS, PARAMS, SIZE)
_CRITERION = 9
_ENDLESS = 10_000


def render_front(view: SearchView, *, console_width: int = 120, color: bool = False) -> str:
    """Returns the front as a table: dense first, then every point with what it saves, then the controls.

    Args:
        view: The search.
        console_width: Columns of the terminal. Where they are too few, the savings become a table of their own.
        color: Whether escape codes may be used; plain text otherwise.
    """
    console = text_console(console_width, color)
    front = view.front
    if not front:
        console.print(f"{view.name}: no trial of the rung {view.rung} has finished yet.")
        return text_of(console)
    if view.caveat:
        console.print(view.caveat)
    costs: tuple[str, ...] = _SHOWN if view.primary in _SHOWN else (*_SHOWN, view.primary)
    if LATENCY in view.costs:
        costs = (MACS, PARAMS, *([view.primary] if view.primary in (SIZE, MEMORY) else []), LATENCY)
    count = f"{len(front)} of {len(view.trials)} trials" if len(front) < len(view.trials) else f"{len(front)} trials"
    console.print(Text.assemble((view.name, "bold"), ": the front after the rung ", (view.rung, "bold"), f" ({count})"))
    whole = _front(view, costs, savings=True)
    if _least_width(console, whole, front) <= console_width:
        console.print(whole)
    else:
        console.print(_front(view, costs, savings=False))
        console.print(Text.assemble(("What each point saves", "bold"), " (dense less pruned)"))
        console.print(_savings(view, costs))
    if view.controls:
        console.print(Text.assemble(("Controls", "bold"), ": simple policies under the same recipe"))
        console.print(_controls(view, costs))
    for line in _closing(view):
        console.print(line)
    return text_of(console)


def render_layers(
    view: SearchView, trial: int, rows: Sequence[LayerRow], *, console_width: int = 120, color: bool = False
) -> str:
    """Returns the before/after summary of one trial, layer by layer.

    Raises:
        StudyError: The view holds no such trial.
    """
    point = next((p for p in view.trials if p.trial == trial), None)
    if point is None:
        known = ", ".join(p.name for p in view.trials)
        raise StudyError(
            f"{view.name} has no finished trial {trial} on the rung {view.rung}; finished: {known or 'none'}"
        )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, show_footer=True)
    macs, params = _totals(rows)
    table.add_column("layer", footer="sum")
    table.add_column("width" if view.pruning == CHANNEL else "non-zeros", justify="right")
    table.add_column("MACs", justify="right", footer=_change(*macs, units.quantity))
    table.add_column("saved", justify="right", footer=units.quantity(macs[0] - macs[1]))
    table.add_column("params", justify="right", footer=_change(*params, units.quantity))
    table.add_column("saved", justify="right", footer=units.quantity(params[0] - params[1]))
    for row in rows:
        untouched = row.macs_before == row.macs_after and row.params_before == row.params_after
        table.add_row(
            row.module,
            _change(row.width_before, row.width_after, str),
            _change(row.macs_before, row.macs_after, units.quantity),
            _saved(row.macs_before, row.macs_after),
            _change(row.params_before, row.params_after, units.quantity),
            _saved(row.params_before, row.params_after),
            style="dim" if untouched else "",
        )
    console = text_console(console_width, color)
    own = view.objective
    scores = f"{own.text(point.val_accuracy)} (dense {own.text(view.dense.val_accuracy)}){own.hint}"
    said = f", trial {trial}: {own.long('val')} {scores}"
    console.print(Text.assemble((view.name, "bold"), said))
    if view.caveat:
        console.print(view.caveat)
    console.print(table)
    return text_of(console)


def _least_width(console: Console, table: Table, front: Sequence[FrontPoint]) -> int:
    """Returns the columns that a table needs where only the criteria may be folded, between words."""
    whole = Measurement.get(console, console.options.update(max_width=_ENDLESS), table).maximum
    longest = max(_CRITERION, *(len(point.criterion) for point in front))
    folded = max(_CRITERION, *(len(word) for point in front for word in point.criterion.split() or [""]))
    return whole - longest + folded


def _tested(shown: Sequence[FrontPoint]) -> bool:
    return any(p.test_accuracy is not None for p in shown)


def _head(view: SearchView, first: str, costs: Sequence[str], *, tested: bool, timed: bool = False) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(first, justify="right" if first == "trial" else "left", min_width=5)
    for split in ("val", "test") if tested else ("val",):
        table.add_column(view.objective.head(split), justify="right", no_wrap=True)
    for cost in costs:
        table.add_column(units.LABELS[cost], justify="right", no_wrap=True)
    if timed:
        table.add_column("measured", justify="right", no_wrap=True)
    return table


def _time(point: FrontPoint, *, timed: bool) -> list[str]:
    if not timed:
        return []
    measured, spread = (point.metrics.get(f"latency_{part}") for part in ("ms", "spread_ms"))
    return ["–" if measured is None else f"{units.milliseconds(measured)} ±{spread or 0.0:.2g}"]


def _mark(view: SearchView, point: FrontPoint) -> str:
    marks = ["◄ knee"] if point is view.knee else []
    marks += ["no faster"] if view.no_faster(point) else []
    marks += ["over the limit"] if view.over_limit(point) else []
    return ", ".join(marks)


def _scores(view: SearchView, point: FrontPoint, *, tested: bool) -> list[str]:
    scores = [view.objective.text(point.val_accuracy)]
    if tested:
        scores.append("–" if point.test_accuracy is None else view.objective.text(point.test_accuracy))
    return scores


def _kept(view: SearchView, point: FrontPoint, cost: str) -> str:
    return f"{units.cost(cost, point.costs[cost])} {units.share(view.fraction(point, cost)):>4}"


def _saving(view: SearchView, point: FrontPoint, cost: str) -> str:
    return units.cost(cost, view.dense.costs[cost] - point.costs[cost])


def _front(view: SearchView, costs: Sequence[str], *, savings: bool) -> Table:
    tested, timed = _tested((view.dense, *view.front)), LATENCY in costs
    table = _head(view, "trial", costs, tested=tested, timed=timed)
    if savings:
        for cost in costs:
            table.add_column(f"saves {units.LABELS[cost]}", justify="right", no_wrap=True)
        table.add_column("criterion", overflow="fold", min_width=_CRITERION)
    table.add_column("", no_wrap=True)
    blanks = [""] * (len(costs) + 1 if savings else 0)
    dense = view.dense
    table.add_row(
        "dense",
        *_scores(view, dense, tested=tested),
        *(_kept(view, dense, c) for c in costs),
        *_time(dense, timed=timed),
        *blanks,
        "",
        style="dim",
    )
    knee = view.knee
    for point in reversed(view.front):
        saved = [*(_saving(view, point, c) for c in costs), point.criterion] if savings else []
        is_knee = point is knee
        table.add_row(
            point.name,
            *_scores(view, point, tested=tested),
            *(_kept(view, point, c) for c in costs),
            *_time(point, timed=timed),
            *saved,
            _mark(view, point),
            style="bold green" if is_knee else "",
        )
    return table


def _savings(view: SearchView, costs: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("trial", justify="right", no_wrap=True)
    for cost in costs:
        table.add_column(units.LABELS[cost], justify="right", no_wrap=True)
    table.add_column(view.objective.head("val"), justify="right", no_wrap=True)
    table.add_column("criterion", overflow="fold", min_width=_CRITERION)
    for point in reversed(view.front):
        change = view.objective.difference(point.val_accuracy, view.dense.val_accuracy)
        table.add_row(point.name, *(_saving(view, point, c) for c in costs), change, point.criterion)
    return table


def _controls(view: SearchView, costs: Sequence[str]) -> Table:
    tested = _tested(view.controls)
    table = _head(view, "control", costs, tested=tested)
    table.add_column("front gains", justify="right")
    for point in sorted(view.controls, key=lambda p: -p.costs[view.primary]):
        gain = view.gain(point)
        better = "–" if gain is None else view.objective.change(gain, near=point.val_accuracy)
        name = point.origin or point.name
        table.add_row(name, *_scores(view, point, tested=tested), *(_kept(view, point, c) for c in costs), better)
    return table


def _closing(view: SearchView) -> list[str]:
    lines = [f"{hypervolume_sentence(view)} ({reference_sentence(view)})."]
    if view.limits:
        limits = ", ".join(
            f"{units.LABELS[name]} {units.cost(name, view.limits[name])}" for name in view.costs if name in view.limits
        )
        lines.append(f"Budget: at most {limits}.")
    if MEMORY in view.limits and view.primary != MEMORY:
        most = max(p.costs[MEMORY] for p in view.front)
        lines.append(f"Largest activation memory on the front: {units.size(most)}.")
    return [*lines, *view.notes]


def _change(before: int, after: int, write: object) -> str:
    text = write if callable(write) else str
    return text(before) if before == after else f"{text(before)} → {text(after)}"


def _saved(before: int, after: int) -> str:
    return "–" if before == after else units.quantity(before - after)


def _totals(rows: Sequence[LayerRow]) -> tuple[tuple[int, int], tuple[int, int]]:
    macs = (sum(r.macs_before for r in rows), sum(r.macs_after for r in rows))
    return macs, (sum(r.params_before for r in rows), sum(r.params_after for r in rows))
