"""Runs a search: a ladder of rungs, each of which measures the best of the one before with more of the recipe.

Decides what is promoted and in which order rungs run. Knows neither how a policy is evaluated nor who watches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from optuna.storages import BaseStorage
from optuna.study import Study

from autoprune import pareto
from autoprune.errors import InputError, nearest
from autoprune.policy import Policy
from autoprune.results import Fidelity, Problem, Submit, WarmStart
from autoprune.studies import records
from autoprune.studies.ahead import Ahead
from autoprune.studies.events import Event
from autoprune.studies.learned import LearnedAdditive, Tables, learned_model
from autoprune.studies.lease import hold
from autoprune.studies.mirror import Mirror
from autoprune.studies.records import Candidate, StoredTrial
from autoprune.studies.rung import AHEAD, LEARNED, Proposer, Rung, Work, recover
from autoprune.studies.sampler import AUTO, LEARNED_ALONE, SAMPLERS, params_of, policy_of
from autoprune.studies.shrinkage import shrunk_errors
from autoprune.studies.storage import quiet_optuna
from autoprune.studies.study import open_study, study_name

MANY = 32
"""Workers from which on proposals are made ahead. A proposal and its storing take 20 to 40 ms: 32 workers of a second
each want one every 31 ms, and trials are rarely that short."""
_UNTRAINED = 0.2
"""Epochs that count for a candidate that is only repaired and scored: 0.03 for ResNet-20 on all of CIFAR-10, more for
small data sets."""
_REPAIRED_ON = 512
"""Images of a repair that takes half of an untrained candidate's time: ResNet-56 5 s a candidate, and 14 s on 2,048."""
_LEAST_SHARE = 0.15
_SAMPLER_EVERY = 4
"""Under `auto` one of so many candidates is TPE's, the others come from the learned additive model.

On the surrogate of `make samplers` the model alone is best at every size; in a search of ResNet-20 in which both had
equal shares it made 14 points of the front and TPE 8. What no additive model can say is left to TPE.
"""


@dataclass(frozen=True, slots=True)
class RungPlan:
    """One rung: how it evaluates, and how many policies it measures."""

    fidelity: Fidelity
    trials: int


@dataclass(frozen=True, slots=True)
class LadderPlan:
    """All that a search is made of, apart from where it runs.

    `fingerprint` and `settings` (by section) stand for everything that decides a result: a stored study that was made
    from others is refused. `warm_starts` are tried first, in their order. With `sampler` None nothing but the warm
    starts is measured; with `auto` and error `tables` the learned additive model makes three of four proposals and TPE
    the fourth. `workers` evaluations (of many workers an eighth more) are kept in flight; from `MANY` workers on an
    eighth of their number of proposals is made ahead. `samples` are the validation images that there are, where the
    accuracy is a fraction of them: with error tables they say how far a measured accuracy is to be believed.
    """

    name: str
    problem: Problem
    rungs: tuple[RungPlan, ...]
    fingerprint: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    warm_starts: tuple[WarmStart, ...] = ()
    sampler: str | None = "auto"
    seed: int = 0
    workers: int = 1
    tables: Tables | None = None
    samples: int = 0

    def __post_init__(self) -> None:
        names = [plan.fidelity.rung for plan in self.rungs]
        if not names or len(set(names)) < len(names):
            raise InputError(f"a ladder needs rungs with distinct names, got {names}")
        if any(plan.trials < 1 for plan in self.rungs) or self.workers < 1:
            raise InputError("every rung needs at least one trial, and a search at least one worker")
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise InputError(f"unknown sampler {self.sampler!r}{nearest(self.sampler, SAMPLERS)}")
        if self.sampler == LEARNED_ALONE and self.tables is None:
            raise InputError(f"the sampler {self.sampler!r} needs error tables, and there are none")

    @property
    def learns(self) -> bool:
        """Whether the learned additive model proposes."""
        return self.sampler in (AUTO, LEARNED_ALONE) and self.tables is not None

    @property
    def stock(self) -> int:
        """How many proposals are made ahead of their use; 0: each when it is wanted."""
        return self.workers // AHEAD if self.workers >= MANY else 0


@dataclass(frozen=True, slots=True)
class LadderOutcome:
    """What is stored when a ladder ends. `complete` is False where the deadline cut it short."""

    rungs: Mapping[str, tuple[StoredTrial, ...]]
    complete: bool


