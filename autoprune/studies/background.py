"""What a search leaves with its studies for what is done after it: settings, prices, error tables.

Decides where it is stored: as a system attribute, which the Optuna dashboard does not show, because it may be some
hundred kilobytes. Knows nothing of what is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.study import Study

BACKGROUND = "autoprune.background"


def write_background(study: Study, background: Mapping[str, Any]) -> None:
    """Stores plain JSON values with a study, unless they are there already."""
    if read_background(study) == background:
        return
    study._storage.set_study_system_attr(study._study_id, BACKGROUND, dict(background))


def read_background(study: Study) -> dict[str, Any] | None:
    """Returns what `write_background` stored, or None."""
    found = study._storage.get_study_system_attrs(study._study_id).get(BACKGROUND)
    return None if found is None else dict(found)
