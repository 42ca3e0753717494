"""What a search leaves in its studies for readers: facts about the network, and notes that the Optuna dashboard shows.

Decides where these are stored. A finished trial's attributes cannot change, so links that are known later are notes,
which the dashboard keeps with the study.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.study import Study

FACTS = "autoprune.facts"
_NOTE_CHUNK = 2045
"""optuna-dashboard's own bound. Its keys are written here directly: importing it takes 2.6 s."""


def write_facts(study: Study, facts: Mapping[str, Any]) -> None:
    """Stores what a reader needs to know beside the trials: dense scores, sizes, limits. Plain JSON values."""
    study.set_user_attr(FACTS, dict(facts))


def read_facts(study: Study) -> dict[str, Any] | None:
    """Returns what `write_facts` stored, or None."""
    facts = study.user_attrs.get(FACTS)
    return None if facts is None else dict(facts)


MEASURED = "autoprune.measured"


def write_measured(study: Study, measured: Mapping[str, Mapping[str, float]]) -> None:
    """Adds measurements that were taken after the trials had ended, by model; those that are there already stay."""
    study.set_user_attr(MEASURED, {**{k: dict(v) for k, v in measured.items()}, **read_measured(study)})


def read_measured(study: Study) -> dict[str, dict[str, float]]:
    """Returns what `write_measured` stored."""
    return dict(study.user_attrs.get(MEASURED, {}))


def write_notes(study: Study, notes: Mapping[int, str]) -> None:
    """Gives trials, by number, a Markdown note in the Optuna dashboard; a note that is there already is left alone."""
    storage, study_id = study._storage, study._study_id
    attrs = storage.get_study_system_attrs(study_id)
    ids = {trial.number: trial._trial_id for trial in study.get_trials(deepcopy=False)}
    for number, body in notes.items():
        trial_id = ids.get(number)
        if trial_id is None or f"dashboard:{trial_id}:note_ver" in attrs:
            continue
        for place, start in enumerate(range(0, len(body), _NOTE_CHUNK)):
            part = body[start : start + _NOTE_CHUNK]
            storage.set_study_system_attr(study_id, f"dashboard:{trial_id}:note_str:{place}", part)
        storage.set_study_system_attr(study_id, f"dashboard:{trial_id}:note_ver", 1)
