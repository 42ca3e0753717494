"""Commands of the service: serve, submit, status, cancel, logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from autoprune.cli.shared import (
    HOME,
    CodeOption,
    HomeOption,
    JsonOption,
    SearchName,
    SetOption,
    SpaceArgument,
    app,
    guarded,
    load_settings,
    note,
    seconds,
    show,
)

_SLICE = "1800"
SlotsOption = Annotated[
    int,
    typer.Option(
        min=1, max=64, envvar="AUTOPRUNE_SLOTS", help="Searches that run at once; cores and named GPUs are dealt out."
    ),
]
SliceOption = Annotated[
    float,
    typer.Option(
        "--slice",
        parser=seconds,
        metavar="SECONDS",
        envvar="AUTOPRUNE_SLICE",
        help="After this time (30m, 2h) a search makes room where others of no lower priority wait; it goes on later.",
    ),
]


@app.command()
@guarded
def submit(
    space: SpaceArgument = None,
    priority: Annotated[int, typer.Option(min=-1000, max=1000, help="Higher comes first.")] = 0,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Candidates on the first rung. Default: the space's.", show_default=False)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Parallel evaluations. Default: by its slot's cores.", show_default=False)
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(parser=seconds, metavar="SECONDS", help="Running time after which it ends (30m, 2h)."),
    ] = None,
    home: HomeOption = HOME,
    overrides: SetOption = None,
    name: Annotated[str | None, typer.Option(help="Name of the search, instead of the space's.")] = None,
    allow_code: CodeOption = False,
) -> None:
    """Add a search to the queue; `autoprune serve` runs it, in this directory."""
    renamed = [f"name={json.dumps(name)}"] if name is not None else []
    loaded = load_settings(space, [*(overrides or []), *renamed], check_files=True, allow_code=allow_code)
    from autoprune.coordinator import Wanted, submit_space

    wanted = Wanted(priority, trials, timeout, workers, ("--allow-code",) if allow_code else ())
    job = submit_space(loaded, wanted, home=home)
    typer.echo(f"submitted: {job.name} (job {job.number}, priority {job.request.priority})")
    note(f"`autoprune status` shows the queue, `autoprune logs {job.name} --follow` what the search does")


@app.command()
@guarded
def status(
    name: Annotated[str | None, typer.Argument(help="Name of a search. Default: all.", show_default=False)] = None,
    as_json: JsonOption = False,
    home: HomeOption = HOME,
) -> None:
    """Show the searches, the queue, and how the service's processes are."""
    from autoprune.coordinator import show_status

    text, data = show_status(home, name)
    show(text, data, as_json=as_json)


@app.command()
@guarded
def cancel(name: SearchName, home: HomeOption = HOME) -> None:
    """End a submitted search, or take it off the queue; what it has found stays."""
    from autoprune.coordinator import cancel_search

    typer.echo(cancel_search(name, home=home))


@app.command()
@guarded
def logs(
    name: SearchName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the search has ended.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON lines as they are stored.")] = False,
    home: HomeOption = HOME,
) -> None:
    """Show the log of a search."""
    from autoprune.coordinator import log_lines

    for line in log_lines(name, home=home, follow=follow, as_json=as_json):
        print(line, flush=follow)


@app.command()
@guarded
def serve(
    port: Annotated[
        int, typer.Option(min=1, max=65535, envvar="AUTOPRUNE_PORT", help="Port of the status page on 127.0.0.1.")
    ] = 8090,
    dashboard_port: Annotated[
        int,
        typer.Option(
            min=1, max=65535, envvar="AUTOPRUNE_DASHBOARD_PORT", help="Port of the Optuna dashboard on 127.0.0.1."
        ),
    ] = 8080,
    slots: SlotsOption = 1,
    slice_: SliceOption = _SLICE,  # type: ignore[assignment]  # read by `seconds`
    home: HomeOption = HOME,
) -> None:
    """Run the queue, the MLflow server and the Optuna dashboard until Ctrl-C, and restart what dies."""
    from autoprune.coordinator import ServeOptions
    from autoprune.coordinator import serve as run_service

    options = ServeOptions(slots=slots, slice_seconds=slice_, page_port=port, dashboard_port=dashboard_port)
    run_service(options, home=home, say=note)


@app.command(name="run-queue", hidden=True)
@guarded
def run_queue(slots: SlotsOption = 1, slice_: SliceOption = _SLICE, home: HomeOption = HOME) -> None:  # type: ignore[assignment]
    """Run the queue alone: what `autoprune serve` keeps running."""
    from autoprune.coordinator import run_queue as work

    work(home=Path(home), slots=slots, slice_seconds=slice_, say=note)
