"""What a search says at its end: the front, the layers of its knee, and what to type next.

Decides which commands are named, and by which address what already runs is found. Must not know how a search runs.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoprune import report
from autoprune.coordinator.recording.records import Records
from autoprune.coordinator.stored.display import layer_rows
from autoprune.coordinator.stored.places import HOME
from autoprune.coordinator.stored.search import StoredSearch
from autoprune.coordinator.stored.service_state import read_service
from autoprune.redaction import hide_secrets
from autoprune.report import SearchView
from autoprune.report.console import terminal


def ending_text(
    stored: StoredSearch, view: SearchView, records: Records, *, left: int, origin: Mapping[str, Any], layers: bool
) -> str:
    """Returns the whole text.

    Args:
        stored: The search.
        view: The same as it is shown.
        records: Where it was recorded.
        left: Records that wait for MLflow.
        origin: What builds the dense model, as a model's document says it.
        layers: Whether the knee's layers are shown before and after.
    """
    width, color = terminal()
    lines = [report.render_front(view, console_width=width, color=color).rstrip("\n")]
    knee = view.knee or (view.front[-1] if view.front else None)
    number = knee.trial if knee is not None else None
    if layers and number is not None:
        rows = layer_rows(stored, number)
        lines.append(report.render_layers(view, number, rows, console_width=width, color=color).rstrip("\n"))
    if left:
        lines.append(f"MLflow is away: {left} records wait; the same command writes them once it is back.")
    commands = next_commands(stored, records, number, named=bool(origin.get("name") or origin.get("factory")))
    length = max(len(command) for command, _ in commands)
    lines.append("\n".join(["Next:", *(f"  {command:<{length}}  # {what}" for command, what in commands)]))
    return "\n\n".join(lines)


def next_commands(stored: StoredSearch, records: Records, number: int | None, *, named: bool) -> list[tuple[str, str]]:
    """Returns what to type next and what it is for; it finds this home folder, and names `make` only where that does.

    Args:
        stored: The search.
        records: Where it was recorded.
        number: A trial of its front, None where there is none.
        named: Whether a command can build the dense model, from a name or a factory.
    """
    name, home = stored.name, stored.home
    usual = home.resolve() == Path(os.environ.get("AUTOPRUNE_HOME") or HOME).resolve()
    make = usual and Path("mlflow/server.env").is_file()
    at = "" if usual else f" --home {shlex.quote(str(home))}"
    commands = [(f"make front NAME={name}" if make else f"autoprune front {name}{at}", "this table again")]
    if number is not None and not named:
        if stored.keeps(number):
            call = f"autoprune.load({str(stored.model_path(number))!r}, factory)"
            commands.append((call, "in Python: a model of the front, given what builds the dense one"))
    elif number is not None:
        export = f"autoprune export {name} --trial {number} --format onnx{at}"
        make_export = f"make export NAME={name} TRIAL={number} FORMAT=onnx"
        commands.append((make_export if make else export, "a model of the front as a file"))
    return [*commands, *_pages(records, at=at, make=make, running=_running(home))]


def _pages(records: Records, *, at: str, make: bool, running: Mapping[str, str]) -> list[tuple[str, str]]:
    """Returns how the pages are reached: by their address where a service serves them, else by what starts them."""
    ours = Path("mlflow/server.env").is_file() and "MLFLOW_TRACKING_URI" not in os.environ
    ui = "make mlflow-ui" if ours else f"mlflow server --backend-store-uri {shlex.quote(hide_secrets(records.uri))}"
    charts = f"{records.address}{records.charts or ''}"
    if records.uri.startswith(("http://", "https://")) or "AUTOPRUNE_MLFLOW" in os.environ:
        pages = [(charts, "the charts in MLflow")]
    elif "mlflow" in running and "MLFLOW_TRACKING_URI" not in os.environ:
        pages = [(f"{running['mlflow']}{records.charts or ''}", "the charts in MLflow")]
    else:
        pages = [(ui, charts)]
    if "dashboard" in running:
        return [*pages, (running["dashboard"], "Optuna dashboard")]
    board = "make dashboard" if make else f"autoprune dashboard{at}"
    return [*pages, (board, "Optuna dashboard: http://127.0.0.1:8080")]


def _running(home: Path) -> dict[str, str]:
    """Returns the addresses of the pages that a service of this home folder serves."""
    service = read_service(home)
    return {} if service is None else {s["name"]: s["address"] for s in service["services"] if s["address"]}
