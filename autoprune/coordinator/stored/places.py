"""Where things lie: the home folder, the storage of the studies, the models of a search.

Decides their names and what is said where one is missing.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from autoprune import studies
from autoprune.errors import StudyError

STATE = "optuna.db"
STORAGE_ENV = "AUTOPRUNE_STORAGE"
"""Environment variable that names the storage; the option `--storage` sets it."""
HOME = Path(".autoprune")
"""The home folder that the commands look for where none is named."""


def make_home(home: Path) -> None:
    """Makes a home folder, and finds out whether it can be written before anything slow is done.

    Raises:
        StudyError: It cannot be made or written.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise StudyError(f"the home folder {home} cannot be written: {error.strerror or error}") from error


def storage_path(home: Path) -> Path | str:
    """Returns where the studies are: what `AUTOPRUNE_STORAGE` names (a file or a URL), else the home folder's file.

    Several machines share one PostgreSQL database so; names of searches are common to all of them then.
    """
    named = os.environ.get(STORAGE_ENV, "").strip()
    if named:
        return named if "://" in named else Path(named)
    return home / STATE


def open_existing(home: Path) -> studies.LastingStorage:
    """Opens the storage of a home folder to read it.

    Raises:
        StudyError: There is none, or it cannot be used.
        MissingExtraError: The database's driver is not installed.
    """
    place = storage_path(home)
    if isinstance(place, Path) and not place.is_file():
        where = home if place == home / STATE else place
        raise StudyError(f"there is no search in {where} yet; `autoprune search` makes one")
    return studies.open_storage(place, create=False)


def models_path(home: Path, name: str) -> Path:
    """Returns the folder of a search's models."""
    return home / "models" / name