@contextmanager
def hold_search(storage: BaseStorage, plan: LadderPlan) -> Iterator[None]:
    """Holds the lease of a whole search, its controls and its recording included; `run_ladder(held=True)` within it.

    The lease is on the study of the plan's first rung, which is made where there is none. See `hold`.

    Raises:
        StudyError: A stored study belongs to other settings.
        LeaseError: Another process runs this search.
    """
    with quiet_optuna():
        begun = _open_begun(storage, plan)
        first = begun.get(_name(plan.rungs[0])) or _open(storage, plan, plan.rungs[0])
    with hold(first):
        yield


def run_ladder(
    storage: BaseStorage,
    plan: LadderPlan,
    *,
    submit: Submit,
    identity: Callable[[Policy], str],
    on_event: Callable[[Event], None] = lambda event: None,
    deadline: float | None = None,
    held: bool = False,
) -> LadderOutcome:
    """Runs a search, or goes on with it where it was stopped.

    The first rung tries the warm starts, then what the sampler proposes, until it has measured `trials` distinct
    policies. A later rung measures the best and well-spread ones of the rung before. Trials that are stored as
    finished are never repeated; a policy that equals another one of the same rung takes over its result.

    Only one process may run a search at a time: whatever is RUNNING on start counts as left behind. A lease on the
    first rung's study sees to that.

    Args:
        storage: As `open_storage` returns it.
        plan: What to search.
        submit: Asks for an evaluation; the future raises `TrialError` where only that trial failed.
        identity: Names what a policy does to the network: policies of the same identity have the same result.
        on_event: Is told what happens, in this thread.
        deadline: `time.monotonic()` after which nothing more is started. The time up to it is shared among the rungs,
            so that a search that is cut short still measures its best candidates by the last rung's recipe.
        held: The caller holds the lease already, by `hold_search`.

    Raises:
        StudyError: A stored study belongs to other settings, or another process runs this search.
        TrialError: The first trials of a rung all failed, or more failed than the rung was to measure.
        BudgetError: A warm start exceeds the budget.
        PolicyError: A warm start cannot be written as a trial's parameters.
        Exception: Whatever else a future raised.
    """
    work = Work(submit, identity, on_event, plan.workers, deadline)
    with quiet_optuna(), nullcontext() if held else hold_search(storage, plan):
        return _climb(storage, plan, _open_begun(storage, plan), work)


def _climb(storage: BaseStorage, plan: LadderPlan, studies: Mapping[str, Study], work: Work) -> LadderOutcome:
    stored: dict[str, tuple[StoredTrial, ...]] = {}
    previous: Study | None = None
    whole = True
    for index, rung in enumerate(plan.rungs):
        study = studies.get(_name(rung)) or _open(storage, plan, rung)
        own = replace(work, deadline=rung_deadline(plan, index, time.monotonic(), work.deadline))
        if previous is None:
            complete = _explore(study, plan, rung, own)
        else:
            complete = _measure_promoted(study, previous, plan, plan.rungs[index - 1], rung, work=own)
        stored[_name(rung)] = tuple(records.read_trials(study, plan.problem))
        whole = whole and complete
        if work.expired and not complete:
            break
        previous = study
    return LadderOutcome(stored, complete=whole)


def rung_deadline(plan: LadderPlan, index: int, now: float, deadline: float | None) -> float | None:
    """Returns when a rung that begins `now` has to make room for the next one.

    What is left is shared by the work that is planned, epochs times trials times seeds; a rung that trains nothing
    counts as `_UNTRAINED` epochs, more where it repairs on many images, and none gets less than `_LEAST_SHARE`.
    """
    if deadline is None:
        return None
    left = plan.rungs[index:]
    works = [_work(rung.fidelity) * rung.trials for rung in left]
    shares = [max(_LEAST_SHARE, work / sum(works)) for work in works]
    return now + max(0.0, deadline - now) * shares[0] / sum(shares)


def _work(fidelity: Fidelity) -> float:
    """Returns what a trial costs, in epochs."""
    repair = max(1.0, (fidelity.calibration or _REPAIRED_ON) / _REPAIRED_ON)
    return max(fidelity.epochs, _UNTRAINED * (1.0 + repair) / 2) * fidelity.seeds


