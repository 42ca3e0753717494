"""How far a search is: who runs it, on which rung, how many trials are done, and when the rung may end.

Decides what is read from the studies for that, and which attributes a running search leaves for it. Needs no
settings and no models.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autoprune.objective import ACCURACY, Objective
from autoprune.studies import records
from autoprune.studies.lease import LEASE, is_running
from autoprune.studies.study import RUNG, load_rung, rung_names, search_names

TOTAL = "autoprune.total"
COMPLETE = "autoprune.complete"
CURRENT = "autoprune.current_rung"
OBJECTIVE = "autoprune.objective"
_PACE = 20
"""Trials whose pace tells when a rung may end."""


@dataclass(frozen=True, slots=True)
class SearchState:
    """How far a search is.

    `state` is `running` (a process holds its lease), `finished`, or `stopped` (the same command goes on). `holder`
    names the process. `done` of `total` distinct policies of `rung` are measured, `failed` trials of it failed; `total`
    is None where an earlier version ran it. `best` is the rung's best validation accuracy, or the best value of what
    `objective` names in its place. `seconds_left` is for the rung alone and known while it runs.
    """

    name: str
    state: str
    holder: str | None
    rung: str
    done: int
    failed: int
    total: int | None
    best: float | None
    seconds_left: float | None
    updated: datetime.datetime | None
    objective: Objective = ACCURACY

    def to_json(self) -> dict[str, Any]:
        """Returns the state as plain JSON values."""
        when = self.updated.astimezone().isoformat() if self.updated is not None else None
        return asdict(self) | {"updated": when}


def write_total(study: Study, total: int) -> None:
    """Stores how many policies a rung is to measure."""
    if study.user_attrs.get(TOTAL) != total:
        study.set_user_attr(TOTAL, total)


def write_current(first: Study, rung: str) -> None:
    """Stores with the first rung which one is being measured."""
    if first.user_attrs.get(CURRENT) != rung:
        first.set_user_attr(CURRENT, rung)


def write_objective(first: Study, objective: Objective) -> None:
    """Stores with the first rung what a metric of the user's own is called; where nothing is stored it is accuracy."""
    if _objective(first) != objective:
        first.set_user_attr(OBJECTIVE, objective.to_json())


def _objective(first: Study) -> Objective:
    stored = first.user_attrs.get(OBJECTIVE)
    return ACCURACY if stored is None else Objective.from_json(stored)


def write_complete(study: Study, complete: bool) -> None:
    """Stores with the first rung whether the search went through to its end."""
    if study.user_attrs.get(COMPLETE) != complete:
        study.set_user_attr(COMPLETE, complete)


def search_state(storage: BaseStorage, search: str, *, side: Sequence[str] = ()) -> SearchState:
    """Returns how far a search is.

    Args:
        storage: Where its studies are.
        search: Its name.
        side: Rungs that belong to no ladder, such as that of the controls: they are told of only while they run, or
            while the search records itself after them.

    Raises:
        StudyError: The storage holds no such search.
    """
    opened = [load_rung(storage, search, rung) for rung in rung_names(storage, search)]
    trials = [study.get_trials(deepcopy=False) for study in opened]
    holder = _holder(opened[0])
    rungs = [study.user_attrs[RUNG] for study in opened]
    current = opened[0].user_attrs.get(CURRENT) if holder is not None else None
    told = [i for i, rung in enumerate(rungs) if rung not in side]
    begun = [i for i in told if trials[i] or TOTAL in opened[i].user_attrs]
    last = rungs.index(current) if current in rungs else begun[-1] if begun else 0
    complete = [trial for trial in trials[last] if trial.state == TrialState.COMPLETE]
    done = len({trial.user_attrs[records.IDENTITY] for trial in complete})
    total = opened[last].user_attrs.get(TOTAL)
    finished = bool(opened[0].user_attrs.get(COMPLETE, False))
    return SearchState(
        name=search,
        state="running" if holder is not None else "finished" if finished else "stopped",
        holder=holder,
        rung=rungs[last],
        done=done,
        failed=sum(t.state == TrialState.FAIL and not t.user_attrs.get(records.ABANDONED, False) for t in trials[last]),
        total=total,
        best=max((1.0 - trial.values[0] for trial in complete), default=None),
        seconds_left=_seconds_left(complete, total - done) if holder is not None and total is not None else None,
        updated=max((t.datetime_complete for found in trials for t in found if t.datetime_complete), default=None),
        objective=_objective(opened[0]),
    )


def search_holder(storage: BaseStorage, search: str) -> str | None:
    """Returns which living process runs a search; None where nobody does or there is no such search."""
    first = _rungs(storage, search)[:1]  # which holds the lease of them all
    return _holder(load_rung(storage, search, first[0])) if first else None


def finished_trials(storage: BaseStorage, search: str) -> int:
    """Returns how many trials of a search are complete, over all of its rungs."""
    rungs = [load_rung(storage, search, rung) for rung in _rungs(storage, search)]
    return sum(len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) for study in rungs)


def _rungs(storage: BaseStorage, search: str) -> list[str]:
    return rung_names(storage, search) if search in search_names(storage) else []


def _holder(study: Study) -> str | None:
    if not is_running(study):
        return None
    holder = study.user_attrs.get(LEASE)
    return f"process {holder['pid']} on {holder['host']}" if holder else None


def _seconds_left(complete: Sequence[FrozenTrial], missing: int) -> float | None:
    """Returns how long the missing trials take at the pace of the last ones."""
    times = sorted(_times(complete))[-_PACE:]
    if len(times) < 2:
        return None
    return max(0.0, (times[-1] - times[0]).total_seconds() / (len(times) - 1) * missing)


def _times(trials: Iterable[FrozenTrial]) -> list[datetime.datetime]:
    return [t.datetime_complete for t in trials if t.datetime_complete is not None]
