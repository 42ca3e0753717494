"""Warm starts and controls: feasible, distinct, and what they say they are."""

from dataclasses import replace

import numpy as np
import pytest

from autoprune.errors import BudgetError
from autoprune.studies.warmstart import additive, control_policies, global_ranking, shallow, uniform, warm_starts


@pytest.fixture
def problem(make_chain):
    return make_chain(6, criteria=("l2", "taylor", "random"), scope=lambda name: name)


def learnt(problem, seed=0):
    rng = np.random.default_rng(seed)
    scores = {c: {g.name: rng.exponential(size=g.size) for g in problem.groups} for c in problem.criteria}
    tables = {
        g.name: {
            c: tuple(np.concatenate([np.cumsum(np.sort(scores[c][g.name]))[::-1], [0.0]]).tolist())
            for c in problem.criteria
        }
        for g in problem.groups
    }  # fmt: skip
    return scores, tables


def costs(problem, policy):
    return problem.costs(policy)["macs"] / problem.cost_model.cost("macs", {})


@pytest.mark.parametrize("target", [0.2, 0.35, 0.6])
def test_a_uniform_policy_has_nearly_the_same_ratio_everywhere_and_just_meets_the_target(problem, target):
    policy = uniform(problem, "taylor", target)
    ratios = [choice.ratio for choice in policy.choices.values()]
    assert max(ratios) - min(ratios) <= 2.01 / 16
    assert 0.85 * target < costs(problem, policy) <= target
    assert {choice.criterion for choice in policy.choices.values()} == {"taylor"}


@pytest.mark.parametrize("target", [0.2, 0.35, 0.6])
def test_a_global_ranking_meets_the_target_and_prunes_the_low_scores(problem, target):
    scores, _ = learnt(problem)
    scores["l2"]["layer2"] = scores["l2"]["layer2"] * 0.01
    policy = global_ranking(problem, scores, "l2", target)
    assert 0.85 * target < costs(problem, policy) <= target
    ratios = {name: choice.ratio for name, choice in policy.choices.items()}
    assert ratios["layer2"] == max(ratios.values())


@pytest.mark.parametrize("criterion", [None, "taylor"])
def test_the_additive_start_meets_the_target(problem, criterion):
    _, tables = learnt(problem)
    policy = additive(problem, tables, 0.4, criterion=criterion)
    assert 0.85 * 0.4 < costs(problem, policy) <= 0.4
    if criterion:
        assert {choice.criterion for choice in policy.choices.values()} == {criterion}


def test_a_target_that_no_policy_meets_is_refused(problem):
    scores, tables = learnt(problem)
    for call in (
        lambda: uniform(problem, "l2", 1e-4),
        lambda: global_ranking(problem, scores, "l2", 1e-4),
        lambda: additive(problem, tables, 1e-4),
    ):
        with pytest.raises(BudgetError):
            call()


@pytest.mark.parametrize("count", [0, 1, 2, 5, 12, 20])
def test_warm_starts_are_feasible_distinct_and_at_most_as_many_as_asked_for(problem, count):
    scores, tables = learnt(problem)
    starts = warm_starts(problem, scores, tables, count=count)
    assert len(starts) <= count
    assert len(starts) >= 0.8 * count
    assert len({start.policy.id for start in starts}) == len(starts)
    assert all(problem.budget.within(problem.costs(start.policy)) for start in starts)
    assert all(costs(problem, start.policy) <= problem.budget.span[1] for start in starts)


def test_warm_starts_are_of_every_kind_and_no_heuristic_uses_the_random_criterion(problem):
    scores, tables = learnt(problem)
    origins = [start.origin for start in warm_starts(problem, scores, tables, count=12)]
    kinds = [origin.partition("-")[0] for origin in origins]
    assert set(kinds) == {"additive", "uniform", "global"}
    assert 6 <= kinds.count("additive") <= 8
    assert not any("random" in origin for origin in origins)


def test_the_first_three_starts_are_additive_and_stand_at_both_ends_and_the_middle_of_the_span(problem):
    """Whoever stops a search after a handful of candidates has a front."""
    starts = warm_starts(problem, *learnt(problem), count=20)
    assert all(start.origin.startswith("additive") for start in starts[:12])
    at = sorted(costs(problem, start.policy) for start in starts[:3])
    assert at == pytest.approx([0.2, (0.2 * 0.6) ** 0.5, 0.6], rel=0.15)
    assert len({start.origin for start in starts[:3]}) == 3, "and they go over the criteria"


