"""The contenders: each turns a trained network into one pruned network a budget, with what it needs and no more.

    python tests/benchmarks/bench/contenders.py NAME --network resnet20 --seed 0 --seconds 120 --folder OUT

`autoprune` and its ablations, Torch-Pruning's uniform and global magnitude pruners, NVIDIA ModelOpt FastNAS, and a
plain Optuna loop as people write it. No contender fine-tunes; all but autoprune get BatchNorm recalibration after
pruning, which their own examples leave to the user.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import BUDGETS, IMAGES, Journal, Task, inner_convolutions, narrow, task_of
from torch import nn

# --- autoprune ----------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "autoprune": {},
    "autoprune, 75 s": {"seconds": 75.0},
    "autoprune without learned weights": {"search.sampler": "tpe"},
    "autoprune, warm starts alone": {"warm_only": True},
    "autoprune, sampler alone": {"search.sampler": "tpe", "search.warm_starts": "false"},
    "autoprune, NSGA-II": {"search.sampler": "nsga2"},
    "autoprune, random": {"search.sampler": "random"},
    "autoprune, one rung": {"one_rung": True},
}
CANDIDATES = 40
"""Of our search's first rung, where the time is enough for them."""
FINAL = {"rung": "final", "epochs": 0, "images": IMAGES, "trials": 10, "calibration": 2048}
"""The last rung of our search: its best candidates are repaired on more of the training images."""


def autoprune(task: Task, journal: Journal, seconds: float, variant: str) -> None:
    """Our search for the budgets, with two rungs that train nothing; a budget's pick is the best candidate for it.

    `seconds`: no more time than that. `warm_only`: the first rung ends with the warm starts. `one_rung`: no candidate
    is repaired on more images, and the first rung lasts as long as the search.
    """
    from autoprune import studies
    from autoprune.coordinator.running.log import SearchLog
    from autoprune.coordinator.running.preparation import prepare
    from autoprune.coordinator.running.session import Session
    from autoprune.network.preparing import trace_ingredients, workbench_of
    from autoprune.report import Progress
    from autoprune.space.method import RungSettings

    class WarmStartsAlone(Session):
        def _plan(self, workers: int, trials: int) -> studies.LadderPlan:
            plan = super()._plan(workers, trials)
            rung = replace(plan.rungs[0], trials=len(plan.warm_starts))
            return replace(plan, rungs=(rung, *plan.rungs[1:]), sampler=None)

    changes = dict(VARIANTS[variant])
    warm_only, one_rung = changes.pop("warm_only", False), changes.pop("one_rung", False)
    seconds = min(seconds, changes.pop("seconds", seconds))
    candidates = 100_000 if one_rung else CANDIDATES
    ladder = task.space.search.ladder[:1]
    section = task.space.search.model_copy(
        update={
            "trials": candidates,
            "controls": 0,
            "ladder": ladder if one_rung else (*ladder, RungSettings(**FINAL)),
            "sampler": changes.get("search.sampler", task.space.search.sampler),
            "warm_starts": changes.get("search.warm_starts") != "false",
        }
    )
    budget = task.space.budget.model_copy(update={"front": None, "points": BUDGETS})
    space = task.space.model_copy(update={"search": section, "budget": budget})
    home = journal.folder / "home"
    with SearchLog(home, space.name) as log, Progress() as progress:
        sections = space.fingerprint_sections()
        prepared = prepare(space, task.ingredients, sections=sections, home=home, note=progress.note)
        session = (WarmStartsAlone if warm_only else Session)(prepared, progress=progress, log=log)
        deadline = journal.started + seconds
        session.run(workers=1, deadline=deadline, trials=candidates, summary=False)
    rungs = []
    for rung in space.search.ladder:
        study = studies.load_rung(studies.open_storage(home / "optuna.db"), space.name, rung.rung)
        rungs.append((rung, study, [t for t in studies.distinct(studies.read_results(study)) if t.result is not None]))
    begun = min(trial.datetime_start for trial in rungs[0][1].trials if trial.datetime_start)
    last = max(trial.datetime_complete for _, study, _ in rungs for trial in study.trials if trial.datetime_complete)
    prepared = journal.seconds - (last - begun).total_seconds()
    for _, study, trials in rungs:
        for trial in trials:
            ended = study.trials[trial.number].datetime_complete
            spent = prepared + (ended - begun).total_seconds()
            journal.candidate(trial.result.costs["macs"] / task.dense_macs, trial.result.metrics["val_accuracy"], spent)
    network = trace_ingredients(task.ingredients)
    bench = workbench_of(space, task.ingredients, network, cache=home / "cache", models=None, note=lambda text: None)
    for limit in BUDGETS:
        for rung, _, trials in reversed(rungs):  # the last one that has measured a candidate for this budget
            near = [t for t in trials if 0.97 * limit <= t.result.costs["macs"] / task.dense_macs <= limit]
            if near:
                best = max(near, key=lambda t: t.result.metrics["val_accuracy"])
                repaired = bench.repair(bench.selection(best.policy), calibration=rung.calibration)
                journal.keep(limit, repaired, best.result.metrics["val_accuracy"])
                break


# --- Torch-Pruning ------------------------------------------------------------------------------------------------


