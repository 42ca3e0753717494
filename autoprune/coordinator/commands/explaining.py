"""Trials explained and compared, from what is stored: no model and no data are read.

Decides which stored values an explanation and a comparison are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoprune import report
from autoprune.coordinator.stored.display import point_in, view_of
from autoprune.coordinator.stored.explanations import explanation_of
from autoprune.coordinator.stored.search import Shown, StoredSearch, read_search
from autoprune.errors import InputError
from autoprune.report.console import terminal


def explain_trial(name: str, *, home: Path, trial: int) -> tuple[str, dict[str, Any]]:
    """Returns why a trial's groups have their widths, as text and as JSON values.

    Raises:
        StudyError: There is no such search or trial, or the search was made before error tables were stored.
    """
    stored = read_search(name, home=home)
    shown = stored.find(trial)
    view, point = view_of(stored), point_in(stored, shown)
    why = explanation_of(stored, shown)
    width, color = terminal()
    text = report.render_explanation(view, point, why, console_width=width, color=color)
    return text.rstrip("\n"), report.explanation_json(view, point, why)


def compare_trials(name: str, *, home: Path, trials: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """Returns trials side by side, as text and as JSON values.

    Raises:
        StudyError: There is no such search or trial.
        InputError: Fewer than two different trials are named.
    """
    numbers = list(dict.fromkeys(trials))
    if len(numbers) < 2:
        raise InputError(f"name at least two different trials to compare, got {', '.join(map(str, trials)) or 'none'}")
    stored = read_search(name, home=home)
    view = view_of(stored)
    compared = [compared_of(stored, stored.find(number)) for number in numbers]
    width, color = terminal()
    text = report.render_comparison(view, compared, console_width=width, color=color)
    return text.rstrip("\n"), report.comparison_json(view, compared)


def compared_of(stored: StoredSearch, shown: Shown) -> report.Compared:
    """Returns a trial as the comparison takes it."""
    criteria = {group: choice.criterion for group, choice in shown.result.policy.choices.items()}
    return report.Compared(point_in(stored, shown), shown.rung, criteria)