def test_a_larger_target_never_gives_an_additive_start_with_a_larger_error(problem):
    scores, tables = learnt(problem)
    starts = [s for s in warm_starts(problem, scores, tables, count=40) if s.origin == "additive-taylor"]
    starts.sort(key=lambda start: costs(problem, start.policy))
    errors = [
        sum(tables[name]["taylor"][width] for name, width in start.policy.widths(problem.groups).items())
        for start in starts
    ]
    assert len(errors) > 4
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("criteria", [("l2", "obs_greedy"), ("obs_greedy", "l1", "random"), ("l1", "l2")])
def test_the_tables_choice_comes_first_at_every_target_where_obs_greedy_may_be_chosen(make_chain, criteria):
    problem = make_chain(6, criteria=criteria, scope=lambda name: name)
    starts = [s for s in warm_starts(problem, *learnt(problem), count=20) if s.origin.startswith("additive")]
    first, rest = starts[:6], starts[6:]
    shares = [costs(problem, start.policy) for start in first]
    assert len({round(share, 2) for share in shares}) == len(shares)  # one at each of six targets
    if "obs_greedy" in criteria:
        assert {start.origin for start in first} == {"additive"}
        assert all(start.origin != "additive" for start in rest)
    else:
        assert {start.origin for start in first} == {"additive", "additive-l1", "additive-l2"}


def test_warm_starts_hold_every_limit_of_the_budget(make_chain):
    problem = make_chain(5, budget={"macs": 0.6, "params": 0.3, "memory": 0.5})
    scores, tables = learnt(problem)
    starts = [*warm_starts(problem, scores, tables, count=12), *control_policies(problem, scores, count=6)]
    assert all(problem.budget.within(problem.costs(start.policy)) for start in starts)


def test_a_single_criterion_named_random_still_gives_starts(make_chain):
    problem = make_chain(4, criteria=("random",))
    assert len(warm_starts(problem, *learnt(problem), count=6)) >= 4


KINDS = ("uniform l2", "global l2", "random ratios l2", "global taylor")


@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_controls_are_uniform_global_by_each_criterion_and_random_ratios(problem, count):
    scores, _ = learnt(problem)
    starts = control_policies(problem, scores, count=count)
    assert len(starts) == count
    assert tuple(start.origin for start in starts[:4]) == KINDS[:count]
    assert {start.origin for start in starts[4:]} <= {"uniform l2", "global l2"}
    assert len({start.policy.id for start in starts}) == len(starts)
    assert all(problem.budget.within(problem.costs(start.policy)) for start in starts)


def test_the_first_controls_stand_at_the_budget_and_the_others_below_it(problem):
    scores, _ = learnt(problem)
    at = [costs(problem, start.policy) for start in control_policies(problem, scores, count=8)]
    assert all(0.5 < cost <= 0.6 for cost in at[:4])
    assert all(0.2 < cost < 0.5 for cost in at[4:])
    assert len({round(cost, 1) for cost in at[4:]}) > 1


def test_random_controls_differ_with_the_seed_and_stay_the_same_without(problem):
    scores, _ = learnt(problem)
    drawn = [control_policies(problem, scores, count=3, seed=seed)[2].policy.id for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_controls_use_the_first_criterion_where_there_is_no_weight_norm(make_chain):
    problem = make_chain(4, criteria=("taylor", "obs"))
    scores, _ = learnt(problem)
    origins = [start.origin for start in control_policies(problem, scores, count=4)]
    assert origins == ["uniform taylor", "global taylor", "random ratios taylor", "global obs"]


def test_the_same_input_gives_the_same_starts(problem):
    assert warm_starts(problem, *learnt(problem), count=8) == warm_starts(problem, *learnt(problem), count=8)


def deep(problem, names):
    groups = [replace(g, widths=(0, *g.widths)) if g.name in names else g for g in problem.groups]
    return replace(problem, groups=tuple(groups))


def test_a_shallow_start_removes_the_cheapest_groups_whole_and_leaves_the_others(problem):
    _, tables = learnt(problem)
    able = deep(problem, {"layer1", "layer3", "layer4"})
    for name, error in (("layer1", 0.5), ("layer3", 0.01), ("layer4", 0.3)):
        tables[name] = {c: (error, *tables[name][c][1:]) for c in problem.criteria}
    policy = shallow(able, tables, 0.6, "l2")
    widths = policy.widths(able.groups)
    assert costs(able, policy) <= 0.6
    assert widths["layer3"] == 0
    whole = {g.name: g.size for g in problem.groups}
    assert sum(width not in (0, whole[name]) for name, width in widths.items()) <= 1
    assert widths["layer1"] == whole["layer1"] or widths["layer4"] == 0


def test_a_shallow_start_needs_groups_that_may_go_and_enough_of_them(problem):
    _, tables = learnt(problem)
    assert shallow(problem, tables, 0.6, "l2") is None
    assert shallow(deep(problem, {"layer3"}), tables, 0.15, "l2") is None


def test_searches_of_depth_begin_with_shallow_policies_among_the_others(problem):
    scores, tables = learnt(problem)
    able = deep(problem, {"layer1", "layer3", "layer4"})
    kinds = [start.origin for start in warm_starts(able, scores, tables, count=12)]
    assert sum(kind.startswith("shallow") for kind in kinds) == 2
    assert kinds[0].startswith("additive")
    assert {kind.split("-")[0] for kind in kinds} == {"additive", "shallow", "uniform", "global"}
    assert not any("shallow" in start.origin for start in warm_starts(problem, scores, tables, count=12))
