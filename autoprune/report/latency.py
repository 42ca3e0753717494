"""The text of `autoprune latency`: how latency was measured, what it is made of, and how well it is predicted.

Decides how a latency table is shown. Must not know how it was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from autoprune.report import units
from autoprune.report.console import text_console, text_of

_OPERATORS = 6


def render_latency(data: Mapping[str, Any], *, title: str, console_width: int = 120, color: bool = False) -> str:
    """Returns the summary of a latency table as text.

    Args:
        data: `device`, `conditions`, `timed`, `fixed`, `seconds`, `shares`, `error`, and `networks` with `name`,
            `measured_ms`, `spread_ms`, `predicted_ms`, `error`, `held_out`.
        title: What stands above the table.
        console_width: Columns of the terminal.
        color: Whether escape codes may be used.
    """
    console = text_console(console_width, color)
    conditions = data["conditions"]
    count = conditions["threads"]
    threads = f", {count} thread{'s' if count > 1 else ''}" if conditions["device"] == "cpu" else ""
    console.print(
        f"{title}: latency on {data['device']}, batch {conditions['batch']}, {conditions['dtype']}{threads}"
        f" ({data['timed']} distinct operators timed in {units.seconds(data['seconds'])})"
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("network")
    for name in ("measured", "predicted", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in data["networks"]:
        table.add_row(
            row["name"],
            f"{units.milliseconds(row['measured_ms'])} ±{row['spread_ms']:.2g}",
            units.milliseconds(row["predicted_ms"]),
            f"{100 * row['error']:+.1f}%",
            "held out" if row["held_out"] else "calibration",
        )
    console.print(table)
    shares = [f"{name} {units.percent(part, 0)}" for name, part in list(data["shares"].items())[:_OPERATORS]]
    console.print(f"Time of the dense network by operator: {', '.join(shares)}.")
    console.print(f"Median error on the networks held out: {units.percent(data['error'])}.")
    if data["fixed"]:
        console.print(
            f"Note: {data['fixed']} operators cannot be made at smaller widths; they are held at their dense time."
        )
    return text_of(console)
