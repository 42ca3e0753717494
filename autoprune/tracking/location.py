"""Where the tracking store lies: an address from the environment, the server's own settings, or a file under home.

Decides which of the three holds and where artifacts go beside a SQLite file. Must not know mlflow: resolving an address
costs nothing.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from autoprune.errors import TrackingError
from autoprune.redaction import public_address

SERVER_ENV = Path("mlflow") / "server.env"
"""The tracking server's settings, relative to the working directory."""

SQLITE = "sqlite:///"
"""How the address of a SQLite file begins."""


def resolve_uri(home: Path, env: Mapping[str, str], *, directory: Path | None = None) -> str:
    """Returns the tracking address and makes the folder of a SQLite file.

    The first that is set wins: `MLFLOW_TRACKING_URI` in `env`, `MLFLOW_BACKEND_STORE_URI` in `env`, the same in
    `mlflow/server.env`, and a SQLite file under `home`. A relative SQLite path is relative to `directory`.
    `postgresql://` means psycopg 3, the driver that autoprune is tested with.

    Args:
        home: The folder that holds the state of searches.
        env: The process's environment.
        directory: The working directory, where `mlflow/server.env` is looked for; by default the process's own.

    Raises:
        TrackingError: `mlflow/server.env` cannot be read, or the folder of the SQLite file cannot be made.
    """
    directory = (directory or Path.cwd()).resolve()
    wanted = env.get("MLFLOW_TRACKING_URI", "").strip()
    if not wanted:
        wanted = env.get("MLFLOW_BACKEND_STORE_URI", "").strip()
    if not wanted:
        wanted = server_settings(directory).get("MLFLOW_BACKEND_STORE_URI", "").strip()
    if not wanted:
        wanted = f"{SQLITE}{(directory / home / 'mlflow.db').resolve()}"
    path = sqlite_path(wanted)
    if path is None:
        return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", wanted)
    path = directory / path
    options = wanted.partition("?")[1:]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackingError(f"cannot make the folder of the tracking store {path}: {error}") from error
    return "".join([SQLITE, str(path), *options])


def sqlite_path(uri: str) -> Path | None:
    """Returns the file of a SQLite address (options such as `?timeout=5` left out), `None` for any other address."""
    return Path(uri[len(SQLITE) :].partition("?")[0]) if uri.startswith(SQLITE) else None


def artifact_root(uri: str, *, home: Path, directory: Path | None = None) -> Path | None:
    """Returns the folder for files: `artifacts` beside a SQLite file; `None` where a server decides.

    For another database, written without a server, it is the server's own folder (`MLFLOW_ARTIFACTS_DESTINATION` in
    `mlflow/server.env`), or `artifacts` under `home`.

    Raises:
        TrackingError: The server's own place is no folder: only the server can write there.
    """
    if uri.startswith(("http://", "https://")):
        return None
    path = sqlite_path(uri)
    if path is not None:
        return path.resolve().parent / "artifacts"
    directory = (directory or Path.cwd()).resolve()
    place = server_settings(directory).get("MLFLOW_ARTIFACTS_DESTINATION", "").strip().removeprefix("file://")
    if "://" in place:
        raise TrackingError(
            f"artifacts go to {place}, where only the server writes: set MLFLOW_TRACKING_URI to its address"
        )
    return directory / place if place else directory / home / "artifacts"


def ui_address(uri: str, *, directory: Path | None = None) -> str:
    """Returns the address of the web pages that show `uri`, without a slash at its end or who logs in.

    An HTTP tracking address is the server itself. A database is shown by the server of the service that runs this
    search (it says so in `AUTOPRUNE_MLFLOW`), or by that of `make mlflow-ui`, whose host and port are read from
    `mlflow/server.env`.

    Raises:
        TrackingError: `mlflow/server.env` cannot be read.
    """
    if uri.startswith(("http://", "https://")):
        return public_address(uri).rstrip("/")
    if served := os.environ.get("AUTOPRUNE_MLFLOW"):
        return served
    settings = server_settings(directory or Path.cwd())
    return f"http://{settings.get('MLFLOW_HOST', '127.0.0.1')}:{settings.get('MLFLOW_PORT', '5000')}"


def server_settings(directory: Path) -> dict[str, str]:
    """Returns the assignments of `mlflow/server.env` below `directory`; nothing where there is no such file.

    Lines are `NAME=value` as a shell reads them: quotes and a comment at the end are removed, nothing is expanded.

    Raises:
        TrackingError: The file exists but cannot be read, or a line is no assignment.
    """
    path = directory / SERVER_ENV
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrackingError(f"cannot read {path}: {error}") from error
    settings: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise TrackingError(f"{path}, line {number}: {error}") from error
        if words[:1] == ["export"]:
            words = words[1:]
        if not words:
            continue
        name, equals, value = words[0].partition("=")
        if len(words) != 1 or not equals or not name.isidentifier():
            raise TrackingError(f"{path}, line {number}: expected NAME=value, got {line.strip()!r}")
        settings[name] = value
    return settings
