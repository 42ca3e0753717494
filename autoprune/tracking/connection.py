"""The seam to mlflow: how it is imported, opened and silenced, and what becomes of its errors.

Decides the settings of our process. Foreign errors become `TrackingError` here and nowhere else. Must not know what is
recorded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.errors import TrackingError
from autoprune.redaction import hide_secrets
from autoprune.tracking.location import SQLITE, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

_QUIET = ("mlflow", "alembic", "git")
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Set for this process where the user has not: a server that is away shall cost seconds, not MLflow's four minutes."""


def connect(uri: str) -> MlflowClient:
    """Returns a client of the store at `uri`; a new SQLite file gets its tables on the first call.

    A SQLite store is put into WAL mode, which lasts, so that the UI's server reads while a search writes.
    """
    path = sqlite_path(uri)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _create(path)
        with contextlib.closing(sqlite3.connect(path, timeout=30)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _create(path: Path) -> None:
    """Makes MLflow's tables in a file beside `path` and moves it there when it is whole.

    They take MLflow about ten seconds; a process that was killed meanwhile left a file that MLflow refused ever after.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = Path(folder) / path.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            root = (path.parent / "artifacts").resolve().as_uri()
            store = SqlAlchemyStore(f"{SQLITE}{new}", root)  # type: ignore[no-untyped-call]
            store.engine.dispose()
        try:
            os.link(new, path)
        except FileExistsError:  # somebody else was faster: theirs holds
            pass
        except OSError:  # a file system without hard links
            os.replace(new, path)


@contextlib.contextmanager
def translated(verb: str, uri: str) -> Iterator[None]:
    """Turns what MLflow, its database layer and the disk raise into `TrackingError`.

    Args:
        verb: What is being done with the store, for the message: `cannot <verb> the MLflow store`.
        uri: The store's address; passwords in it are hidden.

    Raises:
        TrackingError: The block raised one of those errors.
    """
    _quiet_mlflow()
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, CommandError, RequestException, sqlite3.Error, OSError) as error:
        reason = " ".join(str(error).split())
        raise TrackingError(hide_secrets(f"cannot {verb} the MLflow store {uri}: {reason[:400]}")) from error


def _quiet_mlflow() -> None:
    """Imports mlflow with our settings and without its chatter on the user's terminal."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow  # noqa: F401
    for name in _QUIET:
        if logging.getLogger(name).level < logging.ERROR:
            logging.getLogger(name).setLevel(logging.ERROR)
