"""Commands that tell what a search has found, and why: report, explain, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoprune.cli.shared import HOME, HomeOption, JsonOption, SearchName, app, guarded, show


@app.command()
@guarded
def report(
    name: SearchName,
    output: Annotated[
        Path | None, typer.Option(help="File to write. Default: exports/NAME-report.html.", show_default=False)
    ] = None,
    home: HomeOption = HOME,
) -> None:
    """Write everything about a search into one HTML file that needs no network."""
    from autoprune.coordinator import write_report

    typer.echo(write_report(name, home=home, output=output))


@app.command()
@guarded
def explain(
    name: SearchName,
    trial: Annotated[int, typer.Option(min=0, help="Number of the trial, as the front shows it.", show_default=False)],
    as_json: JsonOption = False,
    home: HomeOption = HOME,
) -> None:
    """Tell why each group of a trial has its width: its error, its share of the cost, and the price of a step."""
    from autoprune.coordinator import explain_trial

    text, data = explain_trial(name, home=home, trial=trial)
    show(text, data, as_json=as_json)


@app.command()
@guarded
def compare(
    name: SearchName,
    trials: Annotated[list[int], typer.Argument(metavar="TRIAL...", help="Numbers of two or more trials.")],
    as_json: JsonOption = False,
    home: HomeOption = HOME,
) -> None:
    """Put trials side by side: accuracies, costs, and what each group keeps."""
    from autoprune.coordinator import compare_trials

    text, data = compare_trials(name, home=home, trials=trials)
    show(text, data, as_json=as_json)
