"""The additive problem: the widths with the least total error of the tables under a budget.

Decides how "least Σ error_g(width_g) with cost(widths) <= limits" is solved. The error is additive, the cost is not (a
layer costs its inputs times its outputs), so a Lagrangian is solved by coordinate descent on the exact cost, bisected
over its multiplier, and what is left of the budget is spent and exchanged step by step. Knows nothing of Optuna or
networks.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoprune.budget import Budget
from autoprune.cost import MEMORY, CostModel
from autoprune.errors import BudgetError
from autoprune.policy import Choice, Group, Policy
from autoprune.results import Problem

Curve = Sequence[float] | Mapping[int, float]
"""The error of a group at each width from 0 to its size, or by width at those that it may take."""
Curves = Mapping[str, Curve]
"""Group → its error curve."""

_SWEEPS = 8
_BISECTIONS = 36


@dataclass(frozen=True, slots=True)
class _Constraint:
    cost: str
    limit: int
    shares: tuple[CostModel, ...] | None


class AdditiveSolver:
    """Solves the additive problem of one network at any number of budgets."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.groups = problem.groups
        self._model = problem.cost_model
        self._places = [self._model.groups.index(group.name) for group in problem.groups]
        self._limits = [self._constraint(name, limit) for name, limit in problem.budget.limits.items()]
        self._primary = self._constraint(problem.budget.primary, self._model.cost(problem.budget.primary, {}))

    def solve(self, curves: Curves, target: float) -> dict[str, int]:
        """Returns the widths of least total error whose primary cost is at most `target` times the dense one.

        Every limit of the budget holds too.

        Raises:
            BudgetError: Not even the narrowest widths meet the limits.
        """
        goal = math.floor(target * self._primary.limit + 1e-6)
        limits = [_Constraint(self._primary.cost, goal, self._primary.shares), *self._limits]
        narrow = {group.name: group.widths[0] for group in self.groups}
        if not self._meets(narrow, limits):
            raise BudgetError(f"no policy has {self._primary.cost} <= {goal:,} within the budget")
        widest = {group.name: group.widths[-1] for group in self.groups}
        if self._meets(widest, limits):
            return widest
        low, high = -18.0, 12.0
        best, start = narrow, widest
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2.0
            widths = self._descend(curves, limits, dict(start), math.exp(middle))
            if self._meets(widths, limits):
                high = middle
                if self.error(curves, widths) < self.error(curves, best):
                    best = widths
            else:
                low, start = middle, widths
        repaired = self._repair(curves, limits, best)
        # Shares of a cost that is spread over a batch are rounded, one by one.
        return repaired if self._meets(repaired, limits) else best

    def error(self, curves: Curves, widths: Mapping[str, int]) -> float:
        """Returns the total error of `widths`."""
        return sum(curves[group.name][widths[group.name]] for group in self.groups)

    def _constraint(self, cost: str, limit: int) -> _Constraint:
        shares = None if cost == MEMORY else tuple(self._model.share(cost, group.name) for group in self.groups)
        return _Constraint(cost, limit, shares)

    def _meets(self, widths: Mapping[str, int], limits: Sequence[_Constraint]) -> bool:
        return all(self._model.cost(limit.cost, widths) <= limit.limit for limit in limits)

    def _descend(
        self, curves: Curves, limits: Sequence[_Constraint], widths: dict[str, int], multiplier: float
    ) -> dict[str, int]:
        """Lowers error + multiplier * relative cost, one group after the other, until nothing moves."""
        for _ in range(_SWEEPS):
            moved = False
            for index, group in enumerate(self.groups):
                if len(group.widths) == 1:
                    continue
                price = multiplier * sum(self._slope(limit, index, widths) for limit in limits)
                curve = curves[group.name]
                width = min(group.widths, key=lambda w: (curve[w] + price * w, w))
                moved |= width != widths[group.name]
                widths[group.name] = width
            if not moved:
                break
        return widths

    def _slope(self, limit: _Constraint, index: int, widths: dict[str, int]) -> float:
        """Returns the cost of one more channel of a group, as a fraction of the limit (the mean over its range)."""
        group, place = self.groups[index], self._places[index]
        model = self._model if limit.shares is None else limit.shares[index]
        values = self._values(widths)
        values[place] = group.widths[-1]
        most = model.at(limit.cost, values)
        values[place] = group.widths[0]
        return (most - model.at(limit.cost, values)) / (group.widths[-1] - group.widths[0]) / max(limit.limit, 1)

    def _values(self, widths: Mapping[str, int]) -> list[int]:
        """Returns the widths of all groups of the cost model, in its order."""
        values = list(self._model.sizes)
        for group, place in zip(self.groups, self._places, strict=True):
            values[place] = widths[group.name]
        return values

    def _repair(self, curves: Curves, limits: Sequence[_Constraint], widths: dict[str, int]) -> dict[str, int]:
        """Spends what is left, then tries to narrow one group by a step to widen others, while that lowers the
        error.
        """
        best = self._spend(curves, limits, dict(widths))
        value = self.error(curves, best)
        improved = True
        while improved:
            improved = False
            for group in self.groups:
                place = bisect_left(group.widths, best[group.name])
                if place == 0:
                    continue
                trial = dict(best)
                trial[group.name] = group.widths[place - 1]
                trial = self._spend(curves, limits, trial, skip=group.name)
                total = self.error(curves, trial)
                if total < value - 1e-12:
                    best, value, improved = trial, total, True
        return best

    def _spend(
        self, curves: Curves, limits: Sequence[_Constraint], widths: dict[str, int], skip: str | None = None
    ) -> dict[str, int]:
        """Widens groups by one step at a time, first the one that gains most error for its cost, while it fits."""
        values = self._values(widths)
        spent = [self._model.at(limit.cost, values) for limit in limits]
        stuck: set[str] = {skip} if skip else set()
        while True:
            choice: tuple[float, int, list[int]] | None = None
            for index, group in enumerate(self.groups):
                place = bisect_left(group.widths, widths[group.name])
                if group.name in stuck or place + 1 >= len(group.widths):
                    continue
                wider = group.widths[place + 1]
                grown = [
                    cost + self._growth(limit, index, values, wider) for limit, cost in zip(limits, spent, strict=True)
                ]
                if any(cost > limit.limit for cost, limit in zip(grown, limits, strict=True)):
                    stuck.add(group.name)  # the others only grow, so it never fits again
                    continue
                gain = curves[group.name][widths[group.name]] - curves[group.name][wider]
                relative = sum((a - b) / c.limit for a, b, c in zip(grown, spent, limits, strict=True))
                rate = gain / max(relative, 1e-15)
                if choice is None or rate > choice[0]:
                    choice = (rate, index, grown)
            if choice is None:
                return widths
            group = self.groups[choice[1]]
            widths[group.name] = group.widths[bisect_left(group.widths, widths[group.name]) + 1]
            values[self._places[choice[1]]] = widths[group.name]
            spent = choice[2]

    def _growth(self, limit: _Constraint, index: int, values: list[int], width: int) -> int:
        """Returns what a group's width `width` costs more than the one in `values`, which is as it was afterwards."""
        place = self._places[index]
        model = self._model if limit.shares is None else limit.shares[index]
        now = values[place]
        before = model.at(limit.cost, values)
        values[place] = width
        after = model.at(limit.cost, values)
        values[place] = now
        return after - before


