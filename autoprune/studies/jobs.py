"""The queue of searches that a service runs: one trial of one study for each job, in the storage of the studies.

Decides how a job is stored and which states it passes through, so that every change is one transaction and survives
restarts. Knows nothing of how a job is run.

A job is made whole, as a WAITING trial with all of its attributes. Its state is changed by one process alone, the
runner that holds the lease of the queue; everybody else asks: a cancellation is an attribute, which the runner obeys
and every reader believes. So no compare-and-set is needed, which Optuna's storage does not offer on SQLite (its
SELECT ... FOR UPDATE locks nothing there).
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autoprune.errors import StudyError, nearest
from autoprune.studies import lease
from autoprune.studies.storage import quiet_optuna

QUEUE = "autoprune:queue"
"""Name of the study that holds the jobs: no rung of a search can be called so."""
SCHEMA = 1
QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
UNFINISHED = (QUEUED, RUNNING)

_REQUEST, _CANCEL, _END, _REASON, _TURN, _ATTEMPTS, _SPENT, _FINISHED = (
    f"job.{name}" for name in ("request", "cancel", "end", "reason", "turn", "attempts", "spent", "finished")
)


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be run.

    `space` is the whole space file with every default filled in, `directory` the folder in which it was submitted:
    relative paths in the space and modules of the user's own are looked for there. `trials`, `timeout` (seconds) and
    `workers` are those of `autoprune search`. A higher `priority` comes first.
    """

    name: str
    space: Mapping[str, Any]
    directory: str
    priority: int = 0
    trials: int | None = None
    timeout: float | None = None
    workers: int | None = None
    extra: tuple[str, ...] = ()
    """Further options of `autoprune search`, passed on as they are."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the queue holds it.

    `state` is `queued`, `running`, `done`, `failed` or `cancelled`. `reason` says why it waits or how it ended.
    `cancelling` is set where it still runs and is to end. `turn` is when it last began to wait, `attempts` how often
    it was begun without getting on, `spent` the seconds that it has run for, `finished` how many trials its search had
    finished when it was last begun.
    """

    number: int
    request: Request
    state: str
    submitted: datetime.datetime
    turn: float
    reason: str = ""
    cancelling: bool = False
    attempts: int = 0
    spent: float = 0.0
    finished: int = 0
    started: datetime.datetime | None = None
    ended: datetime.datetime | None = None
    cancelled: bool = field(default=False)
    """Whether somebody asked for its end, obeyed or not."""

    @property
    def name(self) -> str:
        """Name of the search."""
        return self.request.name

    @property
    def place(self) -> tuple[int, float, int]:
        """What jobs are sorted by: high priority first, then who has waited longest."""
        return -self.request.priority, self.turn, self.number

    def to_json(self) -> dict[str, Any]:
        """Returns the job as plain JSON values, without its space."""
        times = {"submitted": self.submitted, "started": self.started, "ended": self.ended}
        return {
            "number": self.number,
            "name": self.name,
            "state": self.state,
            "reason": self.reason,
            "cancelling": self.cancelling,
            "priority": self.request.priority,
            "directory": self.request.directory,
            "trials": self.request.trials,
            "timeout": self.request.timeout,
            "workers": self.request.workers,
            "attempts": self.attempts,
            "spent_seconds": round(self.spent, 1),
            **{name: None if when is None else when.astimezone().isoformat() for name, when in times.items()},
        }


