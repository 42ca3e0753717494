"""The state of searches, queue and service as text for a terminal.

Decides the columns and the words. Must not know where the values come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from autoprune.objective import ACCURACY, Objective
from autoprune.report import units
from autoprune.report.console import text_console, text_of

_STYLES = {"running": "bold green", "healthy": "green", "failed": "red", "failing": "red", "cancelled": "dim"}


def render_status(data: Mapping[str, Any], *, console_width: int = 120, color: bool = False) -> str:
    """Returns the service's processes and one line a search."""
    console = text_console(console_width, color)
    service = data["service"]
    if service is None:
        runner = "; a runner elsewhere works through the queue" if data["runner"] else ""
        waits = sum(row["state"] == "queued" for row in data["rows"])
        hint = f"; {waits} {'search waits' if waits == 1 else 'searches wait'} for `autoprune serve`" if waits else ""
        console.print(f"No service runs on this home folder{runner or hint}.")
    else:
        console.print(Text.assemble(("Service", "bold"), f" (process {service['pid']} on {service['host']})"))
        console.print(_services(service["services"]))
    console.print()
    if data["rows"]:
        console.print(Text.assemble(("Searches", "bold")))
        console.print(_searches(data["rows"]))
    else:
        console.print("No search yet: `autoprune submit SPACE` adds one to the queue.")
    return text_of(console)


def _services(services: Any) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("process", "state", "address"):
        table.add_column(name, no_wrap=True)
    table.add_column("restarts", justify="right")
    table.add_column("")
    for row in services:
        table.add_row(
            row["name"],
            Text(row["state"], style=_STYLES.get(row["state"], "")),
            row["address"] or "–",
            str(row["restarts"]),
            row["reason"],
        )
    return table


def _searches(rows: Any) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("search", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("rung")
    for name in ("trials", best_head(rows), "rung ends in", "priority"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        left = row.get("seconds_left")
        table.add_row(
            row["name"],
            Text(row["state"], style=_STYLES.get(row["state"], "")),
            row["rung"] or "–",
            trials(row),
            best(row),
            "–" if left is None else units.seconds(left),
            "–" if row["priority"] is None else str(row["priority"]),
            row["reason"],
        )
    return table


def best_head(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns the head of the column of best values: `best val acc` where all of them are accuracies."""
    return f"best {ACCURACY.head('val')}" if all(_objective(row).percent for row in rows) else "best on val"


def best(row: Mapping[str, Any]) -> str:
    """Returns the best value of a row's rung: `83.4%`, or that of a metric of the user's own, `r2 1.924`."""
    own, value = _objective(row), row["best"]
    if value is None:
        return "–"
    return own.text(value) if own.percent else f"{own.name} {own.text(value)}"


def _objective(row: Mapping[str, Any]) -> Objective:
    stored = row.get("objective")
    return ACCURACY if stored is None else Objective.from_json(stored)


def trials(row: Mapping[str, Any]) -> str:
    """Returns how many trials of a row's rung are done: `12/40`."""
    if row["rung"] is None:
        return "–"
    return f"{row['done']}/{'?' if row['total'] is None else row['total']}"
