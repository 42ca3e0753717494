"""Latency as a limit and as the front's axis: projection, additive solution, and what was measured as a constraint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage

from autoprune.budget import resolve_budget
from autoprune.cost import LATENCY, Form, Surface
from autoprune.policy import uniform_policy
from autoprune.results import Fidelity, Problem, TrialResult
from autoprune.studies.additive import AdditiveSolver
from autoprune.studies.mirror import Mirror
from autoprune.studies.projection import Projector
from autoprune.studies.records import constraint_attrs, measured_excess
from autoprune.studies.study import open_study
from autoprune.studies.warmstart import uniform


def timed(problem: Problem, budget: dict[str, Any]) -> Problem:
    """A problem whose layers also have measured times: planes that bend at half the width, and a constant."""
    width = [Form(0, ((i, 1),)) for i in range(len(problem.groups))]
    size = problem.groups[0].size
    knots = (2, size // 2, size)
    surfaces = [Surface((), (), (700,))]
    for place, (a, b) in enumerate(pairwise(width)):
        values = tuple(50 + 40 * i + 30 * j + (5 + place) * i * j for i in (1, 3, 9) for j in (1, 2, 4))
        surfaces.append(Surface((a, b), (knots, knots), values))
    model = replace(problem.cost_model, latency=tuple(surfaces))
    return replace(problem, cost_model=model, budget=resolve_budget(budget, model, problem.groups))


BUDGETS = ({"latency": 0.6}, {"macs": 0.7, "latency": 0.75}, {"latency": 0.8, "memory": 0.9, "params": 0.8})


@pytest.fixture(params=BUDGETS, ids=lambda budget: "+".join(budget))
def problem(request: pytest.FixtureRequest, make_chain: Callable[..., Problem]) -> Problem:
    return timed(make_chain(6), request.param)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_projection_meets_the_limit_on_latency_and_is_its_own_projection(problem: Problem, data: Any) -> None:
    projector = Projector(problem)
    ratios = {g.name: data.draw(st.floats(0, 1)) for g in problem.groups}
    low, high = problem.budget.span
    targets = sorted(data.draw(st.lists(st.floats(low, high), min_size=2, max_size=2)))
    fractions = []
    for target in targets:
        widths = projector.project(ratios, target)
        assert problem.budget.within(problem.cost_model.costs(widths))
        assert projector.fraction(widths) <= target + 1e-9
        again = projector.project({g.name: g.ratio(widths[g.name]) for g in problem.groups}, projector.fraction(widths))
        assert again == widths
        fractions.append(projector.fraction(widths))
    assert fractions[0] <= fractions[1]


def test_the_additive_solution_is_within_the_limits_and_no_worse_than_uniform(problem: Problem) -> None:
    curves = {g.name: [(g.size - w) ** 2 * (1.0 + i) for w in range(g.size + 1)] for i, g in enumerate(problem.groups)}
    solver = AdditiveSolver(problem)
    for target in (0.5, 0.6):
        widths = solver.solve(curves, target)
        assert problem.budget.within(problem.cost_model.costs(widths))
        even = uniform(problem, problem.criteria[0], target).widths(problem.groups)
        assert solver.error(curves, widths) <= solver.error(curves, even) + 1e-9


def result_of(problem: Problem, **metrics: float) -> TrialResult:
    policy = uniform_policy(problem.groups, 0.5, problem.criteria[0])
    widths = policy.widths(problem.groups)
    costs = problem.cost_model.costs(widths)
    return TrialResult(policy, "id", Fidelity("tune"), widths, costs, {"val_accuracy": 0.5, **metrics})


def test_measured_latency_and_memory_become_constraints_of_their_own(make_chain: Callable[..., Problem]) -> None:
    problem = timed(make_chain(4), {"latency": 0.8, "memory": 0.9})
    limits = problem.budget.limits
    limit_ms = limits[LATENCY] / 1e6
    plain = constraint_attrs(problem, result_of(problem))
    assert set(plain) == {"constraints", "constraints:latency_ns", "constraints:activation_bytes"}
    found = constraint_attrs(
        problem,
        result_of(problem, latency_least_ms=1.5 * limit_ms, peak_memory_bytes=0.5 * limits["activation_bytes"]),
    )
    assert found["constraints:latency_measured"] == pytest.approx(0.5)
    assert found["constraints:memory_measured"] == pytest.approx(-0.5)
    assert sorted(found["constraints"]) == sorted(v for k, v in found.items() if k != "constraints")
    assert measured_excess(problem, result_of(problem, latency_least_ms=float("nan"))) == {}
    unlimited = make_chain(4)
    assert measured_excess(unlimited, result_of(unlimited, latency_least_ms=9.0, peak_memory_bytes=9e9)) == {}


def test_a_sampler_is_told_what_was_measured_and_told_again_on_resume(make_chain: Callable[..., Problem]) -> None:
    problem = timed(make_chain(4), {"latency": 0.8})
    study = open_study(InMemoryStorage(), "s.tune", problem, fingerprint="f", settings={})
    mirror = Mirror(problem, study, sampler="tpe", seed=0)
    _, trial, _ = mirror.propose()
    mirror.tell(trial, (0.5, 0.5), {"latency_measured": 0.25})
    assert mirror._study.trials[-1].constraints == {"latency_measured": 0.25}
    study.add_trial(
        replace_trial(mirror._study.trials[-1], constraint_attrs(problem, result_of(problem, latency_least_ms=9.0)))
    )
    resumed = Mirror(problem, study, sampler="tpe", seed=0)
    assert set(resumed._study.trials[-1].constraints) == {"latency_measured"}


def replace_trial(trial: Any, attrs: dict[str, Any]) -> Any:
    import optuna

    return optuna.trial.create_trial(
        values=trial.values, params=trial.params, distributions=trial.distributions, system_attrs=attrs
    )
