"""Commands that read a space: search, inspect, validate, schema."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from autoprune.cli.shared import (
    HOME,
    CodeOption,
    HomeOption,
    JsonOption,
    SetOption,
    SpaceArgument,
    app,
    guarded,
    load_settings,
    path_of,
    seconds,
    show,
)


@app.command()
@guarded
def inspect(
    space: SpaceArgument = None,
    as_json: JsonOption = False,
    overrides: SetOption = None,
    home: HomeOption = HOME,
    allow_code: CodeOption = False,
) -> None:
    """Show the pruning groups of a model, what is frozen and why, and what each part costs."""
    loaded = load_settings(space, overrides, allow_code=allow_code)
    from autoprune.coordinator import inspect_space

    text, data = inspect_space(loaded, home=home)
    show(text, data, as_json=as_json)


@app.command()
@guarded
def validate(space: SpaceArgument = None, overrides: SetOption = None, allow_code: CodeOption = False) -> None:
    """Check a space file and the files that it names; report all faults together. Nothing that it names is run."""
    loaded = load_settings(space, overrides, check_files=True, allow_code=allow_code)
    rungs = " -> ".join(rung.rung for rung in loaded.search.ladder)
    typer.echo(f"{path_of(space)}: valid; search {loaded.name}, {loaded.search.trials} candidates, {rungs}")


@app.command()
@guarded
def search(
    space: SpaceArgument = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Candidates on the first rung. Default: the space's.", show_default=False)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that evaluate. Default: by the machine.", show_default=False)
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            parser=seconds, metavar="SECONDS", help="Stop after this time (30m, 2h); the same command resumes."
        ),
    ] = None,
    home: HomeOption = HOME,
    overrides: SetOption = None,
    name: Annotated[str | None, typer.Option(help="Name of the search, instead of the space's.")] = None,
    summary: Annotated[bool, typer.Option("--summary", help="Also show before and after, layer by layer.")] = False,
    allow_code: CodeOption = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="local|auto|ADDRESS",
            help="Evaluate on a Ray cluster: a new one here, the one that was started here, or ray://host:port.",
            show_default=False,
        ),
    ] = None,
    cpus_per_trial: Annotated[float, typer.Option(help="Processors that a trial takes on the Ray cluster.")] = 1.0,
    gpus_per_trial: Annotated[
        float | None,
        typer.Option(
            help="GPUs that a trial takes there; 0.5: two share one. Default: 1 on a GPU.", show_default=False
        ),
    ] = None,
) -> None:
    """Search for a Pareto front of accuracy against complexity. Run again, it resumes."""
    renamed = [f"name={json.dumps(name)}"] if name is not None else []
    loaded = load_settings(space, [*(overrides or []), *renamed], check_files=True, allow_code=allow_code)
    from autoprune.coordinator import OnRay, run_search

    if ray is None and (cpus_per_trial != 1.0 or gpus_per_trial is not None):
        raise typer.BadParameter("--cpus-per-trial and --gpus-per-trial belong to --ray")
    place = workers if ray is None else OnRay(ray, workers, cpus_per_trial, gpus_per_trial)
    outcome = run_search(loaded, home=home, workers=place, timeout=timeout, trials=trials, summary=summary)
    typer.echo(outcome.text)


@app.command()
@guarded
def schema() -> None:
    """Print the JSON Schema of space files, with a description of every key."""
    from autoprune.space import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
