"""Warm starts: the policies that a practitioner would try first, at several budgets.

Decides which heuristics are tried before the sampler's own proposals: uniform, a global ranking by each criterion, the
additive solution of the error tables, and whole blocks removed where they may be. They are ordinary trials, so a
search is never worse than the best heuristic under the same recipe.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from autoprune.pareto import spread_order
from autoprune.policy import Group, Policy
from autoprune.results import Problem, WarmStart
from autoprune.studies.additive import AdditiveSolver, Curve, Curves, best_curves, policy_from_widths, targets
from autoprune.studies.projection import Projector, nearest_width

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""Criterion → group → one score a channel, or an even sample of them; higher means keep."""
Tables = Mapping[str, Mapping[str, Curve]]
"""Group → criterion → error at each width that the group may take."""


def uniform(problem: Problem, criterion: str, target: float, *, projector: Projector | None = None) -> Policy:
    """Returns the policy with the same ratio everywhere that just meets `target`, a fraction of the dense primary cost.

    Raises:
        BudgetError: No policy meets it.
    """
    ratios = {group.name: group.ratio(group.widths[0]) / 2 for group in problem.groups}
    even = dict.fromkeys(ratios, sum(ratios.values()) / len(ratios))
    widths = (projector or Projector(problem)).project(even, target)
    return policy_from_widths(problem, widths, dict.fromkeys(widths, criterion))


def global_ranking(
    problem: Problem, scores: Scores, criterion: str, target: float, *, projector: Projector | None = None
) -> Policy:
    """Returns the policy that keeps the channels with the highest scores of the whole network, down to `target`.

    One threshold over all groups is lowered until the budget is met; each group keeps at least its least width.

    Raises:
        BudgetError: No policy meets it.
    """
    ranked = {group.name: sorted(scores[criterion][group.name]) for group in problem.groups}
    levels = sorted({value for values in ranked.values() for value in values})
    low, high = 0, len(levels)  # levels[i]: everything below is removed
    dense = problem.cost_model.cost(problem.budget.primary, {})

    def widths_at(level: int) -> dict[str, int]:
        threshold = levels[level] if level < len(levels) else math.inf
        gone = {name: bisect_left(values, threshold) / len(values) for name, values in ranked.items()}
        return {g.name: nearest_width(g, g.size * (1.0 - gone[g.name])) for g in problem.groups}

    def meets(widths: Mapping[str, int]) -> bool:
        costs = problem.cost_model.costs(widths)
        return costs[problem.budget.primary] <= target * dense + 1e-6 and problem.budget.within(costs)

    while low < high:
        middle = (low + high) // 2
        if meets(widths_at(middle)):
            high = middle
        else:
            low = middle + 1
    widths = widths_at(low)
    ratios = {g.name: g.ratio(widths[g.name]) for g in problem.groups}
    widths = (projector or Projector(problem)).project(ratios, target)
    return policy_from_widths(problem, widths, dict.fromkeys(widths, criterion))


def additive(problem: Problem, tables: Tables, target: float, *, criterion: str | None = None) -> Policy:
    """Returns the solution of the additive problem at `target`, with one criterion everywhere or the best of each
    scope.

    Raises:
        BudgetError: No policy meets it.
    """
    chosen, curves = _criterion_curves(problem, tables, criterion)
    return policy_from_widths(problem, AdditiveSolver(problem).solve(curves, target), chosen)


def shallow(
    problem: Problem, tables: Tables, target: float, criterion: str, *, projector: Projector | None = None
) -> Policy | None:
    """Returns the policy that removes whole groups down to `target` and leaves all others as they are.

    First goes the group that loses least error for what it saves; the last one goes only as far as it must. None where
    no group may go whole, or where all that may do not suffice. ResNet-56 / CIFAR-10 (JPEG copy) at half of its MACs,
    2,000 images, no fine-tuning, by `obs`: 81.4 %; the additive solution 86.3 %.

    Raises:
        BudgetError: No policy meets the target.
    """
    model, name = problem.cost_model, problem.budget.primary
    limit = target * model.cost(name, {}) + 1e-6
    widths = {group.name: group.size for group in problem.groups}

    def meets() -> bool:
        costs = model.costs(widths)
        return costs[name] <= limit and problem.budget.within(costs)

    def price(group: Group) -> float:
        saved = model.cost(name, widths) - model.cost(name, {**widths, group.name: 0})
        return tables[group.name][criterion][0] / max(saved, 1)

    left = [group for group in problem.groups if group.widths[0] == 0]
    while left and not meets():
        last = min(left, key=price)
        left.remove(last)
        for width in reversed(last.widths):
            widths[last.name] = width
            if meets():
                break
    if not meets() or 0 not in widths.values():
        return None
    ratios = {group.name: group.ratio(widths[group.name]) for group in problem.groups}
    widths = (projector or Projector(problem)).project(ratios, target)
    return policy_from_widths(problem, widths, dict.fromkeys(widths, criterion))


def _criterion_curves(problem: Problem, tables: Tables, criterion: str | None) -> tuple[dict[str, str], Curves]:
    if criterion is None:
        return best_curves(problem, tables)
    chosen = {group.name: criterion for group in problem.groups}
    return chosen, {group.name: tables[group.name][criterion] for group in problem.groups}


