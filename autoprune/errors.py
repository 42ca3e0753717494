"""Every error that autoprune raises on purpose.

Decides what kinds of failure exist and which exit status each one means. Knows nothing of where they come from.

    AutopruneError
    ├── InputError (ValueError)     what the user gave cannot be used: exit status 2
    │   ├── SpaceError              a space file; carries all of its faults
    │   ├── PolicyError             a policy that names no group, or a ratio that no group takes
    │   ├── BudgetError             a budget that cannot be read, or that no policy can meet
    │   ├── CheckpointError         a checkpoint that does not fit the model
    │   ├── DataError               a data set that is missing, empty or malformed
    │   ├── TraceError              a model that cannot be exported, or in which nothing can be pruned
    │   ├── StudyError              a study that is missing or belongs to another space
    │   │   └── LeaseError          another process runs, or has taken over, the search
    │   └── MissingExtraError       an optional package was asked for and is not installed
    ├── StorageError                the database of the studies is away or cannot be written: exit status 3
    ├── TrackingError               the tracking server cannot be used: exit status 3
    └── TrialError                  fails one trial; the search goes on
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class AutopruneError(Exception):
    """The root of the tree; `status` is the exit status of the command line."""

    status = 1


class InputError(AutopruneError, ValueError):
    """What the user gave cannot be used."""

    status = 2


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong in a space file."""

    message: str
    place: str = ""
    """Dotted path of the key, such as `recipe.epochs`."""
    line: int | None = None
    """Line in the file, counted from 1."""

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return f"{where}{self.place + ': ' if self.place else ''}{self.message}"


class SpaceError(InputError):
    """A space file that cannot be used; `faults` holds everything that is wrong with it."""

    def __init__(self, faults: Sequence[Fault], source: str = "") -> None:
        self.faults = tuple(faults)
        self.source = source
        head = f"{source or 'the space'} has {len(self.faults)} fault{'s' if len(self.faults) != 1 else ''}:"
        super().__init__("\n".join([head, *(f"  {fault}" for fault in self.faults)]))

    def __reduce__(self) -> tuple[type[SpaceError], tuple[Sequence[Fault], str]]:
        return type(self), (self.faults, self.source)


class PolicyError(InputError):
    """A policy that names an unknown group or criterion, or a ratio that the group does not take."""


class BudgetError(InputError):
    """A budget that cannot be read, or that no policy can meet."""


class CheckpointError(InputError):
    """A checkpoint that is missing or does not fit the model."""


class DataError(InputError):
    """A data set that is missing, empty or malformed."""


class TraceError(InputError):
    """A model that cannot be exported, or in which nothing can be pruned."""


class StudyError(InputError):
    """A study that does not exist or belongs to another space."""


class LeaseError(StudyError):
    """Another process runs the search, or has taken it over."""


class MissingExtraError(InputError):
    """An optional package was asked for and is not installed."""


class StorageError(AutopruneError):
    """The database of the studies is away, or cannot be written."""

    status = 3


class TrackingError(AutopruneError):
    """The tracking server or its store cannot be used."""

    status = 3


class TrialError(AutopruneError):
    """One trial cannot be finished (divergence, out of memory); the search goes on without it."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns a hint such as `; did you mean 'taylor'?` for a misspelt `name`, or the valid names where none is
    near.
    """
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    if not names:
        return ""
    shown = ", ".join(sorted(names)[:12]) + (", ..." if len(names) > 12 else "")
    return f"; valid: {shown}"
