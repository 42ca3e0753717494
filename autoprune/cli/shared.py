"""What the commands share: the application, options, error handling, how settings are read and results printed.

Decides the exit status of every error: 0, 2 for bad input, 3 for a server (tracking, storage) that is away, 130 for
Ctrl-C, 143 for SIGTERM, 1 for anything else. Must not import anything heavy at module level.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from autoprune.cli.disk import disk_fault, with_hint
from autoprune.errors import AutopruneError
from autoprune.redaction import hide_secrets

if TYPE_CHECKING:
    from autoprune.space import Space

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


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command in the same way as Ctrl-C."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets SIGTERM end a command as Ctrl-C does, and a second one of either end the process at once.

    A signal that the process was started to ignore (`nohup`, a shell's `&`) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def again(number: int, _frame: object) -> None:
        os.write(2, b"\nautoprune: ended at once; what was finished is stored\n")
        os._exit(128 + number)

    def first(number: int, _frame: object) -> None:
        for known in before:
            signal.signal(known, again)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, first)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is first:
                signal.signal(number, handler)


def guarded(command: Callable[Params, None]) -> Callable[Params, None]:
    """Turns the errors of autoprune into a message on stderr and an exit status; bugs keep their traceback.

    A command that takes `--home` takes `--storage` as well: it stands for the environment variable, so that every
    process which the command starts finds the same studies.
    """
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> None:
        if storage := kwargs.pop("storage", None):
            os.environ["AUTOPRUNE_STORAGE"] = str(storage)
        try:
            with _interruptible():
                command(*args, **kwargs)
            sys.stdout.flush()
        except AutopruneError as error:
            typer.echo(f"autoprune: {with_hint(hide_secrets(str(error)))}", err=True)
            raise typer.Exit(error.status) from error
        except KeyboardInterrupt as error:
            resumes = "; the same command resumes where it stopped" if command.__name__ == "search" else ""
            ended, status = ("ended by a signal", 143) if isinstance(error, Terminated) else ("interrupted", 130)
            typer.echo(f"\nautoprune: {ended}{resumes}", err=True)
            raise typer.Exit(status) from error
        except BrokenPipeError as error:  # `autoprune front NAME | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from error
        except OSError as error:
            fault = disk_fault(error)
            if fault is None:
                raise
            if error.filename is None:  # stdout itself: what it still holds cannot be written at the end either
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            typer.echo(f"autoprune: {fault[0]}", err=True)
            raise typer.Exit(fault[1]) from error

    if "home" in signature.parameters:
        option = inspect.Parameter("storage", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=StorageOption)
        signature = signature.replace(parameters=[*signature.parameters.values(), option])
        run.__annotations__ = {**command.__annotations__, "storage": StorageOption}
    run.__signature__ = signature  # type: ignore[attr-defined]
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
StorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage",
        envvar="AUTOPRUNE_STORAGE",
        metavar="URL",
        help="Database of the studies, such as postgresql://user@host/studies. Default: a SQLite file in --home.",
        show_default=False,
        show_envvar=True,
    ),
]
CodeOption = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        envvar="AUTOPRUNE_ALLOW_CODE",
        help="Run functions that are named as package.module:function wherever they come from, not only those of the"
        " working directory.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
SearchName = Annotated[str, typer.Argument(help="Name of the search: `name` in its space file.")]
ModelReference = Annotated[
    str,
    typer.Argument(
        metavar="NAME[@ALIAS]",
        help="Name of the search; with @picked (the default), @knee, @smallest, @most-accurate, @finetuned, or an alias"
        " that was set in the MLflow UI.",
    ),
]

HOME = Path(".autoprune")


def path_of(space: Path | None) -> Path:
    """Returns the space file: the one that was named, or the default."""
    if space is not None:
        return space
    from autoprune.space import default_space_path

    return default_space_path(Path.cwd())


def load_settings(
    space: Path | None, overrides: list[str] | None, *, check_files: bool = False, allow_code: bool = False
) -> Space:
    """Reads a space file with the overrides of the command line; `space.code` tells whose code it may name."""
    from autoprune.space import load_space

    given = overrides or []
    return load_space(path_of(space), overrides=given, env=os.environ, check_files=check_files, allow_code=allow_code)


def note(text: str) -> None:
    """Tells what is going on, on stderr."""
    typer.echo(text, err=True)


def show(text: str, data: dict[str, Any], *, as_json: bool) -> None:
    """Prints text, or the same as JSON."""
    typer.echo(json.dumps(_finite(data), indent=2, allow_nan=False) if as_json else text)


def _finite(value: Any) -> Any:
    """Returns `value` with NaN and infinity, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
