"""How a trial is written to its study and read back.

Decides the attributes of a trial. Knows nothing of the order in which trials are made: the ladder asks, this module
writes.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autoprune.cost import LATENCY, MACS, MEMORY, PARAMS, SIZE
from autoprune.errors import StudyError
from autoprune.policy import Policy
from autoprune.results import Problem, TrialResult
from autoprune.studies.retrying import TOKEN, LastingStorage, new_token
from autoprune.studies.sampler import params_of, policy_of, search_space

RESULT = "result"
ORIGIN = "origin"
SOURCE = "source"
POLICY_ID = "policy_id"
IDENTITY = "identity"
DRAW = "draw"
REUSED = "reused"
REASON = "reason"
ABANDONED = "abandoned"
WIDTHS = "widths"

_SCORES = {"val_accuracy": "val", "test_accuracy": "test"}
_KEPT = {MACS: "MACs kept", PARAMS: "params kept", SIZE: "size kept", MEMORY: "memory kept", LATENCY: "latency kept"}
"""What the dashboard calls a result's numbers. Nothing reads these attributes back: the whole result holds them."""

_CONSTRAINTS = "constraints"
"""Optuna-dashboard 0.21 reads only this legacy list; `Trial.set_constraint` writes `constraints:<name>`."""

_TRANSIENT = ("fixed_params", "tpe:relative_params", _CONSTRAINTS, TOKEN)
"""Beginnings of the names of attributes that a sampler will not want to read again."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy that waits for its evaluation.

    `origin` says where it comes from: the name of a warm start or `sampler` on the first rung, the number of the trial
    in the rung before on a later one. `source` is the first rung's origin, carried along. `draw` counts the proposals
    of a sampler that learns from nothing.
    """

    policy: Policy
    identity: str
    origin: str | int
    source: str
    draw: int | None = None


