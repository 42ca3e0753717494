"""Properties of the projection onto the budget, on random cost models."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.budget import Budget, resolve_budget
from autoprune.cost import COSTS, CostModel, Form, Term
from autoprune.errors import BudgetError, PolicyError
from autoprune.policy import Group, feasible_widths
from autoprune.results import Problem
from autoprune.studies.projection import Projector, nearest_width, project


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Random groups, and costs that are random sums of products of their widths."""
    groups = []
    for i in range(draw(st.integers(1, 6))):
        size = draw(st.integers(1, 40))
        widths = draw(st.sets(st.integers(1, size), min_size=1, max_size=12))
        groups.append(Group(f"g{i}", size, tuple(sorted(widths))))
    forms = st.builds(
        lambda const, terms: Form(const, tuple(terms.items())),
        st.integers(0, 5),
        st.dictionaries(st.integers(0, len(groups) - 1), st.integers(1, 9), max_size=3),
    )
    term = st.builds(lambda factor, two: Term(factor, tuple(two)), st.integers(1, 50), st.lists(forms, max_size=2))
    sums = [tuple(draw(st.lists(term, min_size=1, max_size=5))) for _ in range(4)]
    # Every group costs something, and nothing costs zero.
    base = (Term(1), *(Term(3, (Form(0, ((i, 1),)),)) for i in range(len(groups))))
    model = CostModel(
        tuple(g.name for g in groups),
        tuple(g.size for g in groups),
        sums[0] + base,
        sums[1] + base,
        sums[2] + base,
        (sums[3] + base, base),
    )
    least = model.costs({g.name: g.widths[0] for g in groups})
    dense = model.dense()
    limited = draw(st.sets(st.sampled_from(COSTS)))
    limits = {name: draw(st.integers(least[name], dense[name])) for name in limited}
    primary = draw(st.sampled_from(COSTS))
    return Problem(tuple(groups), model, Budget(limits, primary, (least[primary] / dense[primary], 1.0)), ("l2",))


def ratios(problem: Problem) -> st.SearchStrategy[dict[str, float]]:
    return st.fixed_dictionaries({g.name: st.floats(-0.5, 1.5) for g in problem.groups})


def fraction(problem: Problem, widths: dict[str, int]) -> float:
    primary = problem.budget.primary
    return problem.cost_model.cost(primary, widths) / problem.cost_model.cost(primary, {})


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_projection_is_feasible_and_never_above_the_target(data: st.DataObject) -> None:
    problem = data.draw(problems())
    target = data.draw(st.floats(problem.budget.span[0], 1.0))
    widths = project(problem, data.draw(ratios(problem)), target)
    assert all(widths[g.name] in g.widths for g in problem.groups)
    assert problem.budget.within(problem.cost_model.costs(widths))
    assert fraction(problem, widths) <= target * (1 + 1e-12)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_no_group_could_grow_any_more(data: st.DataObject) -> None:
    problem = data.draw(problems())
    target = data.draw(st.floats(problem.budget.span[0], 1.0))
    widths = project(problem, data.draw(ratios(problem)), target)
    for group in problem.groups:
        wider = [w for w in group.widths if w > widths[group.name]]
        if wider:
            grown = {**widths, group.name: wider[0]}
            too_dear = fraction(problem, grown) > target
            assert too_dear or not problem.budget.within(problem.cost_model.costs(grown))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_projecting_twice_changes_nothing(data: st.DataObject) -> None:
    problem = data.draw(problems())
    target = data.draw(st.floats(problem.budget.span[0], 1.0))
    projector = Projector(problem)
    widths = projector.project(data.draw(ratios(problem)), target)
    again = {g.name: g.ratio(widths[g.name]) for g in problem.groups}
    assert projector.project(again, target) == widths
    assert projector.project(again, projector.fraction(widths)) == widths
    assert projector.project(again) == widths


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_higher_target_never_lowers_the_primary_cost(data: st.DataObject) -> None:
    problem = data.draw(problems())
    wanted = data.draw(ratios(problem))
    span = st.floats(problem.budget.span[0], 1.0)
    low, high = sorted((data.draw(span), data.draw(span)))
    projector = Projector(problem)
    assert projector.fraction(projector.project(wanted, low)) <= projector.fraction(projector.project(wanted, high))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_nearest_width_is_the_one_that_the_group_names(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 64))
    group = Group("g", size, tuple(sorted(data.draw(st.sets(st.integers(1, size), min_size=1)))))
    ratio = data.draw(st.floats(0, 0.999))
    assert nearest_width(group, size * (1.0 - ratio)) == group.width(ratio)


