"""Why a stored trial has its widths, by the error tables and the cost model that its search stored.

Decides how errors are weighed. No model and no data are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from autoprune.budget import Budget
from autoprune.coordinator.stored.search import Shown, StoredSearch, results_of
from autoprune.errors import StudyError
from autoprune.policy import Policy
from autoprune.prices import ErrorCurve, Explanation, explain
from autoprune.results import Problem
from autoprune.studies.learned import LEAST_TRIALS, fit_weights


class _ByWidth(Sequence[float]):
    """An error curve as the search reads it: the error at each width from 0 to the group's size, on demand."""

    def __init__(self, curve: ErrorCurve, size: int) -> None:
        self._curve = curve
        self._size = size

    def __len__(self) -> int:
        return self._size + 1

    def __getitem__(self, width: Any) -> Any:
        return self._curve.at(width)


def explanation_of(stored: StoredSearch, shown: Shown) -> Explanation:
    """Explains one trial by the search's error tables and cost model.

    Errors are weighed against the cost on the front's axis; a latency is that of the search's latency table.

    Raises:
        StudyError: The tables are missing.
    """
    background = stored.background
    if background is None:
        raise StudyError(
            f"{stored.name} was made by a version that stored no error tables; run the same search again: it repeats"
            " nothing and adds them"
        )
    cost = str(stored.facts["primary"])
    policy, groups = shown.result.policy, background.groups
    try:
        weights = learned_weights(stored, policy)
        return explain(policy, groups, background.model, background.curves, cost=cost, weights=weights)
    except ValueError as error:
        raise StudyError(f"trial {shown.number} of {stored.name} cannot be explained: {error}") from error


def learned_weights(stored: StoredSearch, policy: Policy) -> dict[str, float] | None:
    """Returns how much the error of each group matters under a policy's criteria, as the trials teach; 1 on average.

    They are fitted to the validation losses of the first rung, which has the most trials; None where these are fewer
    than a fit takes. The fit reads stored curves, so it can differ a little from the search's own.

    Raises:
        ValueError: A trial used a criterion of which no curve is stored.
    """
    background = stored.background
    results = [r for r in results_of(stored, stored.order[0]) if math.isfinite(r.metrics.get("val_loss", math.nan))]
    if background is None or len(results) < LEAST_TRIALS:
        return None
    criteria = tuple(dict.fromkeys(name for by in background.curves.values() for name in by))
    budget = Budget(dict(stored.facts["limits"]), str(stored.facts["primary"]), (0.0, 1.0))
    problem = Problem(background.groups, background.model, budget, criteria)
    used = {c.criterion for r in results for c in r.policy.choices.values()}
    missing = sorted(used.difference(criteria))
    if missing or any(group.name not in background.curves for group in background.groups):
        raise ValueError(f"error curves of {', '.join(missing) or 'some groups'} are not stored")
    tables = {
        group.name: {name: _ByWidth(curve, group.size) for name, curve in background.curves[group.name].items()}
        for group in background.groups
    }
    fitted = fit_weights(problem, tables, results)
    matters = {name: weight * fitted.factors[policy.choices[name].criterion] for name, weight in fitted.groups.items()}
    mean = fmean(matters.values())
    return {name: value / mean for name, value in matters.items()} if mean > 0 else None
