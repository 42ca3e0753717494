"""The command line.

Decides the commands, their options, what goes to stdout and stderr, and the exit status: 0, 2 for bad input, 3 for the
tracking server, 130 for Ctrl-C, 1 for anything else. Must not do any of the work, nor import anything heavy at module
level: `autoprune --help` answers at once.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from autoprune.errors import AutopruneError, InputError, MissingExtraError, nearest

if TYPE_CHECKING:
    from autoprune.space import Space

FORMATS = ("safetensors", "pt2", "onnx")

Params = ParamSpec("Params")

app = typer.Typer(
    name="autoprune",
    help="Finds how far each layer of a trained PyTorch model can be pruned, and shows accuracy against complexity.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def guarded(command: Callable[Params, None]) -> Callable[Params, None]:
    """Turns the errors of autoprune into a message on stderr and an exit status; bugs keep their traceback."""

    @functools.wraps(command)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except AutopruneError as error:
            typer.echo(f"autoprune: {error}", err=True)
            raise typer.Exit(error.status) from error
        except KeyboardInterrupt as error:
            resumes = "; the same command resumes where it stopped" if command.__name__ == "search" else ""
            typer.echo(f"\nautoprune: interrupted{resumes}", err=True)
            raise typer.Exit(130) from error
        except BrokenPipeError as error:  # `autoprune front NAME | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from error

    return run


def seconds(text: str | float) -> float:
    """Reads a duration: a number of seconds, or a number followed by s, m or h.

    Raises:
        typer.BadParameter: `text` is no such duration or is not positive.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([smh]?)\s*", str(text))
    value = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if value <= 0:
        raise typer.BadParameter(f"write a positive number of seconds, or 30m or 2h; got {text!r}")
    return value


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"autoprune {version('autoprune')}")
        raise typer.Exit


SpaceArgument = Annotated[
    Path | None,
    typer.Argument(metavar="[SPACE]", help="Space file. Default: the embedded digits example.", show_default=False),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as in --set recipe.lr=0.01; repeatable."),
]
HomeOption = Annotated[
    Path, typer.Option("--home", envvar="AUTOPRUNE_HOME", help="Folder of the studies and of everything cached.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
SearchName = Annotated[str, typer.Argument(help="Name of the search: `name` in its space file.")]

HOME = Path(".autoprune")


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Finds how far each layer of a trained PyTorch model can be pruned, and shows accuracy against complexity."""


@app.command()
@guarded
def inspect(
    space: SpaceArgument = None, as_json: JsonOption = False, overrides: SetOption = None, home: HomeOption = HOME
) -> None:
    """Show the pruning groups of a model, what is frozen and why, and what each part costs."""
    loaded = _load(space, overrides)
    from autoprune.coordinator import inspect_space

    text, data = inspect_space(loaded, home=home)
    _print(text, data, as_json=as_json)


@app.command()
@guarded
def validate(space: SpaceArgument = None, overrides: SetOption = None) -> None:
    """Check a space file and the files that it names; report all faults together."""
    loaded = _load(space, overrides, check_files=True)
    rungs = " -> ".join(rung.rung for rung in loaded.search.ladder)
    typer.echo(f"{_path(space)}: valid; search {loaded.name}, {loaded.search.trials} candidates, {rungs}")


@app.command()
@guarded
def search(
    space: SpaceArgument = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Candidates on the first rung. Default: the space's.", show_default=False)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Parallel evaluations. Default: by the machine.", show_default=False)
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
) -> None:
    """Search for a Pareto front of accuracy against complexity. Run again, it resumes."""
    renamed = [f"name={json.dumps(name)}"] if name is not None else []
    loaded = _load(space, [*(overrides or []), *renamed], check_files=True)
    from autoprune.coordinator import run_search

    outcome = run_search(
        loaded, home=home, workers=workers or _workers(loaded), timeout=timeout, trials=trials, summary=summary
    )
    typer.echo(outcome.text)


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
    _print(text, data, as_json=as_json)


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
def schema() -> None:
    """Print the JSON Schema of space files, with a description of every key."""
    from autoprune.space import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


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


def main() -> None:
    """Runs the command line and exits with its status."""
    app(prog_name="autoprune")


def _path(space: Path | None) -> Path:
    if space is not None:
        return space
    from autoprune.space import default_space_path

    return default_space_path(Path.cwd())


def _load(space: Path | None, overrides: list[str] | None, *, check_files: bool = False) -> Space:
    from autoprune.space import load_space

    return load_space(_path(space), overrides=overrides or [], env=os.environ, check_files=check_files)


def _workers(space: Space) -> int:
    """Returns one worker a core, at most four: every worker holds a torch of its own; one where a GPU was named."""
    if space.device.startswith("cuda"):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4)


def _print(text: str, data: dict[str, Any], *, as_json: bool) -> None:
    typer.echo(json.dumps(_finite(data), indent=2, allow_nan=False) if as_json else text)


def _finite(value: Any) -> Any:
    """Returns `value` with NaN and infinity, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