@pytest.mark.parametrize("count", [1, 60])
def test_one_group_and_sixty_wide_ones_come_close_to_the_target(count: int, make_chain: Callable[..., Problem]) -> None:
    problem = make_chain(count, size=512)
    rng = random.Random(0)
    for _ in range(5):
        widths = project(problem, {g.name: rng.random() for g in problem.groups}, 0.5)
        assert 0.498 < fraction(problem, widths) <= 0.5


def test_without_a_target_a_feasible_proposal_is_rounded_and_another_one_is_shrunk(
    make_chain: Callable[..., Problem],
) -> None:
    problem = make_chain(3, budget={"macs": 0.5, "params": 0.45})
    assert project(problem, dict.fromkeys(["layer0", "layer1", "layer2"], 0.76)) == {
        "layer0": 4,
        "layer1": 4,
        "layer2": 4,
    }
    widths = project(problem, dict.fromkeys(["layer0", "layer1", "layer2"], 0.0))
    assert problem.budget.within(problem.cost_model.costs(widths))
    assert min(widths.values()) >= 9


def test_a_target_below_the_least_possible_cost_says_what_the_least_is(make_chain: Callable[..., Problem]) -> None:
    problem = make_chain(2)
    least = problem.cost_model.cost("macs", {g.name: g.widths[0] for g in problem.groups})
    with pytest.raises(BudgetError, match=f"the least possible is {least:,}"):
        project(problem, {"layer0": 0.0, "layer1": 0.0}, 0.001)


@pytest.mark.parametrize("bad", [{"layer0": 0.5}, {"layer0": 0.5, "layer1": math.nan}])
def test_a_missing_ratio_and_one_that_is_no_number_are_refused(
    bad: dict[str, float], make_chain: Callable[..., Problem]
) -> None:
    with pytest.raises(PolicyError, match="'layer1' needs a finite ratio"):
        project(make_chain(2), bad, 0.5)


@st.composite
def problems_with_blocks(draw):
    """Groups some of which may be removed whole, in a chain whose cost is a sum of products plus a constant."""
    sizes = draw(st.lists(st.integers(2, 24), min_size=2, max_size=5))
    groups = tuple(
        Group(f"g{i}", n, ((0,) if draw(st.booleans()) else ()) + feasible_widths(n, max_ratio=0.8))
        for i, n in enumerate(sizes)
    )
    names = tuple(g.name for g in groups)
    forms = [Form(0, ((i, 1),)) for i in range(len(sizes))]
    macs = (Term(50), *(Term(7, (form,)) for form in forms), *(Term(2, pair) for pair in pairwise(forms)))
    model = CostModel(names, tuple(sizes), macs, macs, macs)
    problem = Problem(groups, model, resolve_budget({}, model, groups), ("l1",))
    ratios = {g.name: draw(st.floats(0.0, 1.0)) for g in groups}
    low, high = problem.budget.span
    return problem, ratios, draw(st.floats(low, high)), draw(st.floats(low, high))


@given(problems_with_blocks())
def test_blocks_that_are_proposed_to_go_stay_away_while_others_can_grow(drawn):
    problem, ratios, a, b = drawn
    projector = Projector(problem)
    dense = problem.cost_model.cost("macs", {})
    widths = projector.project(ratios, a)
    assert problem.cost_model.cost("macs", widths) <= a * dense + 1e-6
    gone = [g for g in problem.groups if g.widths[0] == 0 and g.width(ratios[g.name]) == 0]
    others = [g for g in problem.groups if g not in gone]
    if any(widths[g.name] > 0 for g in gone):
        assert all(widths[g.name] == g.widths[-1] for g in others)
    again = projector.project({g.name: g.ratio(widths[g.name]) for g in problem.groups}, a)
    assert again == widths
    costs = [problem.cost_model.cost("macs", projector.project(ratios, target)) for target in sorted((a, b))]
    assert costs[0] <= costs[1]


def test_costs_that_are_spread_over_a_batch_never_exceed_the_budget(make_chain):
    """Their shares are rounded one by one, so that growth step by step may miss the limit by one."""
    rng, projected = np.random.default_rng(0), 0
    for _ in range(12):
        problem = make_chain(6, size=16, front=(0.2, 0.6))
        width = [Form(0, ((i, 1),)) for i in range(6)]
        pairs = [(width[i], width[(i + 2) % 6]) for i in range(6)]
        shared = tuple(Term(int(rng.integers(1, 9)), pair, int(rng.integers(2, 7))) for pair in pairs)
        model = replace(problem.cost_model, macs=problem.cost_model.macs + shared)
        budget = resolve_budget({"macs": 0.6}, model, problem.groups, front=(0.2, 0.6))
        projector = Projector(replace(problem, cost_model=model, budget=budget))
        for _ in range(20):
            ratios = {group.name: float(rng.uniform(0, 0.9)) for group in problem.groups}
            for target in (0.6, None, 0.35):
                assert budget.within(model.costs(projector.project(ratios, target)))
                projected += 1
    assert projected == 720
