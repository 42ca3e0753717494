"""What the commands but `search` do: show a front, inspect a model, export a trial, start the dashboard.

Decides what is read and handed to the report. Changes nothing but the exported files.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from autoprune import report, studies
from autoprune.coordinator.views import StoredSearch, make_home, open_existing, read_search, storage_path, view_of
from autoprune.space import Space


def terminal() -> tuple[int, bool]:
    """Returns the columns of the terminal and whether it shows colours; wide and plain where output is piped."""
    if not sys.stdout.isatty():
        return 140, False
    return max(60, shutil.get_terminal_size((120, 40)).columns), True


def _has_unicode() -> bool:
    """Whether the terminal can write the characters of a picture."""
    try:
        "●╌┊│".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


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
        text += "\n" + report.plot_front(view, width=width, unicode=_has_unicode())
    data = report.front_json(view)
    if layers is not None:
        rows = layer_rows(stored, layers)
        text += "\n" + report.render_layers(view, layers, rows, console_width=width, color=color)
        data["layers"] = report.layer_table(rows).to_dict(orient="records")
    return text.rstrip("\n"), data


def layer_rows(stored: StoredSearch, trial: int) -> list[report.LayerRow]:
    """Returns a trial's layers before and after, as its saved model tells.

    Raises:
        StudyError: There is no such trial, or its model was not kept.
    """
    from autoprune.network.artifacts.saved import read_document

    document = read_document(stored.model_path(trial))
    return [report.LayerRow(**row) for row in document["layers"]]


def inspect_space(space: Space, *, home: Path) -> tuple[str, dict[str, Any]]:
    """Returns the pruning groups of a space's model, what is frozen and why, and costs, as text and as JSON values.

    Raises:
        InputError: The model or the data cannot be used.
    """
    from autoprune.network import preparing, settings
    from autoprune.network.artifacts import layers as artifacts_layers

    ingredients = preparing.ingredients_of(space, cache=home / "cache")
    network = preparing.trace_ingredients(ingredients, space)
    data = artifacts_layers.describe(network, settings.searchable_groups(network, space))
    width, color = terminal()
    return report.render_inspection(data, title=space.name, console_width=width, color=color).rstrip("\n"), data


def latency_space(space: Space, *, home: Path) -> tuple[str, dict[str, Any]]:
    """Measures the latency table of a space's model, or reads the one that the home folder's cache holds.

    Returns what it predicts, and how well, as text and as JSON values.

    Raises:
        InputError: The model or the data cannot be used, or the network cannot be timed under the space's conditions.
    """
    from autoprune.network import preparing
    from autoprune.network.latency.cache import latency_table

    make_home(home)
    with report.Progress() as progress:
        ingredients = preparing.ingredients_of(space, cache=home / "cache")
        network = preparing.trace_ingredients(ingredients, cache=home / "cache", note=progress.note)
        data = latency_table(network, space, cache=home / "cache", note=progress.note).summary()
    width, color = terminal()
    return report.render_latency(data, title=space.name, console_width=width, color=color).rstrip("\n"), data


def dashboard_command(home: Path, port: int) -> list[str]:
    """Returns the command that shows a home folder's studies in the Optuna dashboard, on this machine alone.

    A password goes to it by this process's environment, where other users of the machine do not see it.

    Raises:
        StudyError: There is no study yet, or the storage cannot be used.
    """
    place = storage_path(home)
    open_existing(home).engine.dispose()
    if isinstance(place, Path):
        url = f"sqlite:///{place.resolve()}"
    else:
        url, password = studies.split_password(place)
        os.environ.update({"PGPASSWORD": password} if password else {})
    beside = Path(sys.executable).with_name("optuna-dashboard")
    program = str(beside) if beside.is_file() else "optuna-dashboard"
    return [program, url, "--host", "127.0.0.1", "--port", str(port)]


def mlflow_command(home: Path) -> tuple[list[str], dict[str, str], str]:
    """Returns the command that serves MLflow's pages, its environment, and their address.

    Raises:
        InputError: Other machines could come in without a login, or a setting is wrong.
        TrackingError: `mlflow/server.env` cannot be read.
    """
    from autoprune import tracking

    plan = tracking.server_plan(home, os.environ)
    return list(plan.command), dict(plan.env), plan.address
