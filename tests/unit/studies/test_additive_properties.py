"""Properties of the additive solution, on random cost models, budgets and curves."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.budget import Budget
from autoprune.cost import COSTS, CostModel, Form, Term
from autoprune.errors import BudgetError
from autoprune.policy import Group
from autoprune.results import Problem
from autoprune.studies.additive import AdditiveSolver
from autoprune.studies.warmstart import uniform


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Random groups, several limits, and costs that are sums of products of widths, some shared by a batch of seven."""
    count = draw(st.integers(1, 5))
    groups = []
    for i in range(count):
        size = draw(st.integers(1, 20))
        groups.append(Group(f"g{i}", size, tuple(sorted(draw(st.sets(st.integers(1, size), min_size=1, max_size=8))))))
    form = st.builds(
        lambda const, terms: Form(const, tuple(terms.items())),
        st.integers(0, 3),
        st.dictionaries(st.integers(0, count - 1), st.integers(1, 5), max_size=2),
    )
    term = st.builds(Term, st.integers(1, 50), st.lists(form, max_size=2).map(tuple), st.sampled_from([1, 1, 7]))
    base = (Term(1), *(Term(3, (Form(0, ((i, 1),)),)) for i in range(count)))
    sums = [tuple(draw(st.lists(term, min_size=1, max_size=4))) + base for _ in range(4)]
    sizes = tuple(group.size for group in groups)
    model = CostModel(tuple(g.name for g in groups), sizes, *sums[:3], (sums[3], base))
    least, dense = model.costs({g.name: g.widths[0] for g in groups}), model.dense()
    limited = draw(st.sets(st.sampled_from(COSTS)))
    limits = {name: draw(st.integers(least[name], dense[name])) for name in limited}
    primary = draw(st.sampled_from(COSTS))
    return Problem(tuple(groups), model, Budget(limits, primary, (least[primary] / dense[primary], 1.0)), ("l2",))


def fraction(problem: Problem, widths: dict[str, int]) -> float:
    primary = problem.budget.primary
    return problem.cost_model.cost(primary, widths) / problem.cost_model.cost(primary, {})


@st.composite
def cases(draw: st.DrawFn) -> tuple[Problem, dict[str, list[float]], list[float]]:
    """A problem, a falling curve for each of its groups, and targets that can be met alone (not with every limit)."""
    problem = draw(problems())
    curves = {}
    for group in problem.groups:
        steps = draw(st.lists(st.floats(0, 10), min_size=group.size, max_size=group.size))
        errors = [0.0]
        for step in steps:
            errors.insert(0, errors[0] + step)
        curves[group.name] = errors
    low, high = problem.budget.span
    return problem, curves, draw(st.lists(st.floats(low, high), min_size=1, max_size=4, unique=True))


def solved(problem: Problem, curves: dict[str, list[float]], targets: list[float]) -> list[dict[str, int]] | None:
    try:
        return AdditiveSolver(problem).solve_many(curves, targets)
    except BudgetError:
        return None


@settings(deadline=None, max_examples=25)
@given(cases())
def test_a_solution_is_feasible_and_made_of_widths_that_the_groups_may_take(case) -> None:
    problem, curves, targets = case
    for target, widths in zip(targets, solved(problem, curves, targets) or [], strict=False):
        assert all(widths[group.name] in group.widths for group in problem.groups)
        assert fraction(problem, widths) <= target + 1e-6
        assert problem.budget.within(problem.cost_model.costs(widths))


@settings(deadline=None, max_examples=25)
@given(cases())
def test_a_target_is_refused_only_where_the_narrowest_widths_exceed_it_too(case) -> None:
    problem, curves, targets = case
    narrow = {group.name: group.widths[0] for group in problem.groups}
    met = problem.budget.within(problem.cost_model.costs(narrow)) and fraction(problem, narrow) <= min(targets) + 1e-9
    assert (solved(problem, curves, targets) is not None) == met


@settings(deadline=None, max_examples=25)
@given(cases())
def test_a_solution_is_never_worse_than_the_uniform_policy_at_its_target(case) -> None:
    problem, curves, targets = case
    solver = AdditiveSolver(problem)
    for target, widths in zip(targets, solved(problem, curves, targets) or [], strict=False):
        even = uniform(problem, "l2", target).widths(problem.groups)
        assert solver.error(curves, widths) <= solver.error(curves, even) + 1e-9


@settings(deadline=None, max_examples=25)
@given(cases())
def test_the_error_never_rises_with_the_target(case) -> None:
    problem, curves, targets = case
    solver = AdditiveSolver(problem)
    errors = [solver.error(curves, widths) for widths in solved(problem, curves, sorted(targets)) or []]
    assert all(after <= before + 1e-9 for before, after in pairwise(errors))


@settings(deadline=None, max_examples=25)
@given(cases())
def test_no_group_of_a_solution_could_be_widened_to_lower_the_error(case) -> None:
    problem, curves, targets = case
    for target, widths in zip(targets, solved(problem, curves, targets) or [], strict=False):
        for group in problem.groups:
            wider = next((width for width in group.widths if width > widths[group.name]), None)
            if wider is None or curves[group.name][wider] >= curves[group.name][widths[group.name]]:
                continue
            grown = {**widths, group.name: wider}
            costs = problem.cost_model.costs(grown)
            assert not problem.budget.within(costs) or fraction(problem, grown) > target - 1e-9
