"""A search as the report sees it, put together from its studies.

Decides which rung is shown and by which number a trial is called: a person picks trials of the rung before the one that
touches the test set, so a `final` result is shown under the number of the trial that it comes from.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autoprune import report, studies
from autoprune.coordinator.background import Background, unpack
from autoprune.coordinator.setup import Setup
from autoprune.errors import StudyError
from autoprune.objective import ACCURACY, Objective
from autoprune.policy import CHANNEL
from autoprune.report import FrontPoint, SearchView
from autoprune.results import Fidelity, Problem, TrialResult
from autoprune.studies import Audit, Failure, StoredTrial

CONTROLS = "controls"
"""The rung of the controls: simple policies under the last rung's recipe."""
SCRATCH = "scratch"
"""The rung of those points of the front that are trained from random weights by the last rung's recipe."""
DENSE = "dense"
"""The dense network's name among measurements."""
STATE = "optuna.db"
STORAGE_ENV = "AUTOPRUNE_STORAGE"
"""Environment variable that names the storage; the option `--storage` sets it."""
HOME = Path(".autoprune")
"""The home folder that the commands look for where none is named."""


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


def make_home(home: Path) -> None:
    """Makes a home folder, and finds out whether it can be written before anything slow is done.

    Raises:
        StudyError: It cannot be made or written.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise StudyError(f"the home folder {home} cannot be written: {error.strerror or error}") from error


def storage_path(home: Path) -> Path | str:
    """Returns where the studies are: what `AUTOPRUNE_STORAGE` names (a file or a URL), else the home folder's file.

    Several machines share one PostgreSQL database so; names of searches are common to all of them then.
    """
    named = os.environ.get(STORAGE_ENV, "").strip()
    if named:
        return named if "://" in named else Path(named)
    return home / STATE


def open_existing(home: Path) -> studies.LastingStorage:
    """Opens the storage of a home folder to read it.

    Raises:
        StudyError: There is none, or it cannot be used.
        MissingExtraError: The database's driver is not installed.
    """
    place = storage_path(home)
    if isinstance(place, Path) and not place.is_file():
        where = home if place == home / STATE else place
        raise StudyError(f"there is no search in {where} yet; `autoprune search` makes one")
    return studies.open_storage(place, create=False)


def models_path(home: Path, name: str) -> Path:
    """Returns the folder of a search's models."""
    return home / "models" / name


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


def view_of(stored: StoredSearch, *, notes: Sequence[str] = ()) -> SearchView:
    """Returns the view of a search's shown rung, controls included where they ran the same recipe."""
    facts, background = stored.facts, stored.background
    metrics = dict(facts["dense_metrics"]) | dict(stored.measured.get(DENSE, {}))
    shown = stored.shown()
    dense = FrontPoint(
        trial=None,
        val_accuracy=metrics.get("val_accuracy", float("nan")),
        costs=facts["dense_costs"],
        widths=facts["sizes"],
        test_accuracy=metrics.get("test_accuracy") if any("test_accuracy" in s.result.metrics for s in shown) else None,
        origin="dense",
        metrics=metrics,
    )
    rung: Mapping[str, Any] = next((r for r in facts["rungs"] if r["rung"] == stored.shown_rung), {})
    last = stored.shown_rung == stored.order[-1]
    beside = (CONTROLS, SCRATCH) if last else ()
    controls = [t for rung in beside for t in studies.distinct(stored.rungs.get(rung, ()))]
    return SearchView(
        name=stored.name,
        rung=stored.shown_rung,
        dense=dense,
        trials=tuple(point_in(stored, s) for s in shown),
        sizes=facts["sizes"],
        controls=tuple(
            report.point_of(t.result, trial=None, origin=t.source) for t in controls if t.result is not None
        ),
        primary=facts["primary"],
        reference=(float(facts["reference"][0]), float(facts["reference"][1])),
        limits=facts["limits"],
        samples=_samples(background, rung.get("images")),
        notes=(
            *filter(None, [stored.objective.note]),
            *doubt_notes(facts),
            *latency_notes(facts),
            *audit_notes(stored),
            *notes,
        ),
        pruning=facts.get("pruning", CHANNEL),
        seeds=rung.get("seeds", 1),
        objective=stored.objective,
    )


def _samples(background: Background | None, images: int | None) -> dict[str, int]:
    """Returns how many samples of each split the shown accuracies are fractions of; nothing where nobody knows."""
    if background is None or not background.accuracy:
        return {}
    samples = dict(background.samples)
    if images is not None and "val" in samples:
        samples["val"] = min(samples["val"], images)
    return samples


def point_in(stored: StoredSearch, shown: Shown) -> FrontPoint:
    """Returns a trial as the report sees it, with what was measured of it after the search."""
    point = report.point_of(shown.result, trial=shown.number, origin=shown.source)
    return replace(point, metrics={**point.metrics, **stored.measured.get(model_key(shown.result), {})})


def latency_notes(facts: Mapping[str, Any]) -> list[str]:
    """Returns a sentence on how latency was measured, and one on how well the table predicts it."""
    known = facts.get("latency")
    if known is None:
        return []
    threads = f", {known['threads']} thread{'s' if known['threads'] > 1 else ''}" if known["device"] == "cpu" else ""
    notes = [f"Latency: batch {known['batch']}, {known['dtype']}, {known['device']}{threads}."]
    if "error" in known:
        notes.append(f"The latency table's median error on networks that it had not seen is {known['error']:.1%}.")
    return notes


def doubt_notes(facts: Mapping[str, Any]) -> list[str]:
    """Returns why the dense network's score may not mean what it seems to mean."""
    return [f"Warning: {sentence}." for sentence in facts.get("warnings", ())]


def audit_notes(stored: StoredSearch) -> list[str]:
    """Returns a sentence for every two rungs in a row: how well the first one ranks what the second one measured."""
    notes = []
    for first, second, audit in audits_of(stored):
        if audit.tau is None or audit.regret is None:
            continue
        notes.append(
            f"Proxy audit {first} → {second}: Kendall τ {audit.tau:.2f} over {audit.pairs} policies,"
            f" regret {stored.objective.regret(audit.regret)}."
        )
        if audit.warning:
            notes.append(f"Warning: {audit.warning}")
    return notes


def audits_of(stored: StoredSearch) -> list[tuple[str, str, Audit]]:
    """Returns the audit of every two rungs in a row, with their names."""
    return [
        (first, second, studies.audit(results_of(stored, first), results_of(stored, second)))
        for first, second in zip(stored.order, stored.order[1:], strict=False)
    ]


def results_of(stored: StoredSearch, rung: str) -> list[TrialResult]:
    """Returns the results of a rung."""
    return [trial.result for trial in stored.rungs.get(rung, ()) if trial.result is not None]
