"""Where the time of a search goes, before it is begun: preparation, trials and bookkeeping, beside the least possible.

Decides which policy stands for all (uniform, at the upper end of the budget) and what is timed in which order. Nothing
is stored but the caches that a search would fill, and the traces.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from autoprune import report, studies
from autoprune.coordinator.running.fidelity import fidelity_of_rung
from autoprune.coordinator.stored.places import make_home
from autoprune.network import preparing, profiling, settings
from autoprune.network.devices.device import device_name, resolve_device
from autoprune.network.workbench import Workbench
from autoprune.network.workers import threads_of
from autoprune.policy import Policy
from autoprune.report.console import terminal
from autoprune.results import Fidelity, Problem, TrialResult
from autoprune.space import Space
from autoprune.studies import LadderPlan, RungPlan
from autoprune.studies.warmstart import control_policies

Value = TypeVar("Value")
_CANDIDATES = 30
"""Trials of a search that evaluates nothing, to time what is around an evaluation."""


def profile_space(space: Space, *, home: Path, repeats: int, steps: int) -> tuple[str, dict[str, Any]]:
    """Times the preparation and one trial of each kind of rung; returns a table as text and as JSON values.

    Args:
        space: The settings.
        home: Folder of the caches; traces go to `profile/` in it.
        repeats: Trials and bare loops of each kind; their medians count.
        steps: Training steps that are really run in a trial, at most; the rest is scaled.

    Raises:
        InputError: The model or the data cannot be used, or `home` cannot be written.
    """
    make_home(home)
    with report.Progress() as progress:
        note, preparation = progress.note, dict[str, tuple[float, float]]()
        clock = profiling.clock_of(resolve_device(space.device))

        def timed(name: str, call: Callable[[], Value], floor: Callable[[Value], float] = lambda value: 0.0) -> Value:
            start = clock()
            value = call()
            preparation[name] = (clock() - start, floor(value))
            return value

        cache = home / "cache"
        ingredients = timed("data and model", lambda: preparing.ingredients_of(space, cache=cache))
        trace = timed(
            "trace",
            lambda: preparing.trace_ingredients(ingredients, space, cache=cache, note=note),
            lambda network: profiling.export_seconds(network, clock),
        )
        preparing.train_baseline(space, ingredients, cache=cache, note=note)
        bench = timed(
            "learning",
            lambda: preparing.workbench_of(space, ingredients, trace, cache=cache, models=None, note=note),
            profiling.calibration_seconds,
        )
        problem = settings.problem_of(trace, bench.groups, space)
        policy = control_policies(problem, bench.ranking(), count=1)[0].policy
        trials = []
        for fidelity in _kinds(space):
            note(f"timing {fidelity.rung}: {repeats} trials and as many bare loops")
            trials.append(profiling.profile_trial(bench, policy, fidelity, repeats=repeats, steps=steps))
            profiling.trace_trial(bench, policy, fidelity, trace_path(home, space, fidelity))
        note(f"timing the bookkeeping of {_CANDIDATES} candidates")
        around = bookkeeping_seconds(space, bench, problem, policy)
    paths = [str(trace_path(home, space, fidelity)) for fidelity in _kinds(space)]
    data = {
        "device": device_name(bench.device),
        "threads": threads_of(1),
        "groups": len(bench.groups),
        "preparation": [
            {"stage": name, "seconds": took, "floor": floor} for name, (took, floor) in preparation.items()
        ],
        "trials": [_trial_json(trial) for trial in trials],
        "bookkeeping_seconds": around,
        "traces": paths,
    }
    width, color = terminal()
    return report.render_profile(data, title=space.name, console_width=width, color=color).rstrip("\n"), data


def trace_path(home: Path, space: Space, fidelity: Fidelity) -> Path:
    """Returns the file of a rung's trace."""
    return home / "profile" / f"{space.name}-{fidelity.rung}.json.gz"


def _kinds(space: Space) -> list[Fidelity]:
    """Returns the first rung that trains nothing and the first that trains, as far as the ladder has them."""
    rungs = [replace(fidelity_of_rung(rung), seeds=1, test=False) for rung in space.search.ladder]
    first = {fidelity.epochs > 0: fidelity for fidelity in reversed(rungs)}
    return [first[trains] for trains in (False, True) if trains in first]


def _trial_json(trial: profiling.TrialTime) -> dict[str, Any]:
    return {
        "rung": trial.rung,
        "seconds": trial.seconds,
        "floor": trial.floor,
        "ratio": trial.ratio,
        "steps": trial.steps,
        "whole_steps": trial.whole_steps,
        "stages": [{"stage": s.name, "seconds": s.seconds, "floor": s.floor} for s in trial.stages],
    }


def bookkeeping_seconds(
    space: Space, bench: Workbench, problem: Problem, policy: Policy, *, candidates: int = _CANDIDATES
) -> float:
    """Returns the processor time a candidate of all that surrounds an evaluation: proposal, prices, identity, storage.

    A search is run whose evaluations answer at once, in a database of its own.
    """
    fidelity = Fidelity("screen")

    def answer(policy: Policy, fidelity: Fidelity) -> Future[TrialResult]:
        costs = problem.costs(policy)
        done: Future[TrialResult] = Future()
        metrics = {"val_accuracy": costs["macs"] / problem.cost_model.dense()["macs"], "val_loss": 1.0}
        widths = policy.widths(problem.groups)
        done.set_result(TrialResult(policy, bench.identity(policy), fidelity, widths, costs, metrics))
        return done

    plan = LadderPlan(
        name="bookkeeping",
        problem=problem,
        rungs=(RungPlan(fidelity, candidates),),
        fingerprint="bookkeeping",
        sampler=space.search.sampler,
        seed=space.seed,
        tables=bench.knowledge.tables or None,
    )
    with tempfile.TemporaryDirectory() as folder:
        storage = studies.open_storage(Path(folder) / "optuna.db")
        start = time.process_time()
        studies.run_ladder(storage, plan, submit=answer, identity=bench.identity)
        return (time.process_time() - start) / candidates