def warm_starts(problem: Problem, scores: Scores, tables: Tables, *, count: int) -> tuple[WarmStart, ...]:
    """Returns up to `count` distinct policies: three fifths additive solutions, then uniform and global rankings.

    Where groups may go whole, a sixth of them (at least one) removes whole groups alone; they follow the additive ones.

    Of each kind any beginning is spread over the span of the budget and goes over the criteria in turn, so that a
    search that is stopped after a handful of candidates has a front already. Additive solutions with single criteria
    stand beside those with the best one of each scope: which criterion leaves most after compensation is not what the
    tables predict (ResNet-20 / CIFAR-10 at 0.35 of the MACs: l1 72.6 %, the tables' choice 69.9 %).

    Where `obs_greedy` may be chosen, the tables' choice is right and comes first at every target: ResNet-20 at 0.35,
    0.50 and 0.70 of the MACs 75.4, 82.5, 86.9 % on 10,000 images, by l1 73.0, 81.7, 86.7, by activation 73.4, 81.2,
    86.8; ResNet-56 at 0.35 and 0.50 82.4, 86.8 %, by l1 81.1, 86.4, by activation 81.2, 85.7.
    """
    if count < 1:
        return ()
    usable = [name for name in problem.criteria if name != "random"] or list(problem.criteria)
    solver, projector = AdditiveSolver(problem), Projector(problem)
    deep = max(1, count // 6) if any(group.widths[0] == 0 for group in problem.groups) else 0
    names = [None, *usable] if len(usable) > 1 else usable
    lead = [None] if None in names and "obs_greedy" in usable else []
    wanted = _round(problem, names, math.ceil(0.6 * (count - deep)), lead=lead)
    solved: dict[tuple[float, str | None], Policy] = {}
    for criterion in dict.fromkeys(name for _, name in wanted):
        chosen, curves = _criterion_curves(problem, tables, criterion)
        own = [target for target, name in wanted if name == criterion]
        for target, widths in zip(own, solver.solve_many(curves, own), strict=True):
            solved[target, criterion] = policy_from_widths(problem, widths, chosen)
    starts = [WarmStart(solved[target, name], f"additive-{name}" if name else "additive") for target, name in wanted]
    for place, target in enumerate(targets(problem.budget, deep) if deep else ()):
        by = usable[place % len(usable)]
        policy = shallow(problem, tables, target, by, projector=projector)
        starts += [WarmStart(policy, f"shallow-{by}")] if policy is not None else []
    for target, name in _round(problem, usable, math.ceil((count - len(starts)) / 2)):
        assert name is not None
        starts.append(WarmStart(uniform(problem, name, target, projector=projector), f"uniform-{name}"))
        ranked = global_ranking(problem, scores, name, target, projector=projector)
        starts.append(WarmStart(ranked, f"global-{name}"))
    distinct: dict[str, WarmStart] = {}
    for start in starts:
        distinct.setdefault(start.policy.id, start)
    return tuple(distinct.values())[:count]


def _round(
    problem: Problem, criteria: Sequence[str | None], count: int, *, lead: Sequence[str | None] = ()
) -> list[tuple[float, str | None]]:
    """Returns `count` pairs of a target and a criterion: each target twice (of points each once, then again), with
    criteria that change from one to the next; `lead` criteria have the first rounds to themselves.
    """
    spread = targets(problem.budget, max(1, count if problem.budget.points else math.ceil(count / 2)))
    rest = [name for name in criteria if name not in lead]
    pairs = [
        (spread[place], lead[turn] if turn < len(lead) else rest[(i + turn) % len(rest)])
        for turn in range(math.ceil(count / len(spread)))
        for i, place in enumerate(spread_order(spread))
    ]
    return pairs[:count]


def control_policies(problem: Problem, scores: Scores, *, count: int, seed: int = 0) -> tuple[WarmStart, ...]:
    """Returns up to `count` policies that people would try by hand, in the order in which they matter.

    At the budget: uniform and global by a weight norm, random ratios, and global by every other criterion. Then uniform
    and global by the norm at lower costs, spread over the span. The norm is `l2` or `l1` where the problem has one of
    them, else its first criterion.
    """
    if count < 1:
        return ()
    norm = next((name for name in ("l2", "l1") if name in problem.criteria), problem.criteria[0])
    projector = Projector(problem)

    def even(target: float) -> WarmStart:
        return WarmStart(uniform(problem, norm, target, projector=projector), f"uniform {norm}")

    def ranked(criterion: str, target: float) -> WarmStart:
        return WarmStart(global_ranking(problem, scores, criterion, target, projector=projector), f"global {criterion}")

    high = problem.budget.span[1]
    starts = [even(high), ranked(norm, high), _random(problem, norm, seed, projector=projector)]
    starts += [ranked(name, high) for name in problem.criteria if name not in (norm, "random")]
    lower = max(1, math.ceil((count - len(starts)) / 2))
    for target in _lower(problem, lower):
        starts += [even(target), ranked(norm, target)]
    distinct: dict[str, WarmStart] = {}
    for start in starts:
        distinct.setdefault(start.policy.id, start)
    return tuple(distinct.values())[:count]


def _lower(problem: Problem, count: int) -> list[float]:
    """Returns up to `count` fractions of the dense primary cost below the upper end of the span."""
    if problem.budget.points:
        return list(problem.budget.points[1 : count + 1])
    return targets(problem.budget, count + 2)[1:-1]  # the least budget has a single policy


def _random(problem: Problem, criterion: str, seed: int, *, projector: Projector) -> WarmStart:
    """Returns ratios drawn evenly for each group, shifted onto the budget."""
    rng = random.Random(seed)
    ratios = {g.name: rng.uniform(g.ratio(g.widths[-1]), g.ratio(g.widths[0])) for g in problem.groups}
    widths = projector.project(ratios, problem.budget.span[1])
    return WarmStart(
        policy_from_widths(problem, widths, dict.fromkeys(widths, criterion)), f"random ratios {criterion}"
    )
