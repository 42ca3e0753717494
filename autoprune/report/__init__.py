"""What people read at the end of a search: tables, figures, and the live line while it runs.

Everything here turns plain values into text, tables and pictures. It must not know where the values come from (Optuna,
MLflow) nor how they were measured (torch). pandas, plotly and matplotlib are imported by the functions that need them,
so that the live line costs nothing.
"""

from autoprune.report.figures import figure_html, front_figure, front_png, widths_figure, widths_png
from autoprune.report.inspection import render_inspection
from autoprune.report.latency import render_latency
from autoprune.report.progress import Progress
from autoprune.report.tables import controls_table, front_json, front_table, group_table, layer_table
from autoprune.report.terminal import render_front, render_layers
from autoprune.report.view import FrontPoint, LayerRow, SearchView, point_of

__all__ = [
    "FrontPoint",
    "LayerRow",
    "Progress",
    "SearchView",
    "controls_table",
    "figure_html",
    "front_figure",
    "front_json",
    "front_png",
    "front_table",
    "group_table",
    "layer_table",
    "point_of",
    "render_front",
    "render_inspection",
    "render_latency",
    "render_layers",
    "widths_figure",
    "widths_png",
]
