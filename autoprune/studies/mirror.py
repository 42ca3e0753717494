"""The study in memory that a sampler learns from.

Decides what the sampler sees of a rung's stored trials. Optuna writes every parameter in a transaction of its own, 66
of them take over 100 ms on SQLite; here an ask costs what the sampler costs and the finished trial is stored whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import optuna
from optuna.study import Study, StudyDirection
from optuna.trial import Trial, TrialState

from autoprune.policy import Policy
from autoprune.results import Problem
from autoprune.studies.records import DRAW, kept_attrs, measured_constraints
from autoprune.studies.sampler import RANDOM, BudgetSampler, make_sampler, params_of, policy_of, search_space

_SEED_STRIDE = 1_000_003
_SEEDS = 2**31


class Mirror:
    """Proposes policies within the budget and learns from what became of them.

    A resumed search goes on with a seed that depends on how much is stored, so that it does not propose the same again.
    The sampler `random` learns from nothing: its k-th proposal depends on the seed and k alone, and a resumed search
    makes those that are not stored, so that it tries the same policies however often it was stopped, in any order.
    `batch` proposals of TPE come from one fit.
    """

    def __init__(self, problem: Problem, stored: Study, *, sampler: str, seed: int, batch: int = 1) -> None:
        self._problem = problem
        self._space = search_space(problem)
        self._seed = seed
        finished = stored.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        seed = (seed + _SEED_STRIDE * len(stored.get_trials(deepcopy=False))) % _SEEDS
        self._sampler = BudgetSampler(make_sampler(sampler, seed, batch), problem)
        self._random = BudgetSampler(make_sampler("random", seed), problem)
        self._draws: Iterator[int] | None = None
        if sampler == RANDOM:
            drawn = {trial.user_attrs.get(DRAW) for trial in stored.get_trials(deepcopy=False)}
            self._draws = (number for number in itertools.count() if number not in drawn)
        directions = [StudyDirection.MINIMIZE, StudyDirection.MINIMIZE]
        self._study = optuna.create_study(directions=directions, sampler=self._sampler)
        for trial in finished:
            self._study.add_trial(
                optuna.trial.create_trial(
                    values=trial.values,
                    params=trial.params,
                    distributions=trial.distributions,
                    system_attrs=kept_attrs(trial.system_attrs) | measured_constraints(trial.system_attrs),
                )
            )

    def adopt(self, policy: Policy) -> Trial:
        """Begins a trial of a policy that comes from elsewhere."""
        self._study.enqueue_trial(params_of(self._problem, policy))
        return self._study.ask(self._space)

    def propose(self, *, at_random: bool = False) -> tuple[Policy, Trial, int | None]:
        """Begins a trial of a policy that the sampler proposes, or at random where the sampler only repeats itself.

        Returns:
            The policy, the trial, and the number of the draw where the sampler is `random`.
        """
        draw = None
        if self._draws is not None:
            draw = next(self._draws)
            self._sampler.restart(make_sampler(RANDOM, (self._seed + _SEED_STRIDE * (draw + 1)) % _SEEDS))
        self._study.sampler = self._random if at_random and draw is None else self._sampler
        trial = self._study.ask(self._space)
        return policy_of(self._problem, trial.params), trial, draw

    def tell(
        self, trial: Trial, values: tuple[float, float] | None, measured: Mapping[str, float] | None = None
    ) -> None:
        """Finishes a trial with its objectives; None: it failed. `measured` are the violations of what was measured."""
        self._study.sampler = self._sampler
        for name, violation in (measured or {}).items():
            trial.set_constraint(name, violation)
        if values is None:
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, list(values))

    def notes(self, trial: Trial) -> Mapping[str, Any]:
        """Returns what the sampler noted about a trial."""
        return self._study._storage.get_trial_system_attrs(trial._trial_id)
