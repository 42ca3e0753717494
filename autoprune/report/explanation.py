"""Why a policy has its widths, in words and as a table.

Decides the sentences. Must not do the arithmetic: it is handed an `Explanation`.
"""

from __future__ import annotations

import math
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from autoprune.prices import BALANCED, CHEAP, DEAR, FIXED, FREE, Explanation, GroupPrice, Step
from autoprune.report import units
from autoprune.report.console import text_console, text_of
from autoprune.report.view import FrontPoint, SearchView

SCHEMA = 1
_LIGHT, _HEAVY = 0.6, 1.5
"""A weight beyond these is worth a sentence."""
MARKS = {CHEAP: "▼", DEAR: "▲", BALANCED: "", FIXED: "", FREE: ""}
"""Beside a group that the tables would give another width: narrower, wider."""


def render_explanation(
    view: SearchView, point: FrontPoint, why: Explanation, *, console_width: int = 120, color: bool = False
) -> str:
    """Returns the explanation of one trial as text: what was paid, a table of the groups, and a sentence a group."""
    console = text_console(console_width, color)
    own = view.objective
    scores = f"{own.text(point.val_accuracy)} (dense {own.text(view.dense.val_accuracy)}){own.hint}"
    console.print(Text.assemble((view.name, "bold"), f", trial {point.name}: {own.long('val')} {scores}"))
    if view.caveat:
        console.print(view.caveat)
    for line in summary(why):
        console.print(line)
    console.print()
    console.print(_table(why))
    if any(row.verdict in (CHEAP, DEAR) for row in why.groups):
        console.print("▼ the tables would take a step down, ▲ they would take a step up, at the going price")
    console.print()
    width = max(len(row.group) for row in why.groups)
    for row in why.groups:
        console.print(Text(f"{row.group:<{width}}  {sentence(why, row)}"), soft_wrap=not color)
    return text_of(console)


def explanation_json(view: SearchView, point: FrontPoint, why: Explanation) -> dict[str, Any]:
    """Returns the explanation as plain JSON values."""
    return {
        "schema": SCHEMA,
        "name": view.name,
        "trial": point.trial,
        "val_accuracy": point.val_accuracy,
        "cost": why.cost,
        "dense": why.dense,
        "total": why.total,
        "error": why.error,
        "going_price": why.price,
        "uniform": {"total": why.uniform_total, "error": why.uniform_error},
        "groups": [
            {
                "group": row.group,
                "size": row.size,
                "width": row.width,
                "uniform_width": row.uniform,
                "criterion": row.criterion,
                "error": row.error,
                "weight": row.weight,
                "share": row.share,
                "down": _step_json(row.down),
                "up": _step_json(row.up),
                "verdict": row.verdict,
                "sentence": sentence(why, row),
            }
            for row in why.groups
        ],
    }


def summary(why: Explanation) -> list[str]:
    """Returns what the policy pays in all, against the uniform policy of the same cost."""
    label = units.LABELS[why.cost]
    kept = f"{units.cost(why.cost, why.total)} {label} ({units.share(why.total / why.dense)} of dense)"
    other = f"{units.cost(why.cost, why.uniform_total)} {label}"
    lines = [
        f"Keeps {kept} at a total error of {number(why.error)}; a uniform policy of {other} has"
        f" {number(why.uniform_error)}. Errors are the tables': after refitting, before any fine-tuning."
    ]
    if weighted(why):
        lines.append(
            "Each group's error is weighted by how much it matters, as this search's trials teach (1 on average)."
        )
    if why.price is not None:
        lines.append(f"The going price is an error of {number(why.price)} for each percent of the dense {label}.")
    return lines


def weighted(why: Explanation) -> bool:
    """Whether the groups' errors matter differently."""
    return any(row.weight != 1.0 for row in why.groups)


