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
from autoprune.pareto import spread_order
from autoprune.policy import Choice, Group, Policy
from autoprune.results import Problem
from autoprune.studies.projection import Projector

Curve = Sequence[float] | Mapping[int, float]
"""The error of a group at each width from 0 to its size, or by width at those that it may take."""
Curves = Mapping[str, Curve]
"""Group → its error curve."""

_SWEEPS = 8
_BISECTIONS = 16
"""Halvings of the range of the multiplier's logarithm, 30: the repair that follows makes more of them useless."""


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
        self.model = problem.cost_model
        self.places = [self.model.groups.index(group.name) for group in problem.groups]
        self._limits = [self._constraint(name, limit) for name, limit in problem.budget.limits.items()]
        self._primary = self._constraint(problem.budget.primary, self.model.cost(problem.budget.primary, {}))
        self._projector = Projector(problem)
        ratios = [group.ratio(group.widths[0]) / 2 for group in self.groups]
        self._even = dict.fromkeys((group.name for group in self.groups), sum(ratios) / len(ratios))
        self.neighbours = [self._sharing(index) for index in range(len(self.groups))]
        """For each group those whose prices change where it moves."""

    def solve_many(self, curves: Curves, targets: Sequence[float]) -> list[dict[str, int]]:
        """Returns what `solve` does for each target, in their order; the error never rises with the target.

        Raises:
            BudgetError: Not even the narrowest widths meet the limits of the least target.
        """
        found: dict[float, dict[str, int]] = {}
        below: dict[str, int] | None = None
        for target in sorted(set(targets)):
            below = found[target] = self.solve(curves, target, below=below)
        return [found[target] for target in targets]

    def solve(self, curves: Curves, target: float, *, below: Mapping[str, int] | None = None) -> dict[str, int]:
        """Returns the widths of least total error whose primary cost is at most `target` times the dense one.

        Every limit of the budget holds too. The error is never more than that of the uniform policy at this target,
        nor than that of `below`, the widths at a lower target.

        Raises:
            BudgetError: Not even the narrowest widths meet the limits.
        """
        goal = math.floor(target * self._primary.limit + 1e-6)
        limits = [_Constraint(self._primary.cost, goal, self._primary.shares), *self._limits]
        errors = [[curves[group.name][width] for width in group.widths] for group in self.groups]
        least = _Point(self, limits, [0] * len(self.groups))
        if not least.feasible:
            raise BudgetError(f"no policy has {self._primary.cost} <= {goal:,} within the budget")
        widest = _Point(self, limits, [len(group.widths) - 1 for group in self.groups])
        if widest.feasible:
            return widest.widths
        best = self._bisect(errors, least, widest)
        others = [self._projector.project(self._even, target), *([below] if below else [])]
        for point in (_Point(self, limits, self._steps(widths)) for widths in others):
            if point.feasible and point.error(errors) < best.error(errors):
                best = point
        repaired = _repair(errors, best)
        return (repaired if repaired.feasible else best).widths

    def error(self, curves: Curves, widths: Mapping[str, int]) -> float:
        """Returns the total error of `widths`."""
        return sum(curves[group.name][widths[group.name]] for group in self.groups)

    def _constraint(self, cost: str, limit: int) -> _Constraint:
        shares = None if cost == MEMORY else tuple(self.model.share(cost, group.name) for group in self.groups)
        return _Constraint(cost, limit, shares)

    def _sharing(self, index: int) -> list[int]:
        limits = [self._primary, *self._limits]
        if any(limit.shares is None for limit in limits):
            return list(range(len(self.groups)))
        own: set[int] = set()
        for limit in limits:
            assert limit.shares is not None
            own |= limit.shares[index].used(limit.cost)
        return [other for other, place in enumerate(self.places) if place in own and other != index]

    def _steps(self, widths: Mapping[str, int]) -> list[int]:
        return [bisect_left(group.widths, widths[group.name]) for group in self.groups]

    def _bisect(self, errors: Errors, least: _Point, widest: _Point) -> _Point:
        """Returns the best feasible point of the Lagrangian over its multiplier."""
        low, high = -18.0, 12.0
        best, start, lowest = least, widest, least.error(errors)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2.0
            point = start.copy()
            _descend(errors, point, math.exp(middle))
            if point.feasible:
                high = middle
                if point.error(errors) < lowest:
                    best, lowest = point, point.error(errors)
            else:
                low, start = middle, point
        return best


Errors = Sequence[Sequence[float]]
"""The error of each group at each place in its list of widths."""


