"""What a running ladder tells its coordinator.

Decides which moments are told. Knows nothing of how they are shown or recorded.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoprune.studies.records import StoredTrial


@dataclass(frozen=True, slots=True)
class RungStarted:
    """A rung begins or goes on: `done` of `total` policies are measured already."""

    rung: str
    total: int
    done: int


@dataclass(frozen=True, slots=True)
class TrialFinished:
    """A trial is stored, `complete` or `fail`: as the storage holds it, but for its times, which are this process's."""

    rung: str
    trial: StoredTrial


@dataclass(frozen=True, slots=True)
class RungFinished:
    """A rung ends: `done` policies are measured, `failed` trials of this run could not be finished."""

    rung: str
    done: int
    failed: int


Event = RungStarted | TrialFinished | RungFinished
