"""What people read at the end of a search: tables, figures, and the live line while it runs.

Everything here turns plain values into text, tables and pictures. It must not know where the values come from (Optuna,
MLflow) nor how they were measured (torch). pandas, plotly and matplotlib are imported by the functions that need them,
so that the live line costs nothing.
"""

from autoprune.report import units
from autoprune.report.comparison import Compared, comparison_json, render_comparison
from autoprune.report.diagnostics import (
    RungPair,
    RungTime,
    audit_figure,
    latency_figure,
    sensitivity_figure,
    time_figure,
)
from autoprune.report.explanation import explanation_json, render_explanation
from autoprune.report.figures import figure_html, front_figure, front_png, widths_figure, widths_png
from autoprune.report.inspection import render_inspection
from autoprune.report.latency import render_latency
from autoprune.report.page import FailureRow, PageData, chosen_points, render_page
from autoprune.report.plot import plot_front
from autoprune.report.profile import render_profile
from autoprune.report.progress import Progress
from autoprune.report.status import render_status
from autoprune.report.status_page import status_page
from autoprune.report.tables import controls_table, front_json, front_table, group_table, layer_table
from autoprune.report.terminal import render_front, render_layers
from autoprune.report.view import FrontPoint, LayerRow, SearchView, point_of

__all__ = [
    "Compared",
    "FailureRow",
    "FrontPoint",
    "LayerRow",
    "PageData",
    "Progress",
    "RungPair",
    "RungTime",
    "SearchView",
    "audit_figure",
    "chosen_points",
    "comparison_json",
    "controls_table",
    "explanation_json",
    "figure_html",
    "front_figure",
    "front_json",
    "front_png",
    "front_table",
    "group_table",
    "latency_figure",
    "layer_table",
    "plot_front",
    "point_of",
    "render_comparison",
    "render_explanation",
    "render_front",
    "render_inspection",
    "render_latency",
    "render_layers",
    "render_page",
    "render_profile",
    "render_status",
    "sensitivity_figure",
    "status_page",
    "time_figure",
    "units",
    "widths_figure",
    "widths_png",
]
