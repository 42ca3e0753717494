"""The command line.

Decides the commands, their options, what goes to stdout and stderr, and the exit status. Must not do any of the work,
nor import anything heavy at module level: `autoprune --help` answers at once. Each module beside this one holds the
commands of one topic.
"""

from __future__ import annotations

from typing import Annotated

import typer

from autoprune import memory
from autoprune.cli import latency, picking, profiling, reporting, results, searching, serving
from autoprune.cli.shared import app

__all__ = ["app", "latency", "main", "picking", "profiling", "reporting", "results", "searching", "serving"]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"autoprune {version('autoprune')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Finds how far each layer of a trained PyTorch model can be pruned, and shows accuracy against complexity."""


def main() -> None:
    """Runs the command line and exits with its status."""
    memory.keep_freed()
    app(prog_name="autoprune")
