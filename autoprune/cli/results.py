"""Commands on a search that has run: front, export, dashboard."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from autoprune.cli.shared import (
    HOME,
    CodeOption,
    HomeOption,
    JsonOption,
    ModelReference,
    SearchName,
    app,
    guarded,
    note,
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
    name: ModelReference,
    trial: Annotated[
        int | None,
        typer.Option(min=0, help="Number of the trial, as the front shows it. Default: what is picked."),
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help=f"One or more of {', '.join(FORMATS)}, with commas between; or all.")
    ] = "safetensors",
    output: Annotated[
        Path | None, typer.Option(help="Folder to write to. Default: exports/NAME-TRIAL.", show_default=False)
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Also score dense and pruned by class, for the model card.")
    ] = False,
    home: HomeOption = HOME,
    allow_code: CodeOption = False,
) -> None:
    """Write a pruned model and its model card to disk: a trial's, or the picked one."""
    formats = FORMATS if format_ == "all" else tuple(dict.fromkeys(part.strip() for part in format_.split(",")))
    for wanted in formats:
        if wanted not in FORMATS:
            raise InputError(f"unknown format {wanted!r}{nearest(wanted, [*FORMATS, 'all'])}")
    from autoprune.coordinator import ExportWish, export_models

    wish = ExportWish(name, trial, formats, output, evaluate, allow_code)
    for path in export_models(wish, home=home, say=note):
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


@app.command("mlflow-ui")
@guarded
def mlflow_ui(home: HomeOption = HOME) -> None:
    """Open the MLflow UI on the searches of this folder, as `mlflow/server.env` and the environment say.

    An interface that other machines reach is refused unless people must log in.
    """
    from autoprune.coordinator import mlflow_command

    command, env, address = mlflow_command(home)
    typer.echo(f"MLflow: {address} (Ctrl-C ends it)", err=True)
    sys.stdout.flush()
    os.execvpe(command[0], command, env)
