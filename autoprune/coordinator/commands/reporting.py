"""Writes the report of a search into a file.

Decides where it goes.
"""

from __future__ import annotations

from pathlib import Path

from autoprune.coordinator.stored.display import view_of
from autoprune.coordinator.stored.report_page import page_of
from autoprune.coordinator.stored.search import read_search
from autoprune.errors import InputError
from autoprune.files import write_whole


def write_report(name: str, *, home: Path, output: Path | None = None) -> Path:
    """Writes everything about a search into one HTML file, whole or not at all, and returns its path.

    Raises:
        StudyError: There is no such search.
        InputError: The file cannot be written.
    """
    stored = read_search(name, home=home)
    path = output or Path("exports") / f"{name}-report.html"
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file")
    text = page_of(stored, view_of(stored))
    try:
        write_whole(path, text)
    except OSError as error:
        raise InputError(f"the report cannot be written to {path}: {error.strerror or error}") from error
    return path