class Queue:
    """The jobs of a storage."""

    def __init__(self, storage: BaseStorage) -> None:
        """Opens the queue, and makes it where there is none.

        Raises:
            StudyError: It was made by a version that stores jobs in another way.
        """
        self._study = _open(storage)
        found = self._study.user_attrs.get("autoprune.schema")
        if found is None:
            self._study.set_user_attr("autoprune.schema", SCHEMA)
        elif found != SCHEMA:
            raise StudyError(f"the queue has the schema {found!r}; this version reads schema {SCHEMA}")

    def submit(self, request: Request, *, now: float) -> Job:
        """Adds a job.

        Args:
            request: What is to be run.
            now: Seconds since the epoch.

        Raises:
            StudyError: A job of that name waits or runs.
        """
        for job in self.jobs():
            if job.name == request.name and job.state in UNFINISHED:
                end = f"end it with `autoprune cancel {job.name}`"
                raise StudyError(f"the search {job.name!r} is {job.state} already; {end}, or submit under another name")
        attrs = {_REQUEST: {"schema": SCHEMA, **asdict(request), "submitted": now}, _TURN: now}
        template = optuna.trial.create_trial(state=TrialState.WAITING, user_attrs=attrs)
        trial_id = self._storage.create_new_trial(self._study._study_id, template)
        return self._job(self._storage.get_trial(trial_id))

    def jobs(self) -> list[Job]:
        """Returns every job in the order of submission."""
        return [self._job(trial) for trial in self._study.get_trials(deepcopy=False)]

    def get(self, number: int) -> Job:
        """Returns the job of a number, as it is now."""
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)
        return self._job(self._storage.get_trial(trial_id))

    def find(self, name: str) -> Job:
        """Returns the latest job of a name.

        Raises:
            StudyError: There is none.
        """
        jobs = self.jobs()
        found = [job for job in jobs if job.name == name]
        if not found:
            raise StudyError(f"no search {name!r} was submitted{nearest(name, {job.name for job in jobs})}")
        return found[-1]

    def ask_to_cancel(self, job: Job) -> None:
        """Asks for the end of a job: one that waits counts as cancelled from now on, one that runs is ended soon.

        Raises:
            StudyError: The job has ended.
        """
        try:
            self._set(job, _CANCEL, True)
        except optuna.exceptions.UpdateFinishedTrialError as error:
            ended = self._job(self._storage.get_trial(self._id(job)))
            raise StudyError(f"the search {job.name!r} is {ended.state} already") from error

    # --- what the runner alone does ---

    def hold(self) -> AbstractContextManager[None]:
        """Holds the queue: one runner at a time.

        Raises:
            StudyError: Another runner that is alive holds it.
        """
        return lease.hold(self._study)

    @property
    def held(self) -> bool:
        """Whether a runner that is alive holds the queue."""
        return lease.is_running(_reread(self._study))

    def begin(self, job: Job, *, finished: int = 0) -> None:
        """Makes a job that waits a running one; its search has `finished` so many trials already."""
        self._set(job, _ATTEMPTS, job.attempts + 1)
        self._set(job, _FINISHED, finished)
        self._set(job, _REASON, "")
        self._storage.set_trial_state_values(self._id(job), TrialState.RUNNING)

    def put_back(self, job: Job, reason: str, *, turn: float | None = None) -> None:
        """Lets a running job wait again; with `turn` behind those that wait since before."""
        self._set(job, _REASON, reason)
        if turn is not None:
            self._set(job, _TURN, turn)
        self._storage.set_trial_state_values(self._id(job), TrialState.WAITING)

    def end(self, job: Job, state: str, reason: str = "") -> None:
        """Ends a job as `done`, `failed` or `cancelled`."""
        self._set(job, _END, state)
        self._set(job, _REASON, reason)
        stored = TrialState.COMPLETE if state == DONE else TrialState.FAIL
        values = [job.spent] if state == DONE else None
        self._storage.set_trial_state_values(self._id(job), stored, values)

    def note(
        self, job: Job, *, spent: float | None = None, attempts: int | None = None, reason: str | None = None
    ) -> None:
        """Stores how a job gets on."""
        for key, value in ((_SPENT, spent), (_ATTEMPTS, attempts), (_REASON, reason)):
            if value is not None:
                self._set(job, key, value)

    # --- storage ---

    @property
    def _storage(self) -> BaseStorage:
        return self._study._storage

    def _id(self, job: Job) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, job.number)

    def _set(self, job: Job, key: str, value: Any) -> None:
        self._storage.set_trial_user_attr(self._id(job), key, value)

    def _job(self, trial: FrozenTrial) -> Job:
        attrs = trial.user_attrs
        stored = dict(attrs[_REQUEST])
        if stored.pop("schema") != SCHEMA:
            raise StudyError(f"job {trial.number} of the queue has an unknown schema; this version reads {SCHEMA}")
        submitted = float(stored.pop("submitted"))
        cancelled = bool(attrs.get(_CANCEL, False))
        state, reason = _state_of(trial, cancelled=cancelled), str(attrs.get(_REASON, ""))
        return Job(
            number=trial.number,
            request=Request(**{**stored, "extra": tuple(stored["extra"])}),
            state=state,
            submitted=datetime.datetime.fromtimestamp(submitted),
            turn=float(attrs[_TURN]),
            reason=reason,
            cancelling=cancelled and state == RUNNING,
            attempts=int(attrs.get(_ATTEMPTS, 0)),
            spent=float(attrs.get(_SPENT, 0.0)),
            finished=int(attrs.get(_FINISHED, 0)),
            started=trial.datetime_start,
            ended=trial.datetime_complete,
            cancelled=cancelled,
        )


def _state_of(trial: FrozenTrial, *, cancelled: bool) -> str:
    if trial.state == TrialState.WAITING:
        return CANCELLED if cancelled else QUEUED
    if trial.state == TrialState.RUNNING:
        return RUNNING
    return str(trial.user_attrs.get(_END, FAILED))


def _open(storage: BaseStorage) -> Study:
    sampler = optuna.samplers.RandomSampler()  # never asked
    with quiet_optuna():
        try:
            return optuna.create_study(study_name=QUEUE, storage=storage, sampler=sampler)
        except DuplicatedStudyError:
            return optuna.load_study(study_name=QUEUE, storage=storage, sampler=sampler)


def _reread(study: Study) -> Study:
    with quiet_optuna():
        return optuna.load_study(study_name=study.study_name, storage=study._storage, sampler=study.sampler)
