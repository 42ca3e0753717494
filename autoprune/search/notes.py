"""What a search leaves in its studies for readers: facts about the network, and notes that the Optuna dashboard shows.

Decides where these are stored. A finished trial's attributes cannot change, so links that are known later are notes,
which the dashboard keeps with the study.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.study import Study

FACTS = "autoprune.facts"


def write_facts(study: Study, facts: Mapping[str, Any]) -> None:
    """Stores what a reader needs to know beside the trials: dense scores, sizes, limits. Plain JSON values."""
    study.set_user_attr(FACTS, dict(facts))


def read_facts(study: Study) -> dict[str, Any] | None:
    """Returns what `write_facts` stored, or None."""
    facts = study.user_attrs.get(FACTS)
    return None if facts is None else dict(facts)


def write_notes(study: Study, notes: Mapping[int, str]) -> None:
    """Gives trials, by number, a Markdown note in the Optuna dashboard; a note that is there already is left alone."""
    from optuna_dashboard._note import get_note_from_system_attrs, save_note_with_version

    storage, study_id = study._storage, study._study_id
    attrs = storage.get_study_system_attrs(study_id)
    ids = {trial.number: trial._trial_id for trial in study.get_trials(deepcopy=False)}
    for number, body in notes.items():
        trial_id = ids.get(number)
        if trial_id is not None and not get_note_from_system_attrs(attrs, trial_id)["body"]:
            save_note_with_version(storage, study_id, trial_id, 1, body)
