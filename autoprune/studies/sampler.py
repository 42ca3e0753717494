"""How policies look to Optuna, and the sampler that keeps every proposal within the budget.

Decides the names and ranges of the parameters and wraps any Optuna sampler so that `trial.params` are the ratios really
used. Knows nothing of studies' contents, storages or evaluations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autoprune.budget import key_of
from autoprune.errors import InputError, PolicyError, nearest
from autoprune.policy import Choice, Group, Policy
from autoprune.results import Problem
from autoprune.studies.projection import Projector, nearest_width
from autoprune.studies.tpe import BatchTPE

RATIO = "ratio/"
CRITERION = "criterion/"
ACTIVATION = "activation/"
TARGET = "target/"


def search_space(problem: Problem) -> dict[str, BaseDistribution]:
    """Returns the parameters of a trial; what has only one value is left out.

    `target/<key>` is the fraction of the dense primary cost that the policy reaches, `ratio/<group>` the fraction of
    the group's channels that go, `criterion/<scope>` what ranks the channels of the scope's groups,
    `activation/<scope>/<kind>` what stands in the place of the scope's activations of that kind.
    """
    space: dict[str, BaseDistribution] = {}
    low, high = problem.budget.span
    if low < high:
        space[TARGET + key_of(problem.budget.primary)] = FloatDistribution(low, high, log=True)
    for group in problem.groups:
        if len(group.widths) > 1:
            space[RATIO + group.name] = FloatDistribution(group.ratio(group.widths[-1]), group.ratio(group.widths[0]))
    for scope in _open_scopes(problem):
        space[CRITERION + scope] = CategoricalDistribution(problem.criteria)
    for place, kinds in problem.activations.items():
        if len(kinds) > 1:
            space[ACTIVATION + place] = CategoricalDistribution(kinds)
    return space


def params_of(problem: Problem, policy: Policy) -> dict[str, Any]:
    """Returns the parameters that stand for `policy`, its ratios moved to the nearest feasible widths.

    Raises:
        PolicyError: The policy misses a group, names an unknown group, criterion or activation, or mixes criteria
            within a scope.
    """
    widths = widths_of(problem, policy)
    params: dict[str, Any] = {}
    low, high = problem.budget.span
    if low < high:
        primary = problem.budget.primary
        fraction = problem.fraction({primary: problem.cost_model.cost(primary, widths)})
        params[TARGET + key_of(primary)] = min(max(fraction, low), high)
    for group in problem.groups:
        if len(group.widths) > 1:
            params[RATIO + group.name] = group.ratio(widths[group.name])
    for scope in _open_scopes(problem):
        params[CRITERION + scope] = _criterion(problem, policy, scope, widths)
    for place, kind in _activations(problem, policy).items():
        if len(problem.activations[place]) > 1:
            params[ACTIVATION + place] = kind
    return params


def widths_of(problem: Problem, policy: Policy) -> dict[str, int]:
    """Returns the width of every group, as `Policy.widths` does.

    Raises:
        PolicyError: The policy misses a group, names one that does not exist, or removes one whole that must stay.
    """
    names = {group.name for group in problem.groups}
    if policy.choices.keys() != names:
        return policy.widths(problem.groups)  # says what is wrong
    for group in problem.groups:
        group.check(policy.choices[group.name].ratio)
    return {g.name: nearest_width(g, g.size * (1.0 - policy.choices[g.name].ratio)) for g in problem.groups}


def policy_of(problem: Problem, params: Mapping[str, Any]) -> Policy:
    """Returns the policy that `params` stand for; parameters that have only one value may be missing.

    Raises:
        PolicyError: A parameter that has several values is missing.
    """
    scopes = _open_scopes(problem)
    try:
        activations = {
            place: params[ACTIVATION + place] if len(kinds) > 1 else kinds[0]
            for place, kinds in problem.activations.items()
        }
        return Policy({group.name: _choice(problem, group, params, scopes) for group in problem.groups}, activations)
    except KeyError as error:
        raise PolicyError(f"the parameter {error.args[0]!r} is missing") from error


def _choice(problem: Problem, group: Group, params: Mapping[str, Any], scopes: Sequence[str]) -> Choice:
    ratio = params[RATIO + group.name] if len(group.widths) > 1 else 0.0
    criterion = params[CRITERION + group.scope] if group.scope in scopes else problem.criteria[0]
    return Choice(criterion, group.ratio(nearest_width(group, group.size * (1.0 - ratio))))


def _open_scopes(problem: Problem) -> list[str]:
    """Returns the scopes whose criterion makes a difference."""
    if len(problem.criteria) < 2:
        return []
    return list(dict.fromkeys(g.scope for g in problem.groups if g.widths != (g.size,)))


def _activations(problem: Problem, policy: Policy) -> dict[str, str]:
    for place, kind in policy.activations.items():
        if place not in problem.activations:
            raise PolicyError(f"no activation {place!r} is searched{nearest(place, problem.activations)}")
        if kind not in problem.activations[place]:
            raise PolicyError(f"unknown activation {kind!r} for {place!r}{nearest(kind, problem.activations[place])}")
    return problem.default_activations | dict(policy.activations)


def _criterion(problem: Problem, policy: Policy, scope: str, widths: Mapping[str, int]) -> str:
    groups = [group for group in problem.groups if group.scope == scope]
    pruned = [group for group in groups if widths[group.name] < group.size]
    found = {policy.choices[group.name].criterion for group in pruned or groups[:1]}
    if len(found) > 1:
        raise PolicyError(f"the policy mixes the criteria {sorted(found)} within the scope {scope!r}")
    criterion = found.pop()
    if criterion not in problem.criteria:
        if not pruned:  # nothing is ranked
            return problem.criteria[0]
        raise PolicyError(f"unknown criterion {criterion!r}{nearest(criterion, problem.criteria)}")
    return criterion


class BudgetSampler(BaseSampler):
    """Wraps a sampler and projects each of its proposals onto the budget before the trial sees it.

    What the inner sampler does not propose jointly is sampled independently, then all ratios are projected together.
    Parameters that were enqueued stay as they are. Like its inner sampler it belongs to one study and is not safe for
    concurrent use by several threads.
    """

    def __init__(self, inner: BaseSampler, problem: Problem) -> None:
        self._inner = inner
        self._problem = problem
        self._space = search_space(problem)
        self._projector = Projector(problem)

    def __str__(self) -> str:
        return f"BudgetSampler({self._inner})"

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Returns every parameter: all of them are decided together."""
        return dict(self._space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Returns a proposal of the inner sampler, projected onto the budget.

        Raises:
            BudgetError: No policy meets the budget.
        """
        inferred = self._inner.infer_relative_search_space(study, trial)
        joint = {name: dist for name, dist in inferred.items() if self._space.get(name) == dist}
        proposed = {k: v for k, v in self._inner.sample_relative(study, trial, joint).items() if k in self._space}
        for name, distribution in self._space.items():
            if name not in proposed:
                proposed[name] = self._inner.sample_independent(study, trial, name, distribution)
        return self._projected(proposed)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Returns what the inner sampler says: only parameters that are none of ours come here."""
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Tells the inner sampler, and counts enqueued trials into the population of a genetic one.

        Optuna's NSGA-II numbers the generation of a trial when it samples for it; an enqueued trial has none and would
        never become a parent.
        """
        self._inner.before_trial(study, trial)
        if isinstance(self._inner, optuna.samplers.BaseGASampler) and "fixed_params" in trial.system_attrs:
            self._inner.get_trial_generation(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Tells the inner sampler."""
        self._inner.after_trial(study, trial, state, values)

    def restart(self, inner: BaseSampler) -> None:
        """Puts another sampler in the place of the inner one."""
        self._inner = inner

    def reseed_rng(self) -> None:
        """Reseeds the inner sampler."""
        self._inner.reseed_rng()

    def _projected(self, proposed: Mapping[str, Any]) -> dict[str, Any]:
        low, high = self._problem.budget.span
        target = TARGET + key_of(self._problem.budget.primary)
        ratios = {group.name: proposed.get(RATIO + group.name, 0.0) for group in self._problem.groups}
        widths = self._projector.project(ratios, self._problem.budget.nearest(proposed.get(target, high)))
        projected = {name: value for name, value in proposed.items() if name.startswith((CRITERION, ACTIVATION))}
        for group in self._problem.groups:
            if len(group.widths) > 1:
                projected[RATIO + group.name] = group.ratio(widths[group.name])
        if target in self._space:
            projected[target] = min(max(self._projector.fraction(widths), low), high)
        return projected


def _tpe(seed: int) -> BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def _nsga2(seed: int) -> BaseSampler:
    # Optuna's population of 50 would make a first rung of 48 candidates a random search.
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=16)


