"""Every inner sampler proposes within the budget, and parameters stand for policies one to one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import optuna
import pytest

from autoprune.errors import InputError, PolicyError
from autoprune.policy import Choice, Policy, uniform_policy
from autoprune.results import Problem
from autoprune.studies import SAMPLERS, BudgetSampler, make_sampler, params_of, policy_of, search_space
from autoprune.studies.warmstart import uniform

Chain = Callable[..., Problem]


def study_with(sampler: optuna.samplers.BaseSampler, problem: Problem) -> optuna.Study:
    return optuna.create_study(directions=["minimize", "minimize"], sampler=BudgetSampler(sampler, problem))


def run(study: optuna.Study, problem: Problem, count: int) -> None:
    for _ in range(count):
        trial = study.ask(search_space(problem))
        error = sum(v for k, v in trial.params.items() if k.startswith("ratio/layer1"))
        study.tell(trial, [error, trial.params["target/macs"]])


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.mark.parametrize("name", [*SAMPLERS, "tpe-independent"])
def test_parameters_are_the_ratios_really_used_and_within_every_limit(name: str, make_chain: Chain) -> None:
    problem = make_chain(5, budget={"macs": 0.6, "params": 0.4, "memory": 0.7}, scope=lambda group: group)
    inner = optuna.samplers.TPESampler(seed=1) if name == "tpe-independent" else make_sampler(name, 1)
    study = study_with(inner, problem)
    count = 11 if name == "gp" else 40  # it begins to learn after ten, and takes its time
    run(study, problem, count)
    fractions = set()
    for trial in study.trials:
        policy = policy_of(problem, trial.params)
        costs = problem.costs(policy)
        assert problem.budget.within(costs)
        assert params_of(problem, policy) == trial.params
        fractions.add(costs["macs"] / problem.cost_model.dense()["macs"])
    assert min(fractions) < 0.35
    assert len(fractions) > count / 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seed_proposes_the_same(name: str, make_chain: Chain) -> None:
    problem = make_chain(3)
    seen = []
    for _ in range(2):
        study = study_with(make_sampler(name, 7), problem)
        run(study, problem, 12)
        seen.append([trial.params for trial in study.trials])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", SAMPLERS)
def test_enqueued_parameters_go_through_unchanged(name: str, make_chain: Chain) -> None:
    problem = make_chain(3)
    study = study_with(make_sampler(name, 0), problem)
    params = params_of(problem, uniform_policy(problem.groups, 0.75, "taylor"))
    study.enqueue_trial(params)
    assert study.ask(search_space(problem)).params == params


def test_enqueued_trials_become_parents_of_the_genetic_sampler(make_chain: Chain) -> None:
    problem = make_chain(3)
    study = study_with(optuna.samplers.NSGAIISampler(seed=0, population_size=4), problem)
    for ratio in (0.4, 0.5, 0.6, 0.7):
        study.enqueue_trial(params_of(problem, uniform_policy(problem.groups, ratio, "l2")))
    run(study, problem, 12)
    generations = [trial.system_attrs["NSGAIISampler:generation"] for trial in study.trials]
    assert generations == [0] * 4 + [1] * 4 + [2] * 4


def test_what_has_one_value_only_is_no_parameter(make_chain: Chain) -> None:
    problem = make_chain(2, criteria=("l2",), front=(0.4, 0.4))
    assert sorted(search_space(problem)) == ["ratio/layer0", "ratio/layer1"]
    wide = make_chain(2, round_to=16, budget={"macs": 1.0}, front=(1.0, 1.0))  # only the dense width remains
    assert search_space(wide) == {}
    assert policy_of(wide, {}) == Policy({g.name: Choice("l2", 0.0) for g in wide.groups})


def test_criteria_belong_to_scopes(make_chain: Chain) -> None:
    problem = make_chain(4, scope=lambda name: "early" if name < "layer2" else "late")
    assert [k for k in search_space(problem) if k.startswith("criterion/")] == ["criterion/early", "criterion/late"]
    choices = {f"layer{i}": Choice("l2" if i < 2 else "taylor", 0.5) for i in range(4)}
    params = params_of(problem, Policy(choices))
    assert (params["criterion/early"], params["criterion/late"]) == ("l2", "taylor")
    assert policy_of(problem, params) == Policy(choices)
    with pytest.raises(PolicyError, match="mixes the criteria"):
        params_of(problem, Policy({**choices, "layer0": Choice("taylor", 0.5)}))


def test_an_unpruned_group_does_not_decide_the_criterion(make_chain: Chain) -> None:
    problem = make_chain(2)
    policy = Policy({"layer0": Choice("l2", 0.0), "layer1": Choice("taylor", 0.5)})
    assert params_of(problem, policy)["criterion/model"] == "taylor"


def test_unknown_names_are_refused_with_the_nearest_valid_one(make_chain: Chain) -> None:
    problem = make_chain(2)
    with pytest.raises(InputError, match="did you mean 'nsga2'"):
        make_sampler("nsga3", 0)
    with pytest.raises(PolicyError, match="did you mean 'taylor'"):
        params_of(problem, uniform_policy(problem.groups, 0.5, "tailor"))
    with pytest.raises(PolicyError, match="'ratio/layer1' is missing"):
        policy_of(problem, {"ratio/layer0": 0.5, "criterion/model": "l2"})


def test_activations_are_categorical_parameters_and_survive_the_way_to_a_policy_and_back(make_chain: Chain) -> None:
    problem = make_chain(3)
    searched = replace(problem, activations={"model/relu": ("relu", "relu6"), "model/silu": ("hardswish",)})
    space = search_space(searched)
    assert tuple(space["activation/model/relu"].choices) == ("relu", "relu6")
    assert "activation/model/silu" not in space, "there is nothing to choose"
    plain = uniform(searched, searched.criteria[0], searched.budget.span[1])
    assert plain.activations == {"model/relu": "relu", "model/silu": "hardswish"}
    params = params_of(searched, plain) | {"activation/model/relu": "relu6"}
    policy = policy_of(searched, params)
    assert policy.activations["model/relu"] == "relu6"
    assert params_of(searched, policy)["activation/model/relu"] == "relu6"
    assert "activation/model/relu" not in search_space(problem)
    with pytest.raises(PolicyError, match="no activation 'model/relu' is searched"):
        params_of(problem, policy)
    wrong = Policy(policy.choices, {"model/relu": "relu7"})
    with pytest.raises(PolicyError, match="unknown activation 'relu7' for 'model/relu'; did you mean"):
        params_of(searched, wrong)


def test_proposals_hold_an_activation_of_each_place(make_chain: Chain) -> None:
    problem = make_chain(3)
    searched = replace(problem, activations={"a/relu": ("relu", "relu6"), "b/relu": ("relu", "relu6")})
    study = study_with(make_sampler("random", 0), searched)
    asked = [policy_of(searched, study.ask(search_space(searched)).params) for _ in range(20)]
    seen = {tuple(policy.activations.values()) for policy in asked}
    assert len(seen) == 4
