"""The studies of a search: one for each rung, named `<search>.<rung>`.

Decides which attributes a study carries, and refuses a study that was made from other settings. Knows nothing of how
trials come about.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from optuna.trial import TrialState

from autoprune.budget import key_of
from autoprune.errors import StudyError, nearest
from autoprune.policy import digest
from autoprune.results import Problem
from autoprune.studies.storage import quiet_optuna

SCHEMA = 1
FINGERPRINT = "autoprune.fingerprint"
SCHEMA_KEY = "autoprune.schema"
SECTIONS = "autoprune.sections"
REFERENCE = "autoprune.reference"
DENSE = "autoprune.dense"
PRIMARY = "autoprune.primary"
SEARCH = "autoprune.search"
RUNG = "autoprune.rung"
NETWORK = "network"
"""Section that stands for what the tracing found: groups, prices and limits."""


def study_name(search: str, rung: str) -> str:
    """Returns the name of the study that holds one rung of a search."""
    return f"{search}.{rung}"


def reference_point(worst: float = 0.0) -> tuple[float, float]:
    """Returns the (error, fraction of the dense primary cost) below which hypervolumes of this search are measured.

    It is (1, 1), everything wrong at the dense network's cost, so that a point exactly on the budget counts too. Of a
    metric of the user's own `worst` is the value from which on it counts; the search's facts hold that.
    """
    return 1.0 - worst, 1.0


def open_study(
    storage: BaseStorage,
    name: str,
    problem: Problem,
    *,
    fingerprint: str,
    settings: Mapping[str, Any],
    create: bool = True,
) -> Study:
    """Opens the study called `name`, and makes it where it is missing.

    Both objectives are minimised: the validation error and the primary cost as a fraction of the dense network's.

    Args:
        storage: Where the study is.
        name: As `study_name` returns it.
        problem: What is searched.
        fingerprint: Stands for all settings that decide a result.
        settings: The same settings by section, or their digests, so that a difference can be named.
        create: Whether a missing study is made.

    Raises:
        StudyError: The study is missing and not to be made, was not made by this program, or belongs to other settings.
    """
    sections = {section: digest(value) for section, value in settings.items()}
    sections[NETWORK] = _network_digest(problem)
    with quiet_optuna():
        study = _load_or_create(storage, name, create=create)
        attrs = study.user_attrs
        if FINGERPRINT not in attrs:
            if study.get_trials(deepcopy=False):
                raise StudyError(f"the study {name!r} was not made by autoprune")
            _describe(study, problem, sections)
            study.set_user_attr(FINGERPRINT, fingerprint)  # last: a study without it is not finished
            return study
    _check(name, attrs, fingerprint, sections)
    return study


def _load_or_create(storage: BaseStorage, name: str, *, create: bool) -> Study:
    sampler = optuna.samplers.RandomSampler()  # never asked: proposals come from a mirror in memory
    try:
        return optuna.load_study(study_name=name, storage=storage, sampler=sampler)
    except KeyError as error:
        if not create:
            names = [study.study_name for study in storage.get_all_studies()]
            raise StudyError(f"there is no study {name!r}{nearest(name, names)}") from error
    directions = [StudyDirection.MINIMIZE, StudyDirection.MINIMIZE]
    try:
        return optuna.create_study(study_name=name, storage=storage, directions=directions, sampler=sampler)
    except DuplicatedStudyError:  # made by somebody else in this very moment
        return optuna.load_study(study_name=name, storage=storage, sampler=sampler)


def _describe(study: Study, problem: Problem, sections: Mapping[str, str]) -> None:
    search, _, rung = study.study_name.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # set_metric_names
        study.set_metric_names([problem.objective.stored_error, f"{key_of(problem.budget.primary)}_fraction"])
    attrs = {
        SCHEMA_KEY: SCHEMA,
        SECTIONS: dict(sections),
        REFERENCE: list(reference_point()),
        DENSE: problem.cost_model.dense(),
        PRIMARY: problem.budget.primary,
        SEARCH: search,
        RUNG: rung,
    }
    for key, value in attrs.items():
        study.set_user_attr(key, value)


def _check(name: str, attrs: Mapping[str, Any], fingerprint: str, sections: Mapping[str, str]) -> None:
    if attrs.get(SCHEMA_KEY) != SCHEMA:
        raise StudyError(
            f"the study {name!r} has the schema {attrs.get(SCHEMA_KEY)!r}; this version reads schema {SCHEMA}"
        )
    stored = attrs.get(SECTIONS, {})
    differing = sorted(key for key in {*stored, *sections} if stored.get(key) != sections.get(key))
    if attrs[FINGERPRINT] == fingerprint and stored.get(NETWORK) == sections[NETWORK]:
        return
    raise _another_space(name, differing or ["the fingerprint"])


def _another_space(name: str, differing: Sequence[str]) -> StudyError:
    return StudyError(
        f"the study {name!r} belongs to another space: it differs in {', '.join(differing)};"
        " search under another name, or undo the change"
    )


def check_settings(storage: BaseStorage, search: str, settings: Mapping[str, Any], *, unknown: Sequence[str]) -> None:
    """Refuses settings that differ from those of a stored search, as `open_study` will, before a model is at hand.

    Args:
        storage: Where the search may be.
        search: Its name.
        settings: By section, as `open_study` takes them.
        unknown: Sections beside these whose values only the search finds out.

    Raises:
        StudyError: There is such a search, and it belongs to other settings.
    """
    if search not in search_names(storage):
        return
    first = load_rung(storage, search, rung_names(storage, search)[0])
    stored = first.user_attrs.get(SECTIONS, {})
    known = {section: digest(value) for section, value in settings.items() if section not in unknown}
    compared = {*stored, *known} - {NETWORK, *unknown}
    if differing := sorted(section for section in compared if stored.get(section) != known.get(section)):
        raise _another_space(first.study_name, differing)


def _network_digest(problem: Problem) -> str:
    groups = [[g.name, g.size, list(g.widths), g.scope] for g in problem.groups]
    least = {group.name: group.widths[0] for group in problem.groups}
    costs = [problem.cost_model.dense(), problem.cost_model.costs(least)]
    budget = [dict(problem.budget.limits), problem.budget.primary, list(problem.budget.span)]
    budget += [list(problem.budget.points)] if problem.budget.points else []
    activations = [sorted((place, list(kinds)) for place, kinds in problem.activations.items())]
    return digest([groups, costs, budget, list(problem.criteria), *(activations if problem.activations else [])])


def search_names(storage: BaseStorage) -> list[str]:
    """Returns the names of the searches that a storage holds, in the order in which they were begun."""
    studies = sorted(storage.get_all_studies(), key=lambda study: study._study_id)
    return list(dict.fromkeys(s.user_attrs[SEARCH] for s in studies if FINGERPRINT in s.user_attrs))


def rung_names(storage: BaseStorage, search: str) -> list[str]:
    """Returns the rungs that a search has begun, first to last.

    Raises:
        StudyError: The storage holds no such search.
    """
    studies = sorted(storage.get_all_studies(), key=lambda study: study._study_id)
    rungs = [s.user_attrs[RUNG] for s in studies if FINGERPRINT in s.user_attrs and s.user_attrs[SEARCH] == search]
    if not rungs:
        raise StudyError(f"there is no search {search!r}{nearest(search, search_names(storage))}")
    return rungs


def load_rung(storage: BaseStorage, search: str, rung: str) -> Study:
    """Opens a rung of a search to read it, whatever settings it was made from.

    Raises:
        StudyError: The search has no such rung.
    """
    rungs = rung_names(storage, search)
    if rung not in rungs:
        raise StudyError(f"the search {search!r} has no rung {rung!r}{nearest(rung, rungs)}")
    with quiet_optuna():
        return _load_or_create(storage, study_name(search, rung), create=False)


@dataclass(frozen=True, slots=True)
class StudySummary:
    """What is known of one rung without looking at its results.

    `reference` is the reference point of hypervolumes, `dense` the costs of the unpruned network.
    """

    search: str
    rung: str
    primary: str
    reference: tuple[float, float]
    dense: Mapping[str, int]
    finished: int
    failed: int
    running: int
    waiting: int

    def to_json(self) -> dict[str, Any]:
        """Returns the summary as plain JSON values."""
        return asdict(self)


def study_summary(study: Study) -> StudySummary:
    """Returns the state of a study that `open_study` or `load_rung` opened."""
    attrs = study.user_attrs
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    error, cost = attrs[REFERENCE]
    return StudySummary(
        search=attrs[SEARCH],
        rung=attrs[RUNG],
        primary=attrs[PRIMARY],
        reference=(float(error), float(cost)),
        dense=attrs[DENSE],
        finished=states.count(TrialState.COMPLETE),
        failed=states.count(TrialState.FAIL),
        running=states.count(TrialState.RUNNING),
        waiting=states.count(TrialState.WAITING),
    )