def torch_pruning(task: Task, journal: Journal, *, globally: bool) -> None:
    """MagnitudePruner on the inner convolutions, the ratio found by bisection for every budget."""
    import torch_pruning as tp

    def pruned(ratio: float) -> nn.Module:
        model = copy.deepcopy(task.ingredients.model).eval()
        inner = set(inner_convolutions(model).values())
        ignored = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m not in inner]
        importance = tp.importance.MagnitudeImportance(p=2)
        pruner = tp.pruner.MagnitudePruner(
            model, task.example, importance, global_pruning=globally, pruning_ratio=ratio, ignored_layers=ignored
        )
        pruner.step()
        return model

    for budget in BUDGETS:
        low, high = 0.0, 0.98
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if task.fraction(pruned(middle)) > budget else (low, middle)
        model = pruned(high)
        task.recalibrate(model)
        accuracy = task.validate(model)
        journal.candidate(task.fraction(model), accuracy)
        journal.keep(budget, model, accuracy)


# --- a plain Optuna loop ------------------------------------------------------------------------------------------


def plain_optuna(task: Task, journal: Journal, seconds: float, seed: int) -> None:
    """One study a budget: a ratio for every layer, L1, a penalty for what exceeds the budget, TPE as it comes."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    dense = task.ingredients.model
    for number, budget in enumerate(BUDGETS):
        best: tuple[float, nn.Module] | None = None

        def objective(trial: optuna.Trial, budget: float = budget) -> float:
            nonlocal best
            ratios = {name: trial.suggest_float(name, 0.0, 0.9) for name in inner_convolutions(dense)}
            model = narrow(task, l1_state(dense, ratios))
            task.recalibrate(model)
            accuracy, fraction = task.validate(model), task.fraction(model)
            journal.candidate(fraction, accuracy)
            if fraction <= budget and (best is None or accuracy > best[0]):
                best = (accuracy, model)
            return accuracy - 2.0 * max(0.0, fraction - budget)

        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        end = seconds * (number + 1) / len(BUDGETS)
        study.optimize(objective, timeout=max(1.0, end - journal.seconds))
        if best is not None:
            journal.keep(budget, best[1], best[0])


def l1_state(dense: nn.Module, ratios: dict[str, float]) -> dict[str, torch.Tensor]:
    """Returns the weights without the inner channels of least L1 norm."""
    state = {name: tensor.detach().clone() for name, tensor in dense.state_dict().items()}
    for name, ratio in ratios.items():
        weight = state[f"{name}.weight"]
        width = max(1, round(weight.shape[0] * (1 - ratio)))
        keep = weight.abs().sum((1, 2, 3)).topk(width).indices.sort().values
        block = name.rpartition(".")[0]
        state[f"{name}.weight"] = weight[keep]
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{block}.bn1.{part}"] = state[f"{block}.bn1.{part}"][keep]
        state[f"{block}.conv2.weight"] = state[f"{block}.conv2.weight"][:, keep]
    return state


# --- NVIDIA ModelOpt FastNAS --------------------------------------------------------------------------------------


def fastnas(task: Task, journal: Journal) -> None:
    """`mtp.prune(mode="fastnas")` once a budget, its own BatchNorm calibration, every channel divisor set to 1."""
    import modelopt.torch.prune as mtp

    # Its BatchNorm calibration wants more than our 512 images; its examples hand the training loader in.
    loader = list(task.ingredients.splits.train.batches(64, limit=4096))
    config = mtp.fastnas.FastNASConfig().model_dump()
    for rules in config.values():
        for rule in rules.values():
            rule.update({key: 1 for key in ("channel_divisor", "feature_divisor") if key in rule})
    for budget in BUDGETS:
        model = copy.deepcopy(task.ingredients.model)

        def score(candidate: nn.Module) -> float:
            accuracy = task.validate(candidate)
            journal.candidate(math.nan, accuracy)
            return accuracy

        result, _ = mtp.prune(
            model=model,
            mode=[("fastnas", config)],
            constraints={"flops": f"{100 * budget:.0f}%"},
            dummy_input=task.example,
            config={
                "data_loader": loader,
                "collect_func": lambda batch: batch[0],
                "score_func": score,
                "checkpoint": str(journal.folder / "fastnas.pth"),
            },
        )
        pruned = narrow(task, {name: tensor for name, tensor in result.state_dict().items() if name[0] != "_"})
        accuracy = task.validate(pruned)
        journal.candidate(task.fraction(pruned), accuracy)
        journal.keep(budget, pruned, accuracy)


# --- the command --------------------------------------------------------------------------------------------------

CONTENDERS: dict[str, Callable[[Task, Journal, argparse.Namespace], None]] = {
    **{name: (lambda task, journal, o, name=name: autoprune(task, journal, o.seconds, name)) for name in VARIANTS},
    "Torch-Pruning, uniform": lambda task, journal, o: torch_pruning(task, journal, globally=False),
    "Torch-Pruning, global": lambda task, journal, o: torch_pruning(task, journal, globally=True),
    "plain Optuna": lambda task, journal, o: plain_optuna(task, journal, o.seconds, o.seed),
    "ModelOpt FastNAS": lambda task, journal, o: fastnas(task, journal),
}


def main() -> None:
    """Runs one contender."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path(".autoprune/bench/cache"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = task_of(options.network, seed=options.seed, cache=options.cache)
    journal = Journal(options.folder)
    CONTENDERS[options.name](task, journal, options)
    journal.close(images=IMAGES, name=options.name, network=options.network, seed=options.seed)


if __name__ == "__main__":
    main()
