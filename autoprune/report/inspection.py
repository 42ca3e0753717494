"""The table of `autoprune inspect`: pruning groups, what is coupled with what, what is frozen and why.

Decides how a description of a network is shown. Must not know where it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from autoprune.policy import CHANNEL, UNITS, caveat
from autoprune.report import units
from autoprune.report.console import text_console, text_of
from autoprune.report.names import beside, collapse

_NAMES = 4
_LAYERS = 6


def render_inspection(data: Mapping[str, Any], *, title: str, console_width: int = 120, color: bool = False) -> str:
    """Returns the description of a traced network as text.

    Args:
        data: `groups`, `frozen`, `notes`, `dense`, `narrowest`, `input_shape` and (by default channels) `pruning`, as
            the network's description gives them.
        title: What stands above the tables.
        console_width: Columns of the terminal.
        color: Whether escape codes may be used.
    """
    console = text_console(console_width, color)
    dense, narrowest = data["dense"], data["narrowest"]
    shape = " x ".join(str(n) for n in data["input_shape"])
    console.print(
        f"{title}: input {shape}, {units.quantity(dense['macs'])} MACs, {units.quantity(dense['params'])} parameters,"
        f" {units.size(dense['size_bytes'])}, activations {units.size(dense['activation_bytes'])}"
    )
    console.print(
        f"At their narrowest the groups leave {_part(narrowest, dense, 'macs')} of the MACs and"
        f" {_part(narrowest, dense, 'params')} of the parameters."
    )
    pruning = data.get("pruning", CHANNEL)
    unit, said = UNITS[pruning], caveat(pruning)
    console.print(f"\n{_count(len(data['groups']), 'pruning group')}" + (f". {said}" if said else ""))
    console.print(_groups(data["groups"], unit))
    if pruning == CHANNEL:
        console.print("… is the path that a layer shares with the name of its group.")
    _approximate(console, data["groups"])
    if data["frozen"]:
        whole = "output channels" if pruning == CHANNEL else unit
        console.print(f"\n{_count(len(data['frozen']), 'frozen layer')}: their {whole} all stay")
        console.print(_frozen(data["frozen"], unit))
    for note in data["notes"]:
        console.print(f"Note: {note}")
    return text_of(console)


def _part(costs: Mapping[str, float], dense: Mapping[str, float], name: str) -> str:
    return units.share(costs[name] / dense[name]) if dense[name] else "all"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _groups(groups: Sequence[Mapping[str, Any]], unit: str) -> Table:
    coupled = unit == UNITS[CHANNEL]  # a weight goes with nothing else
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("group", overflow="fold", min_width=min(44, max((len(g["name"]) for g in groups), default=5) + 2))
    table.add_column(unit, justify="right")
    table.add_column("may keep", justify="right", no_wrap=True)
    table.add_column("MACs", justify="right", no_wrap=True)
    table.add_column("params", justify="right", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    if coupled:
        table.add_column("goes with", overflow="fold")
        table.add_column("read by", overflow="fold")
    for group in groups:
        kept = "all (excluded)" if group["widths"] is None else f"{group['widths'][0]}–{group['widths'][1]}"
        others = [name for name in group["producers"] if name != group["name"]]
        ends = [_few(others, _NAMES, group["name"]), _few(group["consumers"], _NAMES, group["name"]) or "nothing"]
        table.add_row(
            group["name"] + (" ≈" if group["approximate"] else ""),
            str(group["size"]),
            kept,
            units.percent(group["macs_share"], 0),
            units.percent(group["params_share"], 0),
            group["stage"],
            *(ends if coupled else []),
        )
    return table


def _approximate(console: Console, groups: Sequence[Mapping[str, Any]]) -> None:
    """Says what the mark ≈ means, and for how many groups."""
    reasons = [group["approximate"] for group in groups if group["approximate"]]
    if reasons:
        more = f", and {_count(len(reasons) - 1, 'other group')} alike" if len(reasons) > 1 else ""
        console.print(f"≈ removing a channel also shifts those that stay: {reasons[0]}{more}")


def _few(names: Sequence[str], limit: int, path: str = "") -> str:
    """The first few names; `…` stands for what they share with `path`."""
    shown = [beside(name, path) for name in collapse(names)]
    rest = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _frozen(frozen: Sequence[Mapping[str, Any]], unit: str) -> Table:
    """One row a reason; the layer's own name in a reason stands for each layer of the row."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("layers", justify="right")
    table.add_column(unit, justify="right")
    table.add_column("why", overflow="fold", ratio=1)
    table.add_column("which", overflow="fold", ratio=1)
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for layer in frozen:
        rows.setdefault(_without_numbers(layer["reason"]), []).append(layer)
    for layers in rows.values():
        reasons = collapse(layer["reason"] for layer in layers)
        names = [layer["name"] for layer in layers]
        channels = sorted({layer["size"] for layer in layers})
        width = str(channels[0]) if len(channels) == 1 else f"{channels[0]}–{channels[-1]}"
        table.add_row(str(len(layers)), width, reasons[0], _few(names, _LAYERS))
    return table


def _without_numbers(reason: str) -> str:
    return re.sub(r"\d+", "0", reason)
