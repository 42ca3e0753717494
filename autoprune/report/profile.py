"""The text of `autoprune profile`: the stages of a trial, and how much of each is more than the passes themselves.

Decides how times are shown. Must not know how they were measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from autoprune.report import units
from autoprune.report.console import text_console, text_of


def render_profile(data: Mapping[str, Any], *, title: str, console_width: int = 120, color: bool = False) -> str:
    """Returns the times of a profile as text.

    Args:
        data: `device`, `threads`, `groups`, `preparation` (rows of `stage`, `seconds`, `floor`), `trials` (`rung`,
            `seconds`, `floor`, `ratio`, `steps`, `whole_steps`, `stages`), `bookkeeping_seconds`, `traces`.
        title: What stands above the table.
        console_width: Columns of the terminal.
        color: Whether escape codes may be used.
    """
    console = text_console(console_width, color)
    kind = "processor time" if data["device"] == "cpu" else "elapsed time"
    console.print(f"{title}: {kind} on {data['device']}, {data['threads']} thread(s), {data['groups']} pruning groups")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("stage")
    for name in ("time", "passes alone", "the rest", "of the whole"):
        table.add_column(name, justify="right", no_wrap=True)
    whole = sum(row["seconds"] for row in data["preparation"])
    _rows(table, "preparation", data["preparation"], whole)
    for trial in data["trials"]:
        table.add_section()
        _rows(table, f"a trial of {trial['rung']}", trial["stages"], trial["seconds"])
    console.print(table)
    for trial in data["trials"]:
        scaled = ""
        if trial["whole_steps"] > trial["steps"]:
            scaled = f" (training: {trial['steps']} of {trial['whole_steps']} steps, scaled)"
        console.print(f"{trial['rung']}: {trial['ratio']:.2f} times its forward and backward passes{scaled}.")
    console.print(
        f"Around each evaluation (proposal, prices, identity, storage): {_time(data['bookkeeping_seconds'])}."
    )
    console.print(f"Traces for chrome://tracing: {', '.join(data['traces'])}")
    return text_of(console)


def _rows(table: Table, head: str, rows: list[Mapping[str, Any]], whole: float) -> None:
    table.add_row(head, _time(whole), "", "", "")
    for row in rows:
        seconds, floor = row["seconds"], row["floor"]
        table.add_row(
            f"  {row['stage'].replace('_', ' ')}",
            _time(seconds),
            _time(floor) if floor else "–",
            _time(seconds - floor) if seconds > floor else "–",
            units.percent(seconds / whole, 0) if whole else "–",
        )


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else units.milliseconds(1000 * seconds)
