"""The learned additive model: how much each group's table error really matters, found out from the trials so far.

Decides what the tables' solver proposes once trials are known. The tables say how much of a layer's output is lost at
each width, not what that does to the network's loss. A linear model, `loss = b + Σ_g a_g f_c table_g,c(width)`, with a
weight for each group and a factor for each criterion, is fitted to a rung's trials; its solution at a budget is the
next proposal. Knows nothing of Optuna or networks.

We fit the validation loss, not the accuracy: it orders policies alike and has less noise. Fitted on 60 trials of one
search and tried on those of another one (CIFAR-10, JPEG copy; 0.35 to 0.70 of the MACs), Kendall's τ between the model
and the loss is 0.87 to 0.90 for ResNet-56 with learned weights and 0.83 to 0.86 with equal ones; for ResNet-20, whose
tables leave less to learn, 0.87 to 0.88 and 0.86 to 0.89.

Source: the per-layer coefficients of Frantar and Alistarh, SPDY, ICML 2022, there found by local search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from autoprune.policy import Policy
from autoprune.results import Problem, TrialResult
from autoprune.studies.additive import AdditiveSolver, Curve, best_curves, policy_from_widths, scaled_curve

Tables = Mapping[str, Mapping[str, Curve]]
"""Group → criterion → error at each width that the group may take."""
Array = npt.NDArray[np.float64]

LEAST_TRIALS = 8
"""With fewer trials the weights are drawn from the prior alone."""
RIDGE = 0.7
"""Strength of the pull towards equal weights, in trials a group: every group adds a weight that noise can mislead.

Fitted on 12, 25, 50 or 60 trials of one search and tried on those of another one at the same MACs (errors on 2,000
images), mean Kendall's τ at 3, 10, 30 trials in all and with equal weights: ResNet-56 (27 groups, four pairs) 0.520,
0.538, 0.542 and 0.477; ResNet-20 (9 groups, two pairs) at 3, 6, 10 and with equal ones 0.521, 0.520, 0.531 and 0.526.
"""
FACTOR_RIDGE = 5.0
"""Strength of the pull of the criteria's factors towards 1."""
_PRIOR_SPREAD = 0.5
"""Standard deviation of the logarithm of a weight before anything is known."""
_FLOOR = 0.05
"""Least weight, relative to the common one: no group is free of charge."""
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Weights:
    """A fitted model: a weight for each group, a factor for each criterion."""

    groups: Mapping[str, float]
    factors: Mapping[str, float]


class LearnedAdditive:
    """Proposes the additive problem's solution under weights that are drawn from what the trials leave open.

    Each proposal fits the weights to a bootstrap sample of the trials (Thompson sampling), so that groups whose weight
    is not known well are explored, and solves at the next budget of a sequence that fills the span evenly. `done` is
    how many proposals were made before; one of `rest` candidates is to be left to a sampler (0: none).
    """

    def __init__(self, problem: Problem, tables: Tables, *, seed: int, done: int = 0, rest: int = 0) -> None:
        self.rest = rest
        self._problem = problem
        self._tables = tables
        self._solver = AdditiveSolver(problem)
        self._rng = np.random.default_rng([seed, done])
        self._number = done
        self._rows = _Rows(problem, tables)

    def propose(self, results: Sequence[TrialResult]) -> Policy:
        """Returns the next proposal, given the results of the rung so far.

        Raises:
            BudgetError: No policy meets the budget.
        """
        self._number += 1
        weights = self._draw(results)
        scaled = {
            group.name: {
                name: scaled_curve(curve, weights.groups[group.name] * weights.factors[name])
                for name, curve in self._tables[group.name].items()
                if name in self._problem.criteria
            }
            for group in self._problem.groups
        }
        chosen, curves = best_curves(self._problem, scaled)
        target = self._problem.budget.target(1.0 - _radical_inverse(self._number))
        return policy_from_widths(self._problem, self._solver.solve(curves, target), chosen)

    def _draw(self, results: Sequence[TrialResult]) -> Weights:
        rows = self._rows.of(results)
        if len(rows.losses) < LEAST_TRIALS:
            drawn = np.exp(_PRIOR_SPREAD * self._rng.standard_normal(len(self._problem.groups)))
            names = [group.name for group in self._problem.groups]
            return Weights(dict(zip(names, drawn.tolist(), strict=True)), dict.fromkeys(self._problem.criteria, 1.0))
        known = len(rows.losses)
        counts = self._rng.multinomial(known, np.full(known, 1.0 / known))
        return _fit(self._problem, rows, counts.astype(float))


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the model reads of results: table errors by group, the criterion's number of each group, the losses."""

    errors: Array
    used: npt.NDArray[np.int64]
    losses: Array


