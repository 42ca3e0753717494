"""The table of `autoprune inspect`: pruning groups, what is coupled with what, what is frozen and why.

Decides how a description of a network is shown. Must not know where it comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from autoprune.report import units
from autoprune.report.console import text_console, text_of

_NAMES = 3


def render_inspection(data: Mapping[str, Any], *, title: str, console_width: int = 120, color: bool = False) -> str:
    """Returns the description of a traced network as text.

    Args:
        data: `groups`, `frozen`, `notes`, `dense` and `input_shape`, as the network's description gives them.
        title: What stands above the tables.
        console_width: Columns of the terminal.
        color: Whether escape codes may be used.
    """
    console = text_console(console_width, color)
    dense = data["dense"]
    shape = " x ".join(str(n) for n in data["input_shape"])
    console.print(
        f"{title}: input {shape}, {units.quantity(dense['macs'])} MACs, {units.quantity(dense['params'])} parameters,"
        f" {units.size(dense['size_bytes'])}, activations {units.size(dense['activation_bytes'])}"
    )
    console.print(f"\n{len(data['groups'])} pruning groups")
    console.print(_groups(data["groups"]))
    if data["frozen"]:
        console.print(f"\n{len(data['frozen'])} frozen layers: their output channels all stay")
        console.print(_frozen(data["frozen"]))
    for note in data["notes"]:
        console.print(f"Note: {note}")
    return text_of(console)


def _groups(groups: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("group", overflow="fold")
    table.add_column("channels", justify="right")
    table.add_column("may keep", justify="right", no_wrap=True)
    table.add_column("MACs", justify="right", no_wrap=True)
    table.add_column("params", justify="right", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    table.add_column("made by", overflow="fold")
    table.add_column("read by", overflow="fold")
    for group in groups:
        kept = "all (excluded)" if group["widths"] is None else f"{group['widths'][0]}–{group['widths'][1]}"
        table.add_row(
            group["name"] + (" ≈" if group["approximate"] else ""),
            str(group["size"]),
            kept,
            units.percent(group["macs_share"], 0),
            units.percent(group["params_share"], 0),
            group["stage"],
            _few(group["producers"]),
            _few(group["consumers"]),
        )
    return table


def _few(names: Sequence[str]) -> str:
    rest = len(names) - _NAMES
    return ", ".join(names[:_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _frozen(frozen: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("channels", justify="right")
    table.add_column("why", overflow="fold")
    for layer in frozen:
        table.add_row(layer["name"], str(layer["size"]), layer["reason"])
    return table