class _Point:
    """A policy on its way through the solver: where each group stands in its list of widths, and what that costs.

    What a step or a channel of a group costs is kept until a group that shares a cost with it moves.
    """

    def __init__(self, solver: AdditiveSolver, limits: Sequence[_Constraint], at: list[int]) -> None:
        self.solver, self.limits, self.at = solver, limits, at
        self.values = list(solver.model.sizes)
        for group, place, step in zip(solver.groups, solver.places, at, strict=True):
            self.values[place] = group.widths[step]
        self.costs = [solver.model.at(limit.cost, self.values) for limit in limits]
        self._slopes: list[float | None] = [None] * len(at)
        self._growths: list[list[int] | None] = [None] * len(at)

    def copy(self) -> _Point:
        """Returns a point that moves by itself."""
        twin = object.__new__(_Point)
        twin.solver, twin.limits = self.solver, self.limits
        twin.at, twin.values, twin.costs = self.at[:], self.values[:], self.costs[:]
        twin._slopes, twin._growths = self._slopes[:], self._growths[:]
        return twin

    @property
    def widths(self) -> dict[str, int]:
        """The width of every group."""
        return {group.name: group.widths[i] for group, i in zip(self.solver.groups, self.at, strict=True)}

    @property
    def feasible(self) -> bool:
        """Whether every limit holds, for the whole costs: sums of rounded shares may be off by one."""
        return all(self.solver.model.at(limit.cost, self.values) <= limit.limit for limit in self.limits)

    def error(self, errors: Errors) -> float:
        """Returns the total error."""
        return sum(curve[i] for curve, i in zip(errors, self.at, strict=True))

    def move(self, index: int, step: int) -> None:
        """Puts a group at another place of its list."""
        width = self.solver.groups[index].widths[step]
        changes = self._changes(index, width)
        self.costs = [cost + change for cost, change in zip(self.costs, changes, strict=True)]
        self.at[index] = step
        self.values[self.solver.places[index]] = width
        self._growths[index] = None
        for other in self.solver.neighbours[index]:
            self._slopes[other] = self._growths[other] = None

    def growth(self, index: int) -> list[int]:
        """Returns what the next wider step of a group adds to each cost."""
        known = self._growths[index]
        if known is None:
            known = self._changes(index, self.solver.groups[index].widths[self.at[index] + 1])
            self._growths[index] = known
        return known

    def slope(self, index: int) -> float:
        """Returns the cost of one more channel of a group, as a fraction of the limits (the mean over its range)."""
        known = self._slopes[index]
        if known is None:
            widths, known = self.solver.groups[index].widths, 0.0
            place = self.solver.places[index]
            now = self.values[place]
            for limit in self.limits:
                model = self.solver.model if limit.shares is None else limit.shares[index]
                self.values[place] = widths[-1]
                most = model.at(limit.cost, self.values)
                self.values[place] = widths[0]
                spread = most - model.at(limit.cost, self.values)
                known += spread / (widths[-1] - widths[0]) / max(limit.limit, 1)
            self.values[place] = now
            self._slopes[index] = known
        return known

    def _changes(self, index: int, width: int) -> list[int]:
        """Returns what each cost gains where a group takes `width`."""
        place = self.solver.places[index]
        now, changes = self.values[place], []
        for limit in self.limits:
            model = self.solver.model if limit.shares is None else limit.shares[index]
            before = model.at(limit.cost, self.values)
            self.values[place] = width
            changes.append(model.at(limit.cost, self.values) - before)
            self.values[place] = now
        return changes


def _descend(errors: Errors, point: _Point, multiplier: float) -> None:
    """Lowers error + multiplier * relative cost, one group after the other, until nothing moves."""
    for _ in range(_SWEEPS):
        moved = False
        for index, group in enumerate(point.solver.groups):
            if len(group.widths) == 1:
                continue
            price = multiplier * point.slope(index)
            totals = [error + price * width for error, width in zip(errors[index], group.widths, strict=True)]
            step = totals.index(min(totals))
            if step != point.at[index]:
                point.move(index, step)
                moved = True
        if not moved:
            return


def _repair(errors: Errors, point: _Point) -> _Point:
    """Spends what is left, then tries to narrow one group by a step to widen others, while that lowers the error."""
    best = point.copy()
    _spend(errors, best)
    value = best.error(errors)
    improved = True
    while improved:
        improved = False
        for index, step in enumerate(best.at):
            if step == 0:
                continue
            trial = best.copy()
            trial.move(index, step - 1)
            _spend(errors, trial, skip=index)
            total = trial.error(errors)
            if total < value - 1e-12:
                best, value, improved = trial, total, True
    return best


def _spend(errors: Errors, point: _Point, skip: int | None = None) -> None:
    """Widens groups by one step at a time, first the one that gains most error for its cost, while it fits."""
    groups = point.solver.groups
    left = [i for i, g in enumerate(groups) if i != skip and point.at[i] + 1 < len(g.widths)]
    while left:
        room = [limit.limit - cost for limit, cost in zip(point.limits, point.costs, strict=True)]
        best, chosen, fitting = -math.inf, -1, []
        for index in left:
            step, growth = point.at[index], point.growth(index)
            if any(more > free for more, free in zip(growth, room, strict=True)):
                continue  # the others only grow, so it never fits again
            fitting.append(index)
            relative = sum(more / limit.limit for more, limit in zip(growth, point.limits, strict=True))
            rate = (errors[index][step] - errors[index][step + 1]) / max(relative, 1e-15)
            if rate > best:
                best, chosen = rate, index
        left = fitting
        if chosen >= 0:
            point.move(chosen, point.at[chosen] + 1)
            if point.at[chosen] + 1 == len(groups[chosen].widths):
                left.remove(chosen)


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
    """Returns `count` fractions of the dense primary cost, from the span's upper end down at equal ratios.

    Of a budget with points some of them, well spread, and never more than there are.
    """
    low, high = budget.span
    if budget.points:
        order = spread_order(budget.points)[:count]
        return sorted((budget.points[i] for i in order), reverse=True)
    if count == 1 or high <= low:
        return [high]
    return [high * (low / high) ** (i / (count - 1)) for i in range(count)]
