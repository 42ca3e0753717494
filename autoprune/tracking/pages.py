"""The prepared pages of MLflow's web UI: accuracy against cost with all ratios side by side, and the list of runs.

Decides what the pages show. The format is the front end's own (learnt from the bundle of MLflow 3.17) and
undocumented, so nothing depends on it: the interactive figure on the search's run shows the same front. Must not know
mlflow.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

from autoprune.objective import ACCURACY, Objective

WORKFLOW = "workflowType=machine_learning"
"""Opens the UI on its pages for training; without it, it may open on those for agents."""

SHARED_VIEW_TAG = "mlflow.sharedViewState."
_TAG_LIMIT = 5000
_AXES = 14
_TAGS = ("tags.`pareto`", "tags.`origin`")


def chart_view(
    *,
    filter_text: str,
    cost: str,
    params: Sequence[str],
    metrics: Sequence[str] = (),
    objective: Objective = ACCURACY,
) -> dict[str, Any]:
    """Returns the state of the page: a scatter of `val_accuracy` against `cost` and parallel coordinates.

    Args:
        filter_text: Which runs are shown, in MLflow's search language.
        cost: The metric on the scatter's x axis, such as `macs_fraction`.
        params: Parameters that become axes; more than 14 cannot be read, the first ones are taken.
        metrics: Further metrics that become a column of the table and an axis.
        objective: What `val_accuracy` is, for the charts' titles.
    """
    section = "autoprune-front"
    shown = ["val_accuracy", cost, *metrics]
    axes = list(params)[:_AXES]
    common = {"metricSectionId": section, "deleted": False, "isGenerated": False}
    charts: list[dict[str, Any]] = [
        {
            "type": "SCATTER",
            "uuid": "autoprune-scatter",
            "runsCountToCompare": 1000,
            "xaxis": _axis(cost),
            "yaxis": _axis("val_accuracy"),
            "displayName": f"{objective.long('val')}{objective.hint} against {cost}",
            **common,
        },
        {
            "type": "PARALLEL",
            "uuid": "autoprune-parallel",
            "runsCountToCompare": 1000,
            "selectedParams": axes,
            "selectedMetrics": [cost, "val_accuracy"],
            "showAllRuns": False,
            "displayName": f"ratios, cost and {objective.name}{objective.hint}",
            **common,
        },
    ]
    # Sections are sorted by name unless somebody has reordered them: we want ours first, one chart to a row.
    front = {"uuid": section, "name": "Front", "display": True, "isReordered": True, "columns": 1, "cardHeight": 400}
    return {
        "searchFilter": filter_text,
        "orderByKey": f"metrics.`{cost}`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "runsHiddenMode": "SHOW_ALL",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "selectedColumns": [*(f"metrics.`{name}`" for name in shown), *_TAGS],
        "compareRunCharts": charts,
        "compareRunSections": [front],
    }


def list_view(*, filter_text: str, order_by: str, metrics: Sequence[str]) -> dict[str, Any]:
    """Returns the state of the page that lists runs: the columns `metrics`, then rung, front and origin.

    Args:
        filter_text: Which runs are shown, in MLflow's search language.
        order_by: The metric that orders them, lowest first.
        metrics: The columns.
    """
    return {
        "searchFilter": filter_text,
        "orderByKey": f"metrics.`{order_by}`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "runsHiddenMode": "SHOW_ALL",
        "viewMaximized": True,
        "runListHidden": False,
        "groupBy": None,
        "selectedColumns": [*(f"metrics.`{name}`" for name in metrics), "tags.`rung`", *_TAGS],
    }


def encode_view(state: dict[str, Any]) -> str:
    """Returns `state` as the front end reads it from a tag: JSON, deflated where it would not fit."""
    text = json.dumps(state, separators=(",", ":"))
    if len(text) <= _TAG_LIMIT:
        return text
    return "deflate;" + base64.b64encode(zlib.compress(text.encode(), 9)).decode("ascii")


def view_link(experiment_id: str, key: str, *, mode: str = "CHART") -> str:
    """Returns the part of the page's address that follows the server's; `mode` is `CHART` or `TABLE`."""
    return f"/#/experiments/{experiment_id}/runs?viewStateShareKey={key}&compareRunsMode={mode}&{WORKFLOW}"


def _axis(metric: str) -> dict[str, str]:
    return {"key": metric, "type": "METRIC", "dataAccessKey": metric}