def promoted(
    trials: Sequence[StoredTrial], problem: Problem, count: int, *, tables: Tables | None = None, samples: int = 0
) -> list[Candidate]:
    """Returns the candidates that a rung's trials hand on: good ones, well spread along the primary cost.

    They come in an order of which any beginning is well spread too, for a rung that is cut short. With error `tables`
    and the number of validation images the measured errors are drawn towards what the tables predict, see
    `shrunk_errors`.
    What was measured beside other workers decides nothing here: it cost a search its best half when it did.
    """
    measured = [(t, t.result) for t in records.distinct(trials) if t.result is not None]
    results = [result for _, result in measured]
    errors = shrunk_errors(problem, tables, results, samples)
    points = [(e, records.objectives(problem, r)[1]) for e, r in zip(errors, results, strict=True)]
    chosen = pareto.select_spread(points, count)
    levels = dict(zip(chosen, pareto.cost_levels([points[i][1] for i in chosen]), strict=True))
    chosen.sort(key=lambda i: (levels[i], points[i][0]))  # of equal costs the better one first
    ordered = [measured[chosen[i]][0] for i in pareto.spread_order([levels[i] for i in chosen])]
    return [Candidate(t.policy, t.identity, t.number, t.source) for t in ordered]


def _name(rung: RungPlan) -> str:
    return rung.fidelity.rung


def _open(storage: BaseStorage, plan: LadderPlan, rung: RungPlan) -> Study:
    name = study_name(plan.name, _name(rung))
    return open_study(storage, name, plan.problem, fingerprint=plan.fingerprint, settings=plan.settings)


def _open_begun(storage: BaseStorage, plan: LadderPlan) -> dict[str, Study]:
    """Opens the rungs that exist already: one that belongs to other settings is refused before anything is written."""
    existing = {study.study_name for study in storage.get_all_studies()}
    begun = [rung for rung in plan.rungs if study_name(plan.name, _name(rung)) in existing]
    return {_name(rung): _open(storage, plan, rung) for rung in begun}


def _explore(study: Study, plan: LadderPlan, rung: RungPlan, work: Work) -> bool:
    problem = plan.problem
    owed = recover(study, problem)
    tried = {t.policy.id for t in records.read_trials(study, problem) if not t.abandoned}
    tried |= {candidate.policy.id for candidate in owed}
    queue = list(owed)
    for start in plan.warm_starts:
        policy = policy_of(problem, params_of(problem, start.policy))
        if policy.id not in tried:
            tried.add(policy.id)
            queue.append(Candidate(policy, work.identity(policy), start.origin, start.origin))
    mirror = None
    if plan.sampler is not None:
        batch = max(1, plan.stock // (_SAMPLER_EVERY if plan.learns else 1))
        mirror = Mirror(problem, study, sampler=plan.sampler, seed=plan.seed, batch=batch)
    live = len(plan.rungs) == 1  # then it is the rung that people look at
    with _proposer(plan, study) as proposer:
        runner = Rung(study, problem, fidelity=rung.fidelity, queue=queue, mirror=mirror, live=live, proposer=proposer)
        return runner.run(work, rung.trials)


@contextmanager
def _proposer(plan: LadderPlan, study: Study) -> Iterator[Proposer | None]:
    """Gives the learned model where the sampler has one: in a process of its own for many workers."""
    if not plan.learns or plan.tables is None:
        yield None
        return
    done = sum(t.source == LEARNED for t in records.read_trials(study, plan.problem))
    rest = _SAMPLER_EVERY if plan.sampler == AUTO else 0
    if not plan.stock:
        yield LearnedAdditive(plan.problem, plan.tables, seed=plan.seed, done=done, rest=rest)
        return
    make = partial(learned_model, plan.problem, plan.tables, plan.seed)
    with Ahead(make, stock=plan.stock, rest=rest, done=done) as ahead:
        yield ahead


def _measure_promoted(
    study: Study, previous: Study, plan: LadderPlan, before: RungPlan, rung: RungPlan, *, work: Work
) -> bool:
    problem = plan.problem
    owed = recover(study, problem)
    trials = records.read_trials(study, problem)
    settled = {t.identity for t in trials if not t.abandoned} | {candidate.identity for candidate in owed}
    images = before.fidelity.images
    samples = plan.samples if images is None else min(plan.samples, images)
    known = records.read_trials(previous, problem)
    fresh = promoted(known, problem, rung.trials, tables=plan.tables, samples=samples)
    queue = [*owed, *(candidate for candidate in fresh if candidate.identity not in settled)]
    runner = Rung(study, problem, fidelity=rung.fidelity, queue=queue, mirror=None, live=True)
    return runner.run(work, len(records.distinct(trials)) + len(queue))
