"""A search as its storage holds it: rungs, trials, facts.

Decides which rung is shown and by which number a trial is called: a person picks trials of the rung before the one that
touches the test set, so a `final` result is shown under the number of the trial that it comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoprune import studies
from autoprune.coordinator.stored.background import Background, unpack
from autoprune.coordinator.stored.places import models_path, open_existing
from autoprune.coordinator.stored.setup import Setup
from autoprune.errors import StudyError
from autoprune.objective import ACCURACY, Objective
from autoprune.policy import CHANNEL
from autoprune.results import Fidelity, Problem, TrialResult
from autoprune.studies import Audit, Failure, StoredTrial

CONTROLS = "controls"
"""The rung of the controls: simple policies under the last rung's recipe."""
SCRATCH = "scratch"
"""The rung of those points of the front that are trained from random weights by the last rung's recipe."""
DENSE = "dense"
"""The dense network's name among measurements."""


def facts_of(
    problem: Problem,
    dense_metrics: Mapping[str, float],
    rungs: Sequence[Fidelity],
    stages: Mapping[str, str],
    *,
    latency: Mapping[str, Any],
    pruning: str = CHANNEL,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns what a reader of the studies needs to know beside the trials.

    `latency` are the conditions under which it is measured, with the `error` of the latency table where there is one.
    `warnings` are sentences on the dense network's score.
    """
    return {
        "schema": 1,
        "pruning": pruning,
        "warnings": list(warnings),
        "primary": problem.budget.primary,
        "sizes": {group.name: group.size for group in problem.groups},
        "stages": dict(stages),
        "dense_costs": problem.cost_model.dense(),
        "dense_metrics": dict(dense_metrics),
        "limits": dict(problem.budget.limits),
        "latency": dict(latency),
        "reference": list(studies.reference_point(problem.objective.worst(dense_metrics["val_accuracy"]))),
        "rungs": [
            {"rung": f.rung, "test": f.test, "epochs": f.epochs, "seeds": f.seeds, "images": f.images} for f in rungs
        ],
    }


@dataclass(frozen=True)
class Shown:
    """One trial of the shown rung: the number that people use, its study's own, and the result."""

    number: int
    rung: str
    own: int
    result: TrialResult
    source: str


@dataclass(frozen=True)
class StoredSearch:
    """A search as its storage holds it. `background` is None for a search that was made before it was stored."""

    name: str
    facts: Mapping[str, Any]
    rungs: Mapping[str, tuple[StoredTrial, ...]]
    home: Path
    failures: Mapping[str, tuple[Failure, ...]] = field(default_factory=dict)
    background: Background | None = None
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What was measured of models after the search: by `model_key`, and the dense network's under `dense`."""

    @property
    def setup(self) -> Setup:
        """The settings that the search was last run with.

        Raises:
            StudyError: It was run by a version that did not keep them.
        """
        if self.background is None:
            raise StudyError(
                f"the search {self.name!r} keeps no settings (an earlier version ran it): run `autoprune search` again"
            )
        return self.background.setup

    @property
    def objective(self) -> Objective:
        """What the search maximises."""
        return ACCURACY if self.background is None else self.background.objective

    @property
    def order(self) -> list[str]:
        """The rungs of the ladder, first to last."""
        return [rung["rung"] for rung in self.facts["rungs"]]

    @property
    def picked_rung(self) -> str:
        """The rung whose trial numbers people use: the last one that does not touch the test set."""
        plain = [rung["rung"] for rung in self.facts["rungs"] if not rung["test"]]
        return str(plain[-1] if plain else self.order[-1])

    @property
    def shown_rung(self) -> str:
        """The last rung that has a finished trial."""
        begun = [rung for rung in self.order if any(t.state == "complete" for t in self.rungs.get(rung, ()))]
        return begun[-1] if begun else self.order[0]

    def shown(self, rung: str | None = None) -> list[Shown]:
        """Returns the distinct finished trials of a rung (by default the one that is shown)."""
        rung = rung or self.shown_rung
        renamed = self.order.index(rung) > self.order.index(self.picked_rung) if rung in self.order else False
        return [
            Shown(int(t.origin) if renamed else t.number, rung, t.number, t.result, t.source)
            for t in studies.distinct(self.rungs.get(rung, ()))
            if t.result is not None
        ]

    def find(self, number: int) -> Shown:
        """Returns the trial that people call `number`, as the last rung that finished it shows it.

        Raises:
            StudyError: There is no such trial.
        """
        rungs = list(dict.fromkeys([self.shown_rung, self.picked_rung]))
        known = [shown for rung in rungs for shown in self.shown(rung)]
        found = next((shown for shown in known if shown.number == number), None)
        if found is None:
            numbers = ", ".join(str(n) for n in sorted({shown.number for shown in known}))
            raise StudyError(f"{self.name} has no finished trial {number}; finished: {numbers or 'none'}")
        return found

    def model_path(self, number: int) -> Path:
        """Returns the folder with the model of the trial that people call `number`.

        Raises:
            StudyError: There is no such trial, or its weights were not kept.
        """
        rungs = list(dict.fromkeys([self.shown_rung, self.picked_rung]))
        found = [s for rung in rungs for s in self.shown(rung) if s.number == number]
        kept = sorted({s.number for rung in rungs for s in self.shown(rung) if self.folder(s.result)})
        text = ", ".join(map(str, kept)) or "none"
        if not found:
            raise StudyError(f"{self.name} has no finished trial {number}; weights are kept of: {text}")
        for shown in found:
            if folder := self.folder(shown.result):
                return folder
        raise StudyError(f"the weights of trial {number} of {self.name} were not kept (it is not on the front): {text}")

    def keeps(self, number: int) -> bool:
        """Whether the model of the trial that people call `number` was written; screened ones are not."""
        rungs = dict.fromkeys([self.shown_rung, self.picked_rung])
        return any(s.number == number and self.folder(s.result) for rung in rungs for s in self.shown(rung))

    def folder(self, result: TrialResult) -> Path | None:
        """Returns the folder with a result's model, or None where it was not kept.

        It is looked for in the home folder that was read, wherever the search was run from.
        """
        if result.model_path is None:
            return None
        folder = models_path(self.home, self.name) / Path(result.model_path).name
        return folder if folder.is_dir() else None


def read_search(name: str, *, home: Path) -> StoredSearch:
    """Reads a search from the storage of a home folder.

    Raises:
        StudyError: There is no storage, no such search, or it was not begun.
    """
    storage = open_existing(home)
    names = studies.rung_names(storage, name)
    opened = {rung: studies.load_rung(storage, name, rung) for rung in names}
    facts = next((f for study in opened.values() if (f := studies.read_facts(study)) is not None), None)
    if facts is None:
        raise StudyError(f"the search {name!r} has not begun yet")
    trials = {rung: tuple(studies.read_results(study)) for rung, study in opened.items()}
    failures = {rung: tuple(studies.read_failures(study)) for rung, study in opened.items()}
    packed = next((b for study in opened.values() if (b := studies.read_background(study)) is not None), None)
    background = None if packed is None else unpack(packed)
    measured = studies.read_measured(opened[names[0]])
    return StoredSearch(name, facts, trials, home, failures, background, measured)


def model_key(result: TrialResult) -> str:
    """Returns what names a finished model among the measurements of a search."""
    return f"{result.fidelity.rung}-{result.identity}"


def audits_of(stored: StoredSearch) -> list[tuple[str, str, Audit]]:
    """Returns the audit of every two rungs in a row, with their names."""
    return [
        (first, second, studies.audit(results_of(stored, first), results_of(stored, second)))
        for first, second in zip(stored.order, stored.order[1:], strict=False)
    ]


def results_of(stored: StoredSearch, rung: str) -> list[TrialResult]:
    """Returns the results of a rung."""
    return [trial.result for trial in stored.rungs.get(rung, ()) if trial.result is not None]