def _random(seed: int) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


def _qmc(seed: int) -> BaseSampler:
    # Scrambled by the seed: a resumed search starts a new sequence instead of repeating the first one.
    return optuna.samplers.QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)


def _gp(seed: int) -> BaseSampler:
    return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)


AUTO = "auto"
"""The learned additive model, where there are error tables, and TPE for one of four candidates."""
LEARNED_ALONE = "learned"
"""The learned additive model, and TPE where it only repeats itself."""

RANDOM = "random"

SAMPLERS: Mapping[str, Callable[[int], BaseSampler]] = {
    AUTO: _tpe,
    LEARNED_ALONE: _tpe,
    "tpe": _tpe,
    "nsga2": _nsga2,
    "gp": _gp,
    RANDOM: _random,
    "qmc": _qmc,
}
"""Names of samplers → functions of a seed."""


def make_sampler(name: str, seed: int, batch: int = 1) -> BaseSampler:
    """Returns one of Optuna's samplers, set up for a search with two objectives; `batch` asks share a fit of TPE.

    Raises:
        InputError: There is no sampler of that name.
    """
    if name not in SAMPLERS:
        raise InputError(f"unknown sampler {name!r}{nearest(name, SAMPLERS)}")
    if batch > 1 and SAMPLERS[name] is _tpe:
        return BatchTPE(seed, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # QMCSampler, GPSampler
        return SAMPLERS[name](seed)
