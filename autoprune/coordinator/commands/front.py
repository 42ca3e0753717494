"""The front of a search, as text and as JSON values."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from autoprune import report
from autoprune.coordinator.stored.display import layer_rows, view_of
from autoprune.coordinator.stored.search import read_search
from autoprune.report.console import has_unicode, terminal


def show_front(name: str, *, home: Path, layers: int | None = None) -> tuple[str, dict[str, Any]]:
    """Returns the front of a search as text and as JSON values; with `layers`, that trial's layers too.

    Raises:
        StudyError: There is no such search or trial.
    """
    stored = read_search(name, home=home)
    view = view_of(stored)
    width, color = terminal()
    text = report.render_front(view, console_width=width, color=color)
    if sys.stdout.isatty():
        text += "\n" + report.plot_front(view, width=width, unicode=has_unicode())
    data = report.front_json(view)
    if layers is not None:
        rows = layer_rows(stored, layers)
        text += "\n" + report.render_layers(view, layers, rows, console_width=width, color=color)
        data["layers"] = report.layer_table(rows).to_dict(orient="records")
    return text.rstrip("\n"), data
