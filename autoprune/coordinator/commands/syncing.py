"""Records in MLflow what the studies hold and MLflow does not: trials, the front, its models, a pick.

Decides that a search which is still running is left to its own process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autoprune import studies
from autoprune.coordinator.commands.finetuning import record_all_finetuned
from autoprune.coordinator.commands.picking import Say, picks
from autoprune.coordinator.recording.notes import write_notes
from autoprune.coordinator.recording.records import Records
from autoprune.coordinator.stored.display import view_of
from autoprune.coordinator.stored.places import open_existing
from autoprune.coordinator.stored.search import CONTROLS, SCRATCH, StoredSearch, read_search
from autoprune.errors import StudyError, TrackingError

_PATIENCE = 600.0


@dataclass(frozen=True)
class Synced:
    """What is recorded now: runs of trials, versions of the registered model, fine-tuned models, picked trials."""

    name: str
    runs: int
    versions: int
    finetuned: int
    picked: tuple[str, ...]
    address: str

    @property
    def text(self) -> str:
        """What a person reads."""
        picked = ", ".join(self.picked) or "nothing"
        return (
            f"{self.name}: MLflow holds {self.runs} finished trials, {self.versions} models of the front,"
            f" {self.finetuned} fine-tuned models; picked: {picked}\n{self.address}"
        )


def sync_search(name: str, *, home: Path, say: Say) -> Synced:
    """Records what is missing, each thing once.

    Raises:
        StudyError: There is no such search, it keeps no settings, or a process is running it.
        TrackingError: MLflow is away, or refused something.
    """
    storage = open_existing(home)
    if studies.search_holder(storage, name):
        raise StudyError(f"a process is running the search {name!r} and records it; wait for its end")
    stored = read_search(name, home=home)
    first = studies.rung_names(storage, name)[0]
    with studies.hold(studies.load_rung(storage, name, first)):
        return _sync(stored, storage, home=home, say=say)


def _sync(stored: StoredSearch, storage: studies.LastingStorage, *, home: Path, say: Say) -> Synced:
    name = stored.name
    records = Records(name, stored.setup, home=home, say=say, objective=stored.objective)
    count = 0
    for rung in [*stored.order, CONTROLS, SCRATCH]:
        for trial in stored.rungs.get(rung, ()):
            records.trial(rung, trial, dense_metrics=stored.facts["dense_metrics"])
            count += 1
    view = view_of(stored)
    if view.front:
        records.publish(stored, view)
    else:
        records.stop("FINISHED")
    finetuned = record_all_finetuned(records, home)
    left = records.close(_PATIENCE)
    if left or records.refused:
        reasons = "; ".join(f"{refused.what}: {refused.reason}" for refused in records.refused)
        raise TrackingError(reasons or f"MLflow is away: {left} records of {name} wait")
    write_notes(storage, stored, view, records)
    return Synced(
        name=name,
        runs=count,
        versions=len(records.versions),
        finetuned=finetuned,
        picked=tuple(picks(name, home=home, say=say)),
        address=records.address + (records.charts or ""),
    )