def best_curves(problem: Problem, tables: Mapping[str, Mapping[str, Curve]]) -> tuple[dict[str, str], Curves]:
    """Returns the criterion of each group whose scope loses least in total, and the curves that follow from it."""
    chosen: dict[str, str] = {}
    for scope in problem.scopes:
        members = [group for group in problem.groups if group.scope == scope]

        def loss(criterion: str, members: Sequence[Group] = members) -> float:
            return sum(_mean(tables[group.name][criterion]) for group in members)

        winner = min(problem.criteria, key=loss)
        chosen.update({group.name: winner for group in members})
    return chosen, {name: tables[name][criterion] for name, criterion in chosen.items()}


def scaled_curve(curve: Curve, factor: float) -> Curve:
    """Returns a curve whose errors are `factor` times as large."""
    if isinstance(curve, Mapping):
        return {width: factor * error for width, error in curve.items()}
    return [factor * error for error in curve]


def _mean(curve: Curve) -> float:
    """Returns the mean error over the widths but the full one, where it is 0."""
    errors = list(curve.values()) if isinstance(curve, Mapping) else curve
    return sum(errors) / max(len(errors) - 1, 1)


def policy_from_widths(problem: Problem, widths: Mapping[str, int], criteria: Mapping[str, str]) -> Policy:
    """Returns the policy with the given widths and criteria."""
    choices = {g.name: Choice(criteria[g.name], g.ratio(widths[g.name])) for g in problem.groups}
    return Policy(choices, problem.default_activations)


def targets(budget: Budget, count: int) -> list[float]:
    """Returns `count` fractions of the dense primary cost, from the span's upper end down at equal ratios."""
    low, high = budget.span
    if count == 1 or high <= low:
        return [high]
    return [high * (low / high) ** (i / (count - 1)) for i in range(count)]