@dataclass(frozen=True, slots=True)
class StoredTrial:
    """A trial of one rung as the storage holds it.

    `state` is `complete`, `fail` or `running`. `result` is there for complete trials, `reason` for failed ones.
    `reused` is the number of the trial of this rung whose result was taken over because the policies are the same.
    `abandoned` marks what a killed process left behind.
    """

    number: int
    state: str
    policy: Policy
    identity: str
    origin: str | int
    source: str
    result: TrialResult | None = None
    reason: str | None = None
    reused: int | None = None
    abandoned: bool = False
    started: datetime.datetime | None = None
    ended: datetime.datetime | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A trial that failed, and why. `abandoned` marks what a killed process left behind."""

    number: int
    source: str
    reason: str
    abandoned: bool = False


def read_failures(study: Study) -> list[Failure]:
    """Returns the failed trials of a study; needs no `Problem`, and says nothing about their policies."""
    return [
        Failure(
            trial.number,
            str(trial.user_attrs.get(SOURCE, "")),
            str(trial.user_attrs.get(REASON, "no reason was stored")),
            bool(trial.user_attrs.get(ABANDONED, False)),
        )
        for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    ]


def read_trials(study: Study, problem: Problem) -> list[StoredTrial]:
    """Returns every trial of a study in the order of the numbers."""
    return [_read(trial, problem) for trial in study.get_trials(deepcopy=False)]


def read_results(study: Study) -> list[StoredTrial]:
    """Returns the complete trials of a study; needs no `Problem`, as every result holds its policy."""
    return [_read(trial, None) for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]


def ended_trial(
    problem: Problem,
    candidate: Candidate,
    number: int,
    *,
    started: datetime.datetime,
    result: TrialResult | None = None,
    reason: str | None = None,
    reused: int | None = None,
) -> StoredTrial:
    """Returns a trial that has just been stored, as `read_trials` will read it but for its times."""
    stored = policy_of(problem, params_of(problem, candidate.policy)) if result is None else result.policy
    return StoredTrial(
        number=number,
        state="fail" if result is None else "complete",
        policy=stored,
        identity=candidate.identity,
        origin=candidate.origin,
        source=candidate.source,
        result=result,
        reason=reason,
        reused=reused,
        started=started,
        ended=datetime.datetime.now(),
    )


def distinct(trials: Iterable[StoredTrial]) -> list[StoredTrial]:
    """Returns the complete trials without those that only repeat the result of another one."""
    seen: set[str] = set()
    kept = []
    for trial in trials:
        if trial.state == "complete" and trial.identity not in seen:
            seen.add(trial.identity)
            kept.append(trial)
    return kept


def _read(trial: FrozenTrial, problem: Problem | None) -> StoredTrial:
    attrs = trial.user_attrs
    result = TrialResult.from_json(attrs[RESULT]) if RESULT in attrs else None
    if result is not None:
        policy = result.policy
    elif problem is not None:
        policy = policy_of(problem, trial.params)
    else:
        raise StudyError(f"trial {trial.number} holds no result")
    return StoredTrial(
        number=trial.number,
        state=trial.state.name.lower(),
        policy=policy,
        identity=attrs[IDENTITY],
        origin=attrs[ORIGIN],
        source=attrs[SOURCE],
        result=result,
        reason=attrs.get(REASON),
        reused=attrs.get(REUSED),
        abandoned=attrs.get(ABANDONED, False),
        started=trial.datetime_start,
        ended=trial.datetime_complete,
    )


def objectives(problem: Problem, result: TrialResult) -> tuple[float, float]:
    """Returns (validation error, primary cost as a fraction of dense): what Optuna minimises."""
    return result.val_error, problem.fraction(result.costs)


def fault(problem: Problem, result: TrialResult) -> str | None:
    """Returns why a result must not reach Optuna, which would let an infinite value dominate; None where it may."""
    if not result.finite:
        name = "val_accuracy" if problem.objective.percent else problem.objective.label("val")
        return f"{name} is {result.metrics.get('val_accuracy')}"
    if not math.isfinite(objectives(problem, result)[1]):
        return f"{problem.budget.primary} is {result.costs[problem.budget.primary]}"
    return None


def candidate_attrs(candidate: Candidate) -> dict[str, Any]:
    """Returns the user attributes that a trial carries from its beginning."""
    return {
        ORIGIN: candidate.origin,
        SOURCE: candidate.source,
        POLICY_ID: candidate.policy.id,
        IDENTITY: candidate.identity,
    } | ({} if candidate.draw is None else {DRAW: candidate.draw})


def result_attrs(problem: Problem, result: TrialResult, *, reused: int | None = None) -> dict[str, Any]:
    """Returns the user attributes that a finished trial adds: readable numbers, and the whole result last.

    Accuracies and what is kept of the dense network's costs are fractions of 1; a metric of the user's own is as it is,
    under its own name.
    """
    sizes = {group.name: group.size for group in problem.groups}
    dense = problem.cost_model.dense()
    label, metrics = problem.objective.label, result.metrics
    attrs: dict[str, Any] = {label(split): metrics[name] for name, split in _SCORES.items() if name in metrics}
    attrs |= {text: round(result.costs[name] / dense[name], 4) for name, text in _KEPT.items() if dense.get(name)}
    attrs[WIDTHS] = ", ".join(f"{name} {width}/{sizes.get(name, '?')}" for name, width in result.widths.items())
    if reused is not None:
        attrs[REUSED] = reused
    attrs[RESULT] = result.to_json()
    return attrs


def measured_excess(problem: Problem, result: TrialResult) -> dict[str, float]:
    """Returns by how much a limit is exceeded by what was measured, relative to the limit: zero or less is feasible.

    A latency counts as over its limit where even its fastest pass is: what disturbs a measurement only adds to it.
    """
    limits, metrics = problem.budget.limits, result.metrics
    excess = {}
    if LATENCY in limits and "latency_least_ms" in metrics:
        excess["latency_measured"] = 1e6 * metrics["latency_least_ms"] / limits[LATENCY] - 1.0
    if MEMORY in limits and "peak_memory_bytes" in metrics:
        excess["memory_measured"] = metrics["peak_memory_bytes"] / limits[MEMORY] - 1.0
    return {name: value for name, value in excess.items() if math.isfinite(value)}


def constraint_attrs(problem: Problem, result: TrialResult) -> dict[str, Any]:
    """Returns the system attributes that tell Optuna and its dashboard by how much each limit is exceeded."""
    costs = result.costs
    excess = {name: costs[name] / limit - 1.0 for name, limit in problem.budget.limits.items()}
    excess |= measured_excess(problem, result)
    excess = excess or {"budget": -1.0}
    return {_CONSTRAINTS: list(excess.values())} | {f"{_CONSTRAINTS}:{name}": value for name, value in excess.items()}


def begin(study: Study, problem: Problem, candidate: Candidate) -> int:
    """Adds a RUNNING trial, which the dashboard shows, in one transaction; returns its number.

    Not `ask`, which writes each parameter in a transaction of its own.
    """
    params = params_of(problem, candidate.policy)
    trial = optuna.trial.create_trial(
        state=TrialState.RUNNING,
        params=params,
        distributions=_distributions(problem, params),
        user_attrs=candidate_attrs(candidate),
        system_attrs=new_token(),
    )
    return _add(study, trial)


def add_complete(
    study: Study,
    problem: Problem,
    candidate: Candidate,
    *,
    result: TrialResult,
    reused: int | None,
    started: datetime.datetime,
    notes: Mapping[str, Any],
) -> int:
    """Adds a finished trial in one transaction; returns its number. `notes` is what its sampler noted about it."""
    params = params_of(problem, candidate.policy)
    trial = optuna.trial.create_trial(
        values=objectives(problem, result),
        params=params,
        distributions=_distributions(problem, params),
        user_attrs=candidate_attrs(candidate) | result_attrs(problem, result, reused=reused),
        system_attrs=kept_attrs(notes) | constraint_attrs(problem, result) | new_token(),
    )
    trial.datetime_start = started
    return _add(study, trial)


def add_failed(study: Study, problem: Problem, candidate: Candidate, *, reason: str, started: datetime.datetime) -> int:
    """Adds a failed trial in one transaction; returns its number."""
    params = params_of(problem, candidate.policy)
    trial = optuna.trial.create_trial(
        state=TrialState.FAIL,
        params=params,
        distributions=_distributions(problem, params),
        user_attrs=candidate_attrs(candidate) | {REASON: reason},
        system_attrs=new_token(),
    )
    trial.datetime_start = started
    return _add(study, trial)


def finish_running(
    study: Study,
    problem: Problem,
    number: int,
    *,
    result: TrialResult,
    reused: int | None,
    notes: Mapping[str, Any],
) -> None:
    """Completes a RUNNING trial: in one transaction where the storage can.

    Otherwise, killed in between, the trial holds its whole result or is begun again.
    """
    trial_id = _trial_id(study, number)
    backend = getattr(study._storage, "_backend", None)
    if isinstance(backend, LastingStorage):
        backend.finish_trial(
            trial_id,
            values=objectives(problem, result),
            user_attrs=result_attrs(problem, result, reused=reused),
            system_attrs=kept_attrs(notes) | constraint_attrs(problem, result),
        )
        return
    for key, value in kept_attrs(notes).items():
        study._storage.set_trial_system_attr(trial_id, key, value)
    for key, value in result_attrs(problem, result, reused=reused).items():
        study._storage.set_trial_user_attr(trial_id, key, value)
    conclude(study, problem, number, result)


def conclude(study: Study, problem: Problem, number: int, result: TrialResult) -> None:
    """Tells a RUNNING trial that already holds its result."""
    for key, value in constraint_attrs(problem, result).items():
        study._storage.set_trial_system_attr(_trial_id(study, number), key, value)
    study.tell(number, list(objectives(problem, result)))


def fail_running(study: Study, number: int, *, reason: str, abandoned: bool = False) -> None:
    """Fails a RUNNING trial with its reason."""
    trial_id = _trial_id(study, number)
    study._storage.set_trial_user_attr(trial_id, REASON, reason)
    if abandoned:
        study._storage.set_trial_user_attr(trial_id, ABANDONED, True)
    study.tell(number, state=TrialState.FAIL)


def kept_attrs(system_attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a sampler noted about a trial and will want to read again, such as its generation."""
    return {key: value for key, value in system_attrs.items() if not key.startswith(_TRANSIENT)}


def measured_constraints(system_attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the violations of what was measured, as Optuna keeps them; those of exact costs are never above zero."""
    return {
        key: value
        for key, value in system_attrs.items()
        if key.startswith(f"{_CONSTRAINTS}:") and key.endswith("_measured")
    }


def _distributions(problem: Problem, params: Mapping[str, Any]) -> dict[str, Any]:
    space = search_space(problem)
    return {name: space[name] for name in params}


def _add(study: Study, trial: FrozenTrial) -> int:
    # Study.add_trial does not say which number it gave.
    trial._validate()
    trial_id = study._storage.create_new_trial(study._study_id, template_trial=trial)
    return study._storage.get_trial_number_from_id(trial_id)


def _trial_id(study: Study, number: int) -> int:
    return study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
