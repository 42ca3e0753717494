"""Commands on one model of a search: pick, finetune, reproduce, sync."""

from __future__ import annotations

from typing import Annotated

import typer

from autoprune.cli.shared import HOME, CodeOption, HomeOption, ModelReference, SearchName, app, guarded, note

_LIMIT = "At most this: a fraction of dense (0.5) or an amount ({})."


@app.command()
@guarded
def pick(
    name: SearchName,
    trial: Annotated[int | None, typer.Option(min=0, help="Number of the trial, as the front shows it.")] = None,
    knee: Annotated[bool, typer.Option("--knee", help="The front's best point for the money.")] = False,
    max_macs: Annotated[str | None, typer.Option(help=_LIMIT.format("30M"))] = None,
    max_params: Annotated[str | None, typer.Option(help=_LIMIT.format("1M"))] = None,
    max_size: Annotated[str | None, typer.Option(help=_LIMIT.format("2MB"))] = None,
    max_memory: Annotated[str | None, typer.Option(help=_LIMIT.format("2MB"))] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="At most this latency in milliseconds, as the search measured it.")
    ] = None,
    min_accuracy: Annotated[
        float | None,
        typer.Option(help="At least this validation accuracy, as in 0.9; of an own metric at least this value."),
    ] = None,
    home: HomeOption = HOME,
) -> None:
    """Pick a model of the front: by its number, the knee, or the best one within limits.

    The pick is the alias `picked` in MLflow, which can be set there as well; it is kept with the study too.
    """
    from autoprune.coordinator import Wish
    from autoprune.coordinator import pick as pick_model

    given = {"macs": max_macs, "params": max_params, "size": max_size, "memory": max_memory}
    limits = {key: value for key, value in given.items() if value is not None}
    found = pick_model(name, Wish(trial, knee, limits, max_latency_ms, min_accuracy), home=home, say=note)
    typer.echo(f"picked: {found.search}, trial {found.trial}")


@app.command()
@guarded
def finetune(
    name: ModelReference,
    epochs: Annotated[float, typer.Option(help="How long to train; the rate falls to zero over them.")],
    trial: Annotated[int | None, typer.Option(min=0, help="Number of the trial. Default: what is picked.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: the recipe's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides order and augmentation.")] = 0,
    home: HomeOption = HOME,
    allow_code: CodeOption = False,
) -> None:
    """Train a model of the front longer with the space's recipe, as a run of its own; export it as NAME@finetuned."""
    from autoprune.coordinator import finetune_model

    how = {"epochs": epochs, "lr": lr, "seed": seed}
    typer.echo(finetune_model(name, home=home, trial=trial, how=how, say=note, allow_code=allow_code).text)


@app.command()
@guarded
def reproduce(
    run: Annotated[str, typer.Argument(help="Id of a trial's MLflow run.")],
    home: HomeOption = HOME,
    allow_code: CodeOption = False,
) -> None:
    """Evaluate a recorded trial again from its settings and seeds, and compare; exit status 1 where numbers differ."""
    from autoprune.coordinator import reproduce_run

    found = reproduce_run(run, home=home, say=note, allow_code=allow_code)
    typer.echo(found.text)
    if not found.equal:
        raise typer.Exit(1)


@app.command()
@guarded
def sync(name: SearchName, home: HomeOption = HOME) -> None:
    """Record in MLflow what the studies hold and MLflow does not: trials, the front and its models, a pick."""
    from autoprune.coordinator import sync_search

    typer.echo(sync_search(name, home=home, say=note).text)
