"""The front, the controls, the groups and the layers as tables for programs.

Decides columns and their names; numbers stay numbers. Must not know how they are shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autoprune.cost import COSTS, LATENCY
from autoprune.report.intervals import hypervolume_interval
from autoprune.report.view import FrontPoint, LayerRow, SearchView

if TYPE_CHECKING:
    import pandas as pd

_FRACTION = {name: f"{name.removesuffix('_bytes').removesuffix('_ns')}_fraction" for name in (*COSTS, LATENCY)}
_MEASURED = ("latency_ms", "latency_spread_ms", "latency_predicted_ms")
SCHEMA = 1


def front_table(view: SearchView) -> pd.DataFrame:
    """Returns the front, one row a point, in order of rising cost.

    Columns: `trial`, `val_accuracy`, `test_accuracy` (NaN where it was not measured), each cost (`macs`, `params`,
    `size_bytes`, `activation_bytes`), its fraction of dense and what is saved (`macs_saved` = dense less pruned),
    `latency_ms`, `latency_spread_ms` and `latency_predicted_ms` (NaN where there are none), `no_faster` (MACs fell,
    measured latency did not), `criterion`, `origin`, `knee`. With a latency table `latency_ns` is a cost as well. Where
    costs count non-zeros, `caveat` too.
    """
    import pandas as pd

    rows = [_row(view, point) for point in view.front]
    return pd.DataFrame(rows, columns=_columns(view))


def controls_table(view: SearchView) -> pd.DataFrame:
    """Returns the controls with the columns of `front_table` and `front_gain`.

    `front_gain` is by how much the front's best point within the control's cost, or 2 % above it, is more accurate; NaN
    where the front has no point that is as small.
    """
    import pandas as pd

    rows = []
    for point in view.controls:
        gain = view.gain(point)
        rows.append({**_row(view, point), "front_gain": math.nan if gain is None else gain})
    return pd.DataFrame(rows, columns=[*_columns(view), "front_gain"])


def group_table(view: SearchView) -> pd.DataFrame:
    """Returns the pruning groups, one row each: `group`, `dense` width, and a column a front point with its width."""
    import pandas as pd

    rows = [
        {"group": group, "dense": size, **{f"trial {p.name}": p.widths.get(group, size) for p in view.front}}
        for group, size in view.sizes.items()
    ]
    return pd.DataFrame(rows, columns=["group", "dense", *(f"trial {p.name}" for p in view.front)])


def layer_table(rows: Sequence[LayerRow]) -> pd.DataFrame:
    """Returns the before/after summary of one trial: one row a layer, with `macs_saved` and `params_saved`."""
    import pandas as pd

    records = [
        {
            "module": row.module,
            "kind": row.kind,
            "width_before": row.width_before,
            "width_after": row.width_after,
            "macs_before": row.macs_before,
            "macs_after": row.macs_after,
            "macs_saved": row.macs_before - row.macs_after,
            "params_before": row.params_before,
            "params_after": row.params_after,
            "params_saved": row.params_before - row.params_after,
        }
        for row in rows
    ]
    columns = ["module", "kind", "width_before", "width_after"]
    columns += [f"{cost}_{when}" for cost in ("macs", "params") for when in ("before", "after", "saved")]
    return pd.DataFrame(records, columns=columns)


def front_json(view: SearchView) -> dict[str, Any]:
    """Returns the front as plain JSON values for programs; what is not a finite number becomes `None`."""
    interval = hypervolume_interval(view, view.trials)
    return {
        "schema": SCHEMA,
        "name": view.name,
        "rung": view.rung,
        "pruning": view.pruning,
        "caveat": view.caveat,
        "primary": view.primary,
        "objective": view.objective.to_json(),
        "limits": dict(view.limits),
        "dense": _json_row(view, view.dense),
        "front": [_json_row(view, point) for point in view.front],
        "controls": [{**_json_row(view, p), "front_gain": _plain(view.gain(p))} for p in view.controls],
        "knee": view.knee.trial if view.knee else None,
        "hypervolume": view.hypervolume,
        "controls_hypervolume": view.controls_hypervolume if view.controls else None,
        "hypervolume_interval": None if interval is None else [interval.low, interval.high],
        "reference": {"val_error": view.reference[0], _FRACTION[view.primary]: view.reference[1]},
        "trials": len(view.trials),
        "notes": list(view.notes),
    }


def _columns(view: SearchView) -> list[str]:
    columns = ["trial", "val_accuracy", "test_accuracy"]
    for name in view.costs:
        columns += [name, _FRACTION[name], f"{name}_saved"]
    last = ["caveat"] if view.caveat else []
    return [*columns, *_MEASURED, "no_faster", "criterion", "origin", "knee", *last]


def _row(view: SearchView, point: FrontPoint) -> dict[str, Any]:
    row: dict[str, Any] = {
        "trial": point.trial,
        "val_accuracy": point.val_accuracy,
        "test_accuracy": math.nan if point.test_accuracy is None else point.test_accuracy,
    }
    for name in view.costs:
        row[name] = point.costs[name]
        row[_FRACTION[name]] = view.fraction(point, name)
        row[f"{name}_saved"] = view.dense.costs[name] - point.costs[name]
    if view.caveat:
        row["caveat"] = view.caveat
    row |= {name: point.metrics.get(name, math.nan) for name in _MEASURED} | {"no_faster": view.no_faster(point)}
    knee = view.knee
    return {**row, "criterion": point.criterion, "origin": point.origin, "knee": knee is not None and point is knee}


def _json_row(view: SearchView, point: FrontPoint) -> dict[str, Any]:
    row = {key: _plain(value) for key, value in _row(view, point).items()}
    return {**row, "widths": dict(point.widths), "metrics": {k: _plain(v) for k, v in point.metrics.items()}}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
