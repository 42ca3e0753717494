"""Which recipe wins back most in few epochs: learning rate, distillation, weight averaging.

    python tests/benchmarks/recipes.py [--network resnet20] [--epochs 0.2] [--budgets 0.5 0.35] [--journal FILE]

`make recipes` calls it. Needs AUTOPRUNE_DATA. Additive solutions at the budgets, cut and repaired as in a search, and
uniform ratios whose BatchNorm statistics are recalibrated and nothing else, are trained for the same epochs by every
recipe, which differ in one setting from the default, and scored on all 5,000 validation images. Averages of the weights
are taken during the default's training, so that they cost no run.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from autoprune.network import preparing, settings
from autoprune.network.repair.batch_norms import recalibrate
from autoprune.network.surgery.cut import cut
from autoprune.network.training.evaluation import evaluate
from autoprune.network.training.recipe import Distillation, Recipe, fine_tune
from autoprune.network.workbench import Workbench
from autoprune.results import Problem
from autoprune.space import load_space
from autoprune.studies.warmstart import additive, uniform

HERE = Path(__file__).parent
DEFAULT = "default: rate 0.02, temperature 4, weight 0.9"
CHANGES: Mapping[str, Mapping[str, Any]] = {
    DEFAULT: {},
    "rate 0.005": {"lr": 0.005},
    "rate 0.01": {"lr": 0.01},
    "rate 0.05": {"lr": 0.05},
    "temperature 1": {"distillation": Distillation(1.0, 0.9)},
    "temperature 2": {"distillation": Distillation(2.0, 0.9)},
    "distillation's weight 0.5": {"distillation": Distillation(4.0, 0.5)},
    "no distillation": {"distillation": None},
}
DECAYS = (0.9, 0.97, 0.99)
"""Of the exponential moving averages, a step."""
STARTS = ("repaired", "repaired on 2,048 images", "uniform")
"""What is trained: additive solutions by obs_greedy, repaired on the 512 calibration images or more, and uniform ratios
by l1 with recalibrated BatchNorm statistics, which is where heuristics begin."""


@contextmanager
def averages(model: nn.Module) -> Iterator[dict[float, AveragedModel]]:
    """Follows the training of `model` with moving averages of its weights and BatchNorm statistics."""
    followers = {
        decay: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) for decay in DECAYS
    }

    def follow(*args: Any) -> None:
        for follower in followers.values():
            follower.update_parameters(model)

    handle = register_optimizer_step_post_hook(follow)
    try:
        yield followers
    finally:
        handle.remove()


def score(bench: Workbench, model: nn.Module) -> float:
    """Returns the accuracy on all validation images."""
    return evaluate(model, bench.splits.val, autocast_dtype=bench.precision.autocast_dtype).accuracy


def started(bench: Workbench, problem: Problem, start: str, budget: float) -> nn.Module:
    """Returns the pruned network that training begins with."""
    if start == "uniform":
        model = cut(bench.network, bench.selection(uniform(problem, "l1", budget)))
        recalibrate(model, bench.splits.calibration, batches=10, seed=0)
        return model
    policy = additive(problem, bench.knowledge.tables, budget, criterion="obs_greedy")
    return bench.repair(bench.selection(policy), calibration=2048 if start == STARTS[1] else None)


def train(
    bench: Workbench, model: nn.Module, recipe: Recipe, *, epochs: float, seed: int, averaged: bool
) -> dict[str, float]:
    """Returns the accuracy before and after training, and of the averages where wanted; `seconds` of the processor."""
    found = {"before": score(bench, model)}
    begun = time.process_time()
    with ExitStack() as stack:
        followers = stack.enter_context(averages(model)) if averaged else {}
        fine_tune(
            model,
            bench.splits.train,
            recipe=recipe,
            epochs=epochs,
            teacher=copy.deepcopy(bench.network.model),
            seed=seed,
            precision=bench.training_precision,
        )
    found["seconds"] = time.process_time() - begun
    found["after"] = score(bench, model)
    for decay, follower in followers.items():
        found[f"average {decay}"] = score(bench, follower.module)
    return found


Table = dict[tuple[str, str, float], list[dict[str, float]]]
"""Recipe, start, budget → one training a seed."""


def run(options: argparse.Namespace) -> Table:
    """Trains by every recipe from every start at every budget; what the journal holds is not repeated."""
    overrides = [
        f"model.name={options.network}",
        f"checkpoint=${{AUTOPRUNE_DATA}}/{options.network}_cifar10jpeg.safetensors",
        "data.preprocessing.flip=true",
        "data.preprocessing.crop_padding=4",
    ]
    space = load_space(HERE / "resnet20_no_finetuning.yaml", overrides=overrides, env=os.environ)
    ingredients = preparing.ingredients_of(space, cache=options.cache)
    network = preparing.trace_ingredients(ingredients, space)
    problem = settings.problem_of(network, settings.searchable_groups(network, space), space)
    bench = preparing.workbench_of(
        space, ingredients, network, cache=options.cache, models=None, note=lambda text: None
    )
    basic = replace(settings.recipe_of(space), batch_size=options.batch_size)
    known: dict[str, dict[str, float]] = {}
    if options.journal and options.journal.is_file():
        known = json.loads(options.journal.read_text(encoding="utf-8"))
    table: Table = {}
    for seed in range(options.seeds):
        for budget in options.budgets:
            for start in options.starts:
                for name in options.recipes:
                    key = " | ".join(map(str, (options.network, start, budget, name, options.epochs, seed)))
                    if key not in known:
                        recipe, model = replace(basic, **CHANGES[name]), started(bench, problem, start, budget)
                        averaged = name == DEFAULT
                        known[key] = train(bench, model, recipe, epochs=options.epochs, seed=seed, averaged=averaged)
                        if options.journal:
                            options.journal.write_text(json.dumps(known, indent=1), encoding="utf-8")
                    table.setdefault((name, start, budget), []).append(known[key])
                    print(key, {k: round(v, 4) for k, v in known[key].items()}, flush=True)
    return table


def render(table: Table, options: argparse.Namespace) -> str:
    """Returns the comparison as Markdown."""
    lines = [
        f"## {options.network}, {options.epochs:g} epochs",
        "",
        f"Batch {options.batch_size}, {options.seeds} seed(s), one core, torch {torch.__version__}.",
        "",
        "| start, part of the MACs | before | " + " | ".join(options.recipes) + " | seconds |",
        "|---|---|" + "---|" * (len(options.recipes) + 1),
    ]
    for budget in options.budgets:
        for start in options.starts:
            found = [table[name, start, budget] for name in options.recipes]
            cells = [_spread([run["before"] for run in found[0]])]
            cells += [_spread([run["after"] for run in runs]) for runs in found]
            seconds = fmean(run["seconds"] for runs in found for run in runs)
            lines.append(f"| {start}, {budget:g} | " + " | ".join([*cells, f"{seconds:.0f}"]) + " |")
    averaged = [runs for (name, _, _), runs in table.items() if name == DEFAULT]
    for decay in DECAYS if averaged else ():
        gains = [run[f"average {decay}"] - run["after"] for runs in averaged for run in runs]
        lines += [
            "",
            f"A moving average of {decay:g} a step gains {_spread(gains)} points on the default's last weights.",
        ]
    return "\n".join(lines) + "\n"


def _spread(fractions: list[float]) -> str:
    values = [100 * value for value in fractions]
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    """Runs the comparison and writes its table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=float, default=0.2)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.35])
    parser.add_argument("--network", default="resnet20", choices=["resnet20", "resnet56"])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=[STARTS[0], STARTS[2]])
    parser.add_argument("--recipes", nargs="+", choices=CHANGES, default=list(CHANGES), help="the default's name first")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--cache", type=Path, default=Path(".autoprune/bench/cache"))
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if "AUTOPRUNE_DATA" not in os.environ:
        raise SystemExit("AUTOPRUNE_DATA must name the folder with cifar10-jpeg.tar.xz and the weights")
    torch.set_num_threads(1)
    text = render(run(options), options)
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
