"""What a running ladder tells its coordinator.

Decides which moments are told. Knows nothing of how they are shown or recorded.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoprune.results import TrialResult


@dataclass(frozen=True, slots=True)
class RungStarted:
    """A rung begins or goes on: `done` of `total` policies are measured already."""

    rung: str
    total: int
    done: int


@dataclass(frozen=True, slots=True)
class TrialFinished:
    """A trial is stored. `state` is `complete` or `fail`; `result` is there for the one, `reason` for the other.

    `origin` is the name of a warm start or `sampler` on the first rung, the number of the trial in the rung before on
    a later one. `reused` is the number of the trial whose result was taken over.
    """

    rung: str
    number: int
    result: TrialResult | None
    origin: str | int
    state: str
    reason: str | None = None
    reused: int | None = None


@dataclass(frozen=True, slots=True)
class RungFinished:
    """A rung ends: `done` policies are measured, `failed` trials of this run could not be finished."""

    rung: str
    done: int
    failed: int


Event = RungStarted | TrialFinished | RungFinished
