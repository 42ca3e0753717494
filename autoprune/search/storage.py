"""Opens the database that holds the studies.

Decides how SQLite is set up and how a storage that cannot be used is reported. Knows nothing of what the studies hold.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import optuna
import sqlalchemy.exc
from optuna.storages import BaseStorage, RDBStorage

from autoprune.errors import MissingExtraError, StudyError

BUSY_SECONDS = 60.0
_SQLITE = "sqlite:///"


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keeps Optuna from logging anything below a warning; its level is restored, and handlers stay as they are."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def open_storage(url_or_path: str | Path, *, create: bool = True) -> BaseStorage:
    """Opens the storage at a path (SQLite) or a URL (`sqlite:///...`, `postgresql+psycopg://...`).

    SQLite gets write-ahead logging, `synchronous=NORMAL` and a busy timeout of 60 s: 66 parameters take 1,448 ms per
    ask and tell with its defaults and 120 to 150 ms so. The connections are made by a function of ours because the
    settings hold for a connection, not for a file, and Optuna opens the first one in its constructor.

    Args:
        url_or_path: Where the studies are.
        create: Whether a missing SQLite file, and its folder, are made.

    Raises:
        StudyError: The file is missing and not to be made, is no database or not one of Optuna's, or the server does
            not answer.
        MissingExtraError: The database's driver is not installed.
    """
    text = str(url_or_path)
    path = _sqlite_path(text)
    kwargs: dict[str, Any] = {}
    if path is not None:
        if not path.exists() and not create:
            raise StudyError(f"there is no study yet: {path} does not exist")
        path.parent.mkdir(parents=True, exist_ok=True)
        text = _SQLITE + quote(str(path))
        kwargs = {"creator": partial(_connect, str(path))}
    try:
        with quiet_optuna():
            return RDBStorage(text, engine_kwargs=kwargs)
    except ImportError as error:
        raise MissingExtraError(
            f"the driver for {_shown(text)} is not installed: {error.__cause__ or error}"
        ) from error
    except (sqlalchemy.exc.SQLAlchemyError, sqlite3.DatabaseError) as error:
        reason = getattr(error, "orig", None) or error
        raise StudyError(f"cannot use {_shown(text)} as a storage of studies: {reason}") from error
    except RuntimeError as error:  # Optuna's own word for tables of another version or another program
        raise StudyError(
            f"{_shown(text)} does not hold studies that this version of Optuna can read: {error}"
        ) from error


def _sqlite_path(text: str) -> Path | None:
    """Returns the file that `text` means, or None where it is the URL of another database."""
    if "://" not in text:
        return Path(text)
    if not text.startswith(_SQLITE) or "?" in text:
        return None
    name = unquote(text[len(_SQLITE) :])
    if name in ("", ":memory:"):
        raise StudyError(f"{text} keeps nothing: name a file")
    return Path(name)


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL").close()
    connection.execute("PRAGMA synchronous=NORMAL").close()
    return connection


def _shown(url: str) -> str:
    """Returns the URL without a password."""
    scheme, _, rest = url.partition("://")
    credentials, at, host = rest.rpartition("@")
    return f"{scheme}://{credentials.partition(':')[0]}{at}{host}" if at else url
