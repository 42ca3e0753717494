"""Opens the database that holds the studies.

Decides how SQLite and PostgreSQL are set up and how a storage that cannot be used is reported. Knows nothing of what
the studies hold.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import optuna
import sqlalchemy.exc

from autoprune.errors import MissingExtraError, StudyError
from autoprune.redaction import hide_secrets
from autoprune.studies.retrying import LastingStorage, Say

BUSY_SECONDS = 60.0
_SQLITE = "sqlite:///"
_POSTGRES = re.compile(r"postgres(ql)?(?=://)")
_POSTGRES_OPTIONS = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "application_name": "autoprune",
}
"""A server whose machine is gone is noticed within a minute instead of two hours."""


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keeps Optuna from logging anything below a warning; its level is restored, and handlers stay as they are."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def open_storage(url_or_path: str | Path, *, create: bool = True, say: Say | None = None) -> LastingStorage:
    """Opens the storage at a path (SQLite) or a URL (`sqlite:///...`, `postgresql+psycopg://...`).

    SQLite gets write-ahead logging, `synchronous=NORMAL` and a busy timeout of 60 s: 66 parameters take 1,448 ms per
    ask and tell with its defaults and 120 to 150 ms so. The connections are made by a function of ours because the
    settings hold for a connection, not for a file, and Optuna opens the first one in its constructor.

    A server that goes away later is waited for; one that is away already is an error.

    Args:
        url_or_path: Where the studies are. `postgresql://` means psycopg 3, the driver that autoprune is tested with.
        create: Whether a missing SQLite file, and its folder, are made.
        say: Is told when the server is away and when it is back.

    Raises:
        StudyError: The file is missing and not to be made, is no database or not one of Optuna's, or the server does
            not answer.
        MissingExtraError: The database's driver is not installed.
    """
    text = str(url_or_path)
    path = _sqlite_path(text)
    kwargs: dict[str, Any] = {"pool_pre_ping": True}
    if path is None:
        text = _POSTGRES.sub("postgresql+psycopg", text, count=1)
        if text.startswith("postgresql"):
            kwargs["connect_args"] = dict(_POSTGRES_OPTIONS)
    else:
        if not path.exists() and not create:
            raise StudyError(f"there is no study yet: {path} does not exist")
        path.parent.mkdir(parents=True, exist_ok=True)
        text = _SQLITE + quote(str(path))
        kwargs = {"creator": partial(_connect, str(path))}
    try:
        with quiet_optuna():
            try:
                return LastingStorage(text, kwargs, shown=hide_secrets(text), say=say)
            except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
                # Another process has made some of the tables in this very moment; what is really wrong stays wrong.
                time.sleep(1.0)
                return LastingStorage(text, kwargs, shown=hide_secrets(text), say=say)
    except ImportError as error:
        raise MissingExtraError(
            f"the driver for {hide_secrets(text)} is not installed ({error.__cause__ or error});"
            " for PostgreSQL: pip install 'autoprune[postgres]'"
        ) from error
    except (sqlalchemy.exc.SQLAlchemyError, sqlite3.DatabaseError) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        raise StudyError(f"cannot use {hide_secrets(text)} as a storage of studies: {reason}") from error
    except RuntimeError as error:  # Optuna's own word for tables of another version or another program
        raise StudyError(
            f"{hide_secrets(text)} does not hold studies that this version of Optuna can read: {error}"
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


def same_database(one: str, other: str) -> bool:
    """Whether two URLs mean the same database; other addresses, such as a server's, never do."""
    found = []
    for url in (one, other):
        if url.startswith(("http://", "https://")) or "://" not in url:
            return False
        parsed = sqlalchemy.make_url(_POSTGRES.sub("postgresql", url, count=1))
        kind = parsed.get_backend_name()
        port = parsed.port or (5432 if kind == "postgresql" else None)
        found.append((kind, parsed.host, port, parsed.database))
    return found[0] == found[1]


def split_password(url: str) -> tuple[str, str | None]:
    """Returns a database's URL with its driver and without its password, and the password."""
    found = sqlalchemy.make_url(_POSTGRES.sub("postgresql+psycopg", url, count=1))
    return found._replace(password=None).render_as_string(hide_password=False), found.password
