"""Commands on a search that has run: front, export, dashboard."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from autoprune.cli.shared import (
    HOME,
    HomeOption,
    JsonOption,
    SearchName,
    app,
    guarded,
    show,
)
from autoprune.errors import InputError, MissingExtraError, nearest

FORMATS = ("safetensors", "pt2", "onnx")


@app.command()
@guarded
def front(
    name: SearchName,
    as_json: JsonOption = False,
    layers: Annotated[
        int | None, typer.Option(metavar="TRIAL", min=0, help="Also show this trial's layers before and after.")
    ] = None,
    home: HomeOption = HOME,
) -> None:
    """Show the front that a search has found: what each point keeps, and what it saves."""
    from autoprune.coordinator import show_front

    text, data = show_front(name, home=home, layers=layers)
    show(text, data, as_json=as_json)


@app.command()
@guarded
def export(
    name: SearchName,
    trial: Annotated[int, typer.Option(min=0, help="Number of the trial, as the front shows it.", show_default=False)],
    format_: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "safetensors",
    output: Annotated[
        Path | None, typer.Option(help="Folder to write to. Default: exports/NAME-TRIAL.", show_default=False)
    ] = None,
    home: HomeOption = HOME,
) -> None:
    """Write the pruned model of a trial to disk."""
    if format_ not in FORMATS:
        raise InputError(f"unknown format {format_!r}{nearest(format_, FORMATS)}")
    from autoprune.coordinator import export_trial

    for path in export_trial(name, home=home, trial=trial, format=format_, output=output):
        typer.echo(path)


@app.command()
@guarded
def dashboard(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8080,
    home: HomeOption = HOME,
) -> None:
    """Open the Optuna dashboard on the searches of this folder, at 127.0.0.1."""
    from autoprune.coordinator import dashboard_command

    command = dashboard_command(home, port)
    typer.echo(f"Optuna dashboard: http://127.0.0.1:{port} (Ctrl-C ends it)", err=True)
    sys.stdout.flush()
    try:
        os.execvp(command[0], command)
    except FileNotFoundError as error:
        raise MissingExtraError(f"{command[0]} is not installed; pip install optuna-dashboard") from error
