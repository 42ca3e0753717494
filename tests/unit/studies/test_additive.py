"""The additive solver against exhaustive search."""

import itertools
import math

import numpy as np
import pytest

from autoprune.budget import Budget
from autoprune.errors import BudgetError
from autoprune.studies.additive import AdditiveSolver, best_curves, policy_from_widths, targets
from autoprune.studies.warmstart import uniform


def random_curves(problem, seed, convex=True):
    """Falling curves that end at zero, of very different height."""
    rng = np.random.default_rng(seed)
    curves = {}
    for group in problem.groups:
        steps = rng.exponential(size=group.size)
        steps = np.sort(steps)[::-1] if convex else steps
        curve = np.concatenate([np.cumsum(steps[::-1])[::-1], [0.0]]) * 10.0 ** rng.uniform(-1.5, 0.5)
        curves[group.name] = tuple(float(v) for v in curve)
    return curves


def exhaustive(problem, curves, target):
    best = math.inf
    limit = target * problem.cost_model.cost(problem.budget.primary, {}) + 1e-6
    for widths in itertools.product(*(g.widths for g in problem.groups)):
        chosen = dict(zip((g.name for g in problem.groups), widths, strict=True))
        costs = problem.cost_model.costs(chosen)
        if costs[problem.budget.primary] <= limit and problem.budget.within(costs):
            best = min(best, sum(curves[name][width] for name, width in chosen.items()))
    return best


@pytest.mark.parametrize("convex", [True, False], ids=["convex", "ragged"])
@pytest.mark.parametrize("seed", range(6))
def test_the_solution_is_near_the_best_one_and_meets_the_target(make_chain, seed, convex):
    """Within a tenth of the least error for convex curves; a Lagrangian cannot see into the dents of ragged ones."""
    problem = make_chain(3, size=8, front=(0.1, 0.6))
    curves, solver = random_curves(problem, seed, convex), AdditiveSolver(problem)
    tolerance = 1.1 if convex else 1.4
    for target in (0.2, 0.4, 0.6):
        widths = solver.solve(curves, target)
        assert problem.cost_model.cost("macs", widths) <= target * problem.cost_model.cost("macs", {})
        assert all(widths[g.name] in g.widths for g in problem.groups)
        best = exhaustive(problem, curves, target)
        assert best - 1e-9 <= solver.error(curves, widths) <= tolerance * best + 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_the_solution_is_never_worse_than_the_uniform_policy(make_chain, seed):
    problem = make_chain(8, size=16)
    curves, solver = random_curves(problem, seed), AdditiveSolver(problem)
    for target in (0.25, 0.4, 0.6):
        even = uniform(problem, "l2", target).widths(problem.groups)
        assert solver.error(curves, solver.solve(curves, target)) <= solver.error(curves, even) + 1e-9


def test_every_limit_of_the_budget_holds(make_chain):
    problem = make_chain(5, budget={"macs": 0.6, "params": 0.35, "memory": 0.6})
    for seed in range(3):
        widths = AdditiveSolver(problem).solve(random_curves(problem, seed), 0.6)
        assert problem.budget.within(problem.cost_model.costs(widths))


def test_a_larger_budget_never_gives_a_larger_error(make_chain):
    problem = make_chain(4, size=8, front=(0.1, 0.6))
    curves, solver = random_curves(problem, 1), AdditiveSolver(problem)
    errors = [solver.error(curves, solver.solve(curves, target)) for target in (0.2, 0.3, 0.4, 0.5, 0.6)]
    assert all(b <= a * 1.02 for a, b in itertools.pairwise(errors))


def test_a_budget_that_does_not_bind_keeps_every_channel(make_chain):
    problem = make_chain(3, budget={"macs": 1.0}, front=None)
    assert AdditiveSolver(problem).solve(random_curves(problem, 0), 1.0) == {g.name: g.size for g in problem.groups}


def test_a_group_that_matters_more_keeps_more(make_chain):
    problem = make_chain(3)
    curves = random_curves(problem, 0)
    curves["layer1"] = tuple(100 * v for v in curves["layer0"])
    curves["layer2"] = curves["layer0"]
    widths = AdditiveSolver(problem).solve(curves, 0.4)
    assert widths["layer1"] > max(widths["layer0"], widths["layer2"])


def test_only_widths_of_the_grid_are_used(make_chain):
    problem = make_chain(4, round_to=4)
    widths = AdditiveSolver(problem).solve(random_curves(problem, 0), 0.5)
    assert all(width % 4 == 0 for width in widths.values())


def test_a_target_below_the_least_possible_is_refused(make_chain):
    with pytest.raises(BudgetError, match="no policy has macs <="):
        AdditiveSolver(make_chain(3)).solve(random_curves(make_chain(3), 0), 0.0001)


def test_curves_without_any_error_are_solved_too(make_chain):
    problem = make_chain(3)
    flat = {g.name: (0.0,) * (g.size + 1) for g in problem.groups}
    assert problem.budget.within(problem.cost_model.costs(AdditiveSolver(problem).solve(flat, 0.6)))


def test_each_scope_takes_the_criterion_that_loses_least(make_chain):
    problem = make_chain(3, size=4, scope=lambda name: "a" if name == "layer0" else "b")
    low, high = (0.4, 0.3, 0.2, 0.1, 0.0), (0.8, 0.6, 0.4, 0.2, 0.0)
    tables = {
        "layer0": {"l2": low, "taylor": high},
        "layer1": {"l2": low, "taylor": (0.0,) * 5},
        "layer2": {"l2": low, "taylor": low},
    }
    chosen, curves = best_curves(problem, tables)
    assert chosen == {"layer0": "l2", "layer1": "taylor", "layer2": "taylor"}
    assert curves == {name: tables[name][criterion] for name, criterion in chosen.items()}


def test_widths_and_criteria_make_a_policy_with_the_very_same_widths(make_chain):
    problem = make_chain(3)
    widths = {"layer0": 3, "layer1": 16, "layer2": 9}
    policy = policy_from_widths(problem, widths, dict.fromkeys(widths, "l2"))
    assert policy.widths(problem.groups) == widths


def test_targets_fall_from_the_upper_to_the_lower_end_of_the_span():
    budget = Budget({}, "macs", (0.2, 0.6))
    found = targets(budget, 5)
    assert (found[0], found[-1], len(found)) == (0.6, pytest.approx(0.2), 5)
    assert all(b < a for a, b in itertools.pairwise(found))
    assert targets(budget, 1) == [0.6]
    assert targets(Budget({}, "macs", (0.5, 0.5)), 4) == [0.5]