def sentence(why: Explanation, row: GroupPrice) -> str:
    """Returns in plain words why a group has its width."""
    if row.verdict == FIXED:
        return f"keeps {row.width} of {row.size}: the only width that it may have."
    kept = f"keeps all {row.size}" if row.width == row.size else f"keeps {row.width} of {row.size}"
    if row.uniform == row.width:
        kept += ", as a uniform policy of the same cost would"
    else:
        more = row.width - row.uniform
        kept += f", {abs(more)} {'more' if more > 0 else 'fewer'} than a uniform policy of the same cost"
    unusual = row.weight <= _LIGHT or row.weight >= _HEAVY
    matters = f" Its error matters {row.weight:.2g} times the average." if unusual else ""
    return f"{kept}: {_reason(why, row)}.{matters}"


def _reason(why: Explanation, row: GroupPrice) -> str:
    if row.verdict == FREE or why.price is None:
        return f"its width does not change the {units.LABELS[why.cost]}"
    if row.verdict == CHEAP:
        assert row.down is not None
        return (
            f"{_rank(why, row)}a step down to {row.down.width} adds only {_times(row.down, why.price)} error for what"
            " it saves, so it could be narrower"
        )
    if row.verdict == DEAR:
        assert row.up is not None
        return (
            f"a step up to {row.up.width} takes away {_times(row.up, why.price)} error for what it costs,"
            " so it could use more"
        )
    if row.up is None:
        return f"{_rank(why, row)}removing more adds {_times(row.down, why.price)} error for what it saves"
    if row.down is None:
        return f"it is as narrow as it may be, and a step up is worth {_times(row.up, why.price)} error"
    return (
        f"in balance; a step down adds {_times(row.down, why.price)} error for what it saves,"
        f" a step up takes away {_times(row.up, why.price)} error for what it costs"
    )


def _rank(why: Explanation, row: GroupPrice) -> str:
    """Returns where the group stands among all by the price of its next step down, where that is worth saying."""
    prices = [r.down.price for r in why.groups if r.down is not None and r.down.price is not None]
    if row.down is None or row.down.price is None or len(prices) < 8:
        return ""
    below = sum(price < row.down.price for price in prices) / len(prices)
    if below < 0.25:
        return "among the cheapest quarter of the network; "
    return "among the dearest quarter of the network; " if below >= 0.75 else ""


def _times(step: Step | None, price: float) -> str:
    """Returns the price of a step as a multiple of the going price."""
    if step is None or step.price is None:
        return "an unknown"
    times = step.price / price if price > 0 else math.inf
    if times >= 100:
        return "over 100 times the going"
    if 0.95 <= times <= 1.05:
        return "about the going"
    return f"{times:.2g} times the going" if times >= 0.01 else "less than 0.01 times the going"


def number(value: float) -> str:
    """Returns an error or a price with two or three digits."""
    if value == 0.0:
        return "0"
    return f"{value:.3f}" if abs(value) >= 0.0995 else f"{value:.2g}"


def price_text(step: Step | None) -> str:
    """Returns the price of a step for a table: a dash where there is no such step or it saves nothing."""
    return "–" if step is None or step.price is None else number(step.price)


def _table(why: Explanation) -> Table:
    label = units.LABELS[why.cost]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("group", overflow="fold")
    for head in ("dense", "keeps", "uniform"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("criterion", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    if weighted(why):
        table.add_column("weight", justify="right", no_wrap=True)
    table.add_column(f"part of {label}", justify="right", no_wrap=True)
    table.add_column("price down", justify="right", no_wrap=True)
    table.add_column("price up", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in why.groups:
        table.add_row(
            row.group,
            str(row.size),
            str(row.width),
            str(row.uniform),
            row.criterion,
            number(row.error),
            *([f"{row.weight:.2f}"] if weighted(why) else []),
            "–" if row.share is None else units.percent(row.share, 0),
            price_text(row.down),
            price_text(row.up),
            MARKS[row.verdict],
        )
    return table


def _step_json(step: Step | None) -> dict[str, Any] | None:
    if step is None:
        return None
    return {"width": step.width, "error": step.error, "cost": step.cost, "error_per_percent": step.price}