class _Rows:
    """Reads each result once: results are added while a rung runs, and a thousand of them take 5 to 10 ms."""

    def __init__(self, problem: Problem, tables: Tables) -> None:
        self._problem = problem
        self._tables = tables
        self._last: TrialResult | None = None
        self._count = 0
        self._parts: list[_Seen] = []

    def of(self, results: Sequence[TrialResult]) -> _Seen:
        """Returns the rows of all results whose loss is finite; `results` begin with those of the call before."""
        if self._count > len(results) or (self._count and results[self._count - 1] is not self._last):
            self._count, self._parts = 0, []  # they are others
        new = [r for r in results[self._count :] if math.isfinite(r.metrics.get("val_loss", math.nan))]
        self._parts.append(_seen(self._problem, self._tables, new))
        self._count, self._last = len(results), results[-1] if results else None
        if len(self._parts) > 1:
            seen = self._parts
            whole = (np.concatenate([getattr(part, name) for part in seen]) for name in ("errors", "used", "losses"))
            self._parts = [_Seen(*whole)]
        return self._parts[0]


def learned_model(problem: Problem, tables: Tables, seed: int, done: int) -> LearnedAdditive:
    """Returns the model that made `done` proposals before; a function that another process can be told to call."""
    return LearnedAdditive(problem, tables, seed=seed, done=done)


def fit_weights(
    problem: Problem, tables: Tables, results: Sequence[TrialResult], *, counts: Array | None = None
) -> Weights:
    """Fits the model to results, each of which counts `counts` times (once where none are given).

    Args:
        problem: Its groups and criteria.
        tables: Error curves of every group.
        results: At least two, with finite validation losses.
        counts: `(n,)`, not negative.

    Raises:
        ValueError: There are fewer than two results.
    """
    if len(results) < 2:
        raise ValueError(f"a fit needs at least two results, got {len(results)}")
    return _fit(problem, _seen(problem, tables, results), np.ones(len(results)) if counts is None else counts)


def table_errors(problem: Problem, tables: Tables, results: Sequence[TrialResult]) -> Array:
    """Returns the table errors of results, `(results, groups)`, by the criterion that each group was pruned by."""
    return _seen(problem, tables, results).errors


def _fit(problem: Problem, seen: _Seen, rows: Array) -> Weights:
    errors, used, losses = seen.errors, seen.used, seen.losses  # (n, G), (n, G), (n,)
    factors = np.ones(len(problem.criteria))
    weights = np.ones(len(problem.groups))
    for _ in range(_ROUNDS):
        scaled = errors * factors[used]
        weights, constant = _ridge(scaled, losses, rows, RIDGE * len(problem.groups))
        parts = np.stack([(errors * weights * (used == k)).sum(1) for k in range(len(factors))], 1)  # (n, criteria)
        factors = _factors(parts, losses - constant, rows)
    names = [group.name for group in problem.groups]
    return Weights(
        dict(zip(names, weights.tolist(), strict=True)), dict(zip(problem.criteria, factors.tolist(), strict=True))
    )


def _seen(problem: Problem, tables: Tables, results: Sequence[TrialResult]) -> _Seen:
    place = {name: k for k, name in enumerate(problem.criteria)}
    errors = np.empty((len(results), len(problem.groups)))
    used = np.empty(errors.shape, dtype=np.int64)
    for i, result in enumerate(results):
        for j, group in enumerate(problem.groups):
            criterion = result.policy.choices[group.name].criterion
            errors[i, j] = tables[group.name][criterion][result.widths[group.name]]
            used[i, j] = place[criterion]
    return _Seen(errors, used, np.array([result.metrics.get("val_loss", math.nan) for result in results]))


def _ridge(x: Array, y: Array, rows: Array, strength: float) -> tuple[Array, float]:
    """Returns weights `(G,)`, bounded from below, and the constant of `y ≈ x·a + b`, pulled towards equal weights.

    The pull is towards the slope of `y` over the plain sum of the errors.
    """
    total = rows.sum()
    mean_x, mean_y = rows @ x / total, rows @ y / total
    x, y = x - mean_x, y - mean_y
    plain = x.sum(1)
    common = max(float(rows @ (plain * y)), 1e-12) / max(float(rows @ plain**2), 1e-12)
    pull = strength * max(float(rows @ x**2 @ np.ones(x.shape[1])) / total / x.shape[1], 1e-18)
    gram = (x * rows[:, None]).T @ x + pull * np.eye(x.shape[1])
    weights = _bounded(gram, x.T @ (rows * y) + pull * common, _FLOOR * common)
    return weights, float(mean_y - mean_x @ weights)


def _factors(parts: Array, y: Array, rows: Array) -> Array:
    scale = max(float(rows @ parts**2 @ np.ones(parts.shape[1])) / rows.sum() / parts.shape[1], 1e-18)
    pull = FACTOR_RIDGE * scale
    gram = (parts * rows[:, None]).T @ parts + pull * np.eye(parts.shape[1])
    return _bounded(gram, parts.T @ (rows * y) + pull, _FLOOR)


def _bounded(gram: Array, right: Array, floor: float) -> Array:
    """Minimises `½ aᵀ gram a - rightᵀ a` over `a >= floor`, `gram` being positive definite."""
    factor = np.linalg.cholesky(gram)
    shifted = right - floor * gram.sum(1)
    above, _ = nnls(factor.T, np.linalg.solve(factor, shifted))
    return floor + np.asarray(above)


def _radical_inverse(number: int) -> float:
    """Returns the van der Corput sequence in base 2: 1/2, 1/4, 3/4, 1/8, ..."""
    value, weight = 0.0, 0.5
    while number:
        value += weight * (number & 1)
        number >>= 1
        weight /= 2
    return value
