"""Runs one rung: keeps evaluations in flight, stores what comes back, and survives being killed at any moment.

Decides which candidate is evaluated next, when a result is taken over from an equal policy, and when failures stop the
search. What is owed is computed from the stored trials alone, never from memory, so that the same call goes on where
it stopped.
"""

from __future__ import annotations

import datetime
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from optuna.study import Study
from optuna.trial import Trial, TrialState

from autoprune.errors import BudgetError, LeaseError, StorageError, TrialError
from autoprune.policy import Policy
from autoprune.results import Fidelity, Problem, Submit, TrialResult
from autoprune.studies import records
from autoprune.studies.events import Event, RungFinished, RungStarted, TrialFinished
from autoprune.studies.mirror import Mirror
from autoprune.studies.records import Candidate
from autoprune.studies.retrying import hurried
from autoprune.studies.sampler import widths_of

FIRST_FAILURES = 5
"""A rung of this run whose first trials all fail stops the search."""
REPEATS_BEFORE_RANDOM = 3
REPEATS_BEFORE_END = 25
"""So many repeated proposals in a row mean that the space is exhausted."""
OPENING = 8
"""Results after which the proposer takes turns with what is queued: the least that its model is fitted to."""
AHEAD = 8
"""For so many workers one more evaluation is asked for than there are workers; fewer wait milliseconds at most."""
SAMPLER = "sampler"
"""Origin of the sampler's own proposals."""
LEARNED = "learned"
"""Origin of the proposals of the learned additive model."""


@dataclass(frozen=True, slots=True)
class Work:
    """How a rung evaluates and whom it tells: the callables that the coordinator hands in."""

    submit: Submit
    identity: Callable[[Policy], str]
    on_event: Callable[[Event], None]
    workers: int
    deadline: float | None = None

    @property
    def flights(self) -> int:
        """How many evaluations are asked for at once: of many workers none shall wait for the next proposal."""
        return self.workers + self.workers // AHEAD

    @property
    def expired(self) -> bool:
        """Whether nothing more is to be started."""
        return self.deadline is not None and time.monotonic() >= self.deadline


class Proposer(Protocol):
    """Proposes policies from the results so far. One of `rest` candidates after the queue is the sampler's; 0: none."""

    rest: int

    def propose(self, results: Sequence[TrialResult]) -> Policy:
        """Returns the next proposal, within the budget."""
        ...


@dataclass(frozen=True, slots=True)
class _Ticket:
    """A trial that has begun: `number` where it is stored already, `trial` where a sampler learns from it."""

    candidate: Candidate
    number: int | None
    trial: Trial | None
    started: datetime.datetime


