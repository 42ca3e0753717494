"""What a search leaves in its studies for readers: facts, a pick, and notes that the Optuna dashboard shows.

Decides where these are stored. A finished trial's attributes cannot change, so what is known later (links, the front)
is a note, which the dashboard keeps with the study.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.study import Study

FACTS = "autoprune.facts"
PICK = "autoprune.pick"
_NOTE_CHUNK = 2045
"""optuna-dashboard's own bound. Its keys are written here directly: importing it takes 2.6 s."""


def write_facts(study: Study, facts: Mapping[str, Any]) -> None:
    """Stores what a reader needs to know beside the trials: dense scores, sizes, limits. Plain JSON values."""
    study.set_user_attr(FACTS, dict(facts))


def read_facts(study: Study) -> dict[str, Any] | None:
    """Returns what `write_facts` stored, or None."""
    return _read(study, FACTS)


def write_pick(study: Study, pick: Mapping[str, Any] | None) -> None:
    """Stores which models a person picked, as plain JSON values; None forgets it."""
    if study.user_attrs.get(PICK) != pick:
        study.set_user_attr(PICK, None if pick is None else dict(pick))


def read_pick(study: Study) -> dict[str, Any] | None:
    """Returns what `write_pick` stored, or None."""
    return _read(study, PICK)


MEASURED = "autoprune.measured"


def write_measured(study: Study, measured: Mapping[str, Mapping[str, float]]) -> None:
    """Adds measurements that were taken after the trials had ended, by model; those that are there already stay."""
    study.set_user_attr(MEASURED, {**{k: dict(v) for k, v in measured.items()}, **read_measured(study)})


def read_measured(study: Study) -> dict[str, dict[str, float]]:
    """Returns what `write_measured` stored."""
    return dict(study.user_attrs.get(MEASURED, {}))


def write_notes(study: Study, notes: Mapping[int, str]) -> None:
    """Gives trials, by number, a Markdown note in the Optuna dashboard; what a person has edited is left alone."""
    ids = {trial.number: trial._trial_id for trial in study.get_trials(deepcopy=False)}
    attrs = study._storage.get_study_system_attrs(study._study_id)
    for number, body in notes.items():
        if number in ids:
            _write_note(study, attrs, f"dashboard:{ids[number]}:note", body)


def write_study_note(study: Study, body: str) -> None:
    """Gives the study a Markdown note in the Optuna dashboard; one that a person has edited is left alone."""
    _write_note(study, study._storage.get_study_system_attrs(study._study_id), "dashboard:note", body)


_OURS = 1
"""The version of a note that we wrote: the dashboard counts up when a person edits it."""


def _write_note(study: Study, attrs: Mapping[str, Any], key: str, body: str) -> None:
    storage, study_id = study._storage, study._study_id
    parts = [body[start : start + _NOTE_CHUNK] for start in range(0, len(body), _NOTE_CHUNK)]
    old = [str(attrs[f"{key}_str:{i}"]) for i in range(sum(name.startswith(f"{key}_str:") for name in attrs))]
    if int(attrs.get(f"{key}_ver", _OURS)) != _OURS or "".join(old) == body:
        return
    for place in range(max(len(parts), len(old))):  # what an earlier, longer note left is emptied
        part = parts[place] if place < len(parts) else ""
        storage.set_study_system_attr(study_id, f"{key}_str:{place}", part)
    storage.set_study_system_attr(study_id, f"{key}_ver", _OURS)


def _read(study: Study, key: str) -> dict[str, Any] | None:
    found = study.user_attrs.get(key)
    return None if found is None else dict(found)