def recover(study: Study, problem: Problem) -> list[Candidate]:
    """Settles what a dead predecessor left RUNNING and returns the candidates that have to begin again.

    A trial that already holds its result is completed; any other fails with the attribute `abandoned`. Everything that
    was ever abandoned and not begun again is owed, even where the process that settled it was killed as well.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        stored = trial.user_attrs.get(records.RESULT)
        if stored is not None:
            records.conclude(study, problem, trial.number, TrialResult.from_json(stored))
        else:
            records.fail_running(study, trial.number, reason="the process that ran it ended", abandoned=True)
    trials = records.read_trials(study, problem)
    settled = {trial.identity for trial in trials if not trial.abandoned}
    owed = {t.identity: t for t in trials if t.abandoned and t.identity not in settled}
    return [Candidate(t.policy, t.identity, t.origin, t.source) for t in owed.values()]


class Rung:
    """One rung of a ladder, on its stored study.

    With a `mirror` the rung explores: after `queue` the sampler proposes until `total` distinct policies are measured.
    Where there is a `proposer` it takes turns with both, once there are results to learn from.
    Without one it measures `queue` and no more. Where `live` is set a trial is stored when it begins, so that people
    see it running; otherwise it is stored once, when it has ended.
    """

    def __init__(
        self,
        study: Study,
        problem: Problem,
        *,
        fidelity: Fidelity,
        queue: Sequence[Candidate],
        mirror: Mirror | None,
        live: bool,
        proposer: Proposer | None = None,
    ) -> None:
        self._study = study
        self._problem = problem
        self._fidelity = fidelity
        self._queue = deque(queue)
        self._mirror = mirror
        self._live = live
        self._proposer = proposer
        self._turn = 0
        trials = records.read_trials(study, problem)
        self._known = {t.identity: (t.number, t.result) for t in records.distinct(trials) if t.result is not None}
        self._broken = {t.identity for t in trials if t.state == "fail" and not t.abandoned} - set(self._known)
        self._repeats = _trailing_repeats(trials)
        self._failed = self._finished = 0
        self._reason = ""
        self._flights: dict[Future[TrialResult], _Ticket] = {}
        self._followers: dict[str, list[_Ticket]] = {}

    def run(self, work: Work, total: int) -> bool:
        """Runs until `total` distinct policies are measured, nothing is left to try, or the deadline is over.

        Returns:
            Whether the rung is finished; False: the deadline ended it.

        Raises:
            TrialError: The first trials all failed, or more trials failed than the rung was to measure.
            BudgetError: A candidate exceeds the budget.
        """
        done = len(self._known)
        work.on_event(
            RungStarted(self._fidelity.rung, max(total, done), done)
        )  # an earlier call may have asked for more
        try:
            finished = self._loop(work, total)
        except (LeaseError, StorageError):  # nothing more can be stored
            self._cancel()
            raise
        except BaseException as error:
            self._abort(work, error)
            raise
        if finished:
            if self._failed and not self._known:
                raise TrialError(f"every trial of the rung {self._fidelity.rung!r} failed, the last: {self._reason}")
            work.on_event(RungFinished(self._fidelity.rung, len(self._known), self._failed))
        return finished

    def _loop(self, work: Work, total: int) -> bool:
        self._fill(work, total)
        while self._flights:
            done, _ = wait(self._flights, return_when=FIRST_COMPLETED)
            for future in [flight for flight in self._flights if flight in done]:
                self._land(work, future, total)
                self._fill(work, total)  # before the next result is stored: a worker waits for it
        return len(self._known) >= total or self._exhausted

    @property
    def _exhausted(self) -> bool:
        """Whether nothing is left to try."""
        return not self._queue and (self._mirror is None or self._repeats >= REPEATS_BEFORE_END)

    def _fill(self, work: Work, total: int) -> None:
        """Starts evaluations while there is room and something to try."""
        while len(self._flights) < work.flights and len(self._known) + len(self._flights) < total and not work.expired:
            ticket = self._next(work)
            if ticket is None:
                return
            identity = ticket.candidate.identity
            if identity in self._known:
                self._repeats += 1
                number, result = self._known[identity]
                self._complete(work, ticket, result, reused=number)
            elif identity in self._broken:
                self._repeats += 1
                self._fail(work, ticket, "the same policy failed before")
            elif identity in self._followers:
                self._repeats += 1
                self._followers[identity].append(ticket)
            else:
                self._take_off(work, ticket)

    def _next(self, work: Work) -> _Ticket | None:
        started = datetime.datetime.now()
        trial = None
        if self._mirror is not None and (learned := self._learned(work)) is not None:
            candidate = learned
            trial = self._mirror.adopt(candidate.policy)
        elif self._queue:
            candidate = self._queue.popleft()
            if self._mirror is not None:
                trial = self._mirror.adopt(candidate.policy)
        elif self._mirror is not None and self._repeats < REPEATS_BEFORE_END:
            policy, trial, draw = self._mirror.propose(at_random=self._repeats >= REPEATS_BEFORE_RANDOM)
            candidate = Candidate(policy, work.identity(policy), SAMPLER, SAMPLER, draw)
        else:
            return None
        number = records.begin(self._study, self._problem, candidate) if self._live else None
        return _Ticket(candidate, number, trial, started)

    def _learned(self, work: Work) -> Candidate | None:
        """Returns the proposer's next policy where it is its turn and the policy is a new one.

        It waits for the first results: until then the queue goes first.
        """
        if self._proposer is None or (self._queue and len(self._known) < OPENING):
            return None
        self._turn += 1
        rest = 2 if self._queue else self._proposer.rest
        if rest and self._turn % rest == 0:
            return None
        policy = self._proposer.propose([result for _, result in self._known.values()])
        identity = work.identity(policy)
        if identity in self._known or identity in self._broken or identity in self._followers:
            return None
        return Candidate(policy, identity, LEARNED, LEARNED)

    def _take_off(self, work: Work, ticket: _Ticket) -> None:
        candidate = ticket.candidate
        costs = self._problem.cost_model.costs(widths_of(self._problem, candidate.policy))
        if not self._problem.budget.within(costs):
            excess = self._problem.budget.violation(costs)
            raise BudgetError(f"the policy of {candidate.origin!r} exceeds the budget by {excess:.3%}")
        self._flights[work.submit(candidate.policy, self._fidelity)] = ticket
        self._followers[candidate.identity] = []

    def _land(self, work: Work, future: Future[TrialResult], total: int) -> None:
        ticket = self._flights[future]
        identity = ticket.candidate.identity
        try:
            result = future.result()
            reason = records.fault(self._problem, result)
        except TrialError as error:
            reason = str(error) or type(error).__name__
        del self._flights[future]
        followers = self._followers.pop(identity)
        self._finished += 1
        if reason is not None:
            self._failed += 1
            self._reason = reason
            self._broken.add(identity)
            for late in (ticket, *followers):
                self._fail(work, late, reason)
            self._judge_failures(reason, total)
            return
        number = self._complete(work, ticket, result)
        self._known[identity] = (number, result)
        if not followers:
            self._repeats = 0
        for late in followers:
            self._complete(work, late, result, reused=number)

    def _judge_failures(self, reason: str, total: int) -> None:
        rung = self._fidelity.rung
        if self._failed == self._finished == FIRST_FAILURES:
            raise TrialError(f"the first {FIRST_FAILURES} trials of the rung {rung!r} all failed, the last: {reason}")
        if self._failed > total + FIRST_FAILURES:
            raise TrialError(
                f"{self._failed} of {self._finished} trials of the rung {rung!r} failed, the last: {reason}"
            )

    def _complete(self, work: Work, ticket: _Ticket, result: TrialResult, *, reused: int | None = None) -> int:
        notes = self._mirror.notes(ticket.trial) if self._mirror is not None and ticket.trial is not None else {}
        if ticket.number is None:
            number = records.add_complete(
                self._study,
                self._problem,
                ticket.candidate,
                result=result,
                reused=reused,
                started=ticket.started,
                notes=notes,
            )
        else:
            number = ticket.number
            records.finish_running(self._study, self._problem, number, result=result, reused=reused, notes=notes)
        measured = records.measured_excess(self._problem, result)
        self._tell(ticket, records.objectives(self._problem, result), measured)
        self._told(work, ticket, number, result=result, reused=reused)
        return number

    def _fail(self, work: Work, ticket: _Ticket, reason: str) -> None:
        number = ticket.number
        if number is None:
            number = records.add_failed(
                self._study, self._problem, ticket.candidate, reason=reason, started=ticket.started
            )
        else:
            records.fail_running(self._study, number, reason=reason)
        self._tell(ticket, None)
        self._told(work, ticket, number, reason=reason)

    def _told(
        self,
        work: Work,
        ticket: _Ticket,
        number: int,
        *,
        result: TrialResult | None = None,
        reason: str | None = None,
        reused: int | None = None,
    ) -> None:
        trial = records.ended_trial(
            self._problem,
            ticket.candidate,
            number,
            started=ticket.started,
            result=result,
            reason=reason,
            reused=reused,
        )
        work.on_event(TrialFinished(self._fidelity.rung, trial))

    def _tell(
        self, ticket: _Ticket, values: tuple[float, float] | None, measured: Mapping[str, float] | None = None
    ) -> None:
        if self._mirror is not None and ticket.trial is not None:
            self._mirror.tell(ticket.trial, values, measured)

    def _abort(self, work: Work, error: BaseException) -> None:
        """Cancels what has not begun; where there is time, waits for the rest and stores what it found.

        After an interruption there is none: what is stored as running is marked as left behind, so that nobody sees it
        run for ever.
        """
        left = self._cancel()
        if isinstance(error, KeyboardInterrupt):
            with suppress(StorageError), hurried(self._study):
                for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                    if records.RESULT not in trial.user_attrs:
                        records.fail_running(self._study, trial.number, reason="interrupted", abandoned=True)
        if not isinstance(error, Exception):
            return
        wait(left)
        for future in left:
            if future.exception() is None:
                result = future.result()
                if records.fault(self._problem, result) is None:
                    self._complete(work, self._flights[future], result)

    def _cancel(self) -> list[Future[TrialResult]]:
        """Cancels what has not begun and returns the rest."""
        return [future for future in self._flights if not future.cancel()]


def _trailing_repeats(trials: Sequence[records.StoredTrial]) -> int:
    """Returns how many complete trials at the end only repeat another one."""
    count = 0
    for trial in reversed(trials):
        if trial.state == "complete":
            if trial.reused is None:
                break
            count += 1
    return count
