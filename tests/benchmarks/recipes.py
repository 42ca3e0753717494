"""Which recipe wins back most in few epochs: learning rate, distillation, weight averaging.

    python tests/benchmarks/recipes.py [--epochs 0.2] [--budgets 0.5 0.35] [--seeds 1] [--journal FILE] [--output FILE]

`make recipes` calls it. Needs AUTOPRUNE_DATA. The additive solutions for ResNet-20 at the budgets are cut and repaired
as in a search, then trained for the same epochs by every recipe, which differ in one setting from the default, and
scored on all 5,000 validation images. Averages of the weights are taken during the default's training, so that they
cost no run.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from autoprune.network import pipeline
from autoprune.network.evaluation import evaluate
from autoprune.network.recipe import Distillation, Recipe, fine_tune
from autoprune.network.workbench import Workbench
from autoprune.policy import Policy
from autoprune.search.warmstart import additive
from autoprune.space import load_space

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


def train(bench: Workbench, policy: Policy, recipe: Recipe, *, epochs: float, seed: int) -> dict[str, float]:
    """Returns the accuracy before and after training, and of the averages; `seconds` of the processor."""
    model = bench.repair(bench.selection(policy))
    found = {"before": score(bench, model)}
    begun = time.process_time()
    with averages(model) as followers:
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


def run(options: argparse.Namespace) -> dict[tuple[str, float], list[dict[str, float]]]:
    """Trains by every recipe at every budget; what the journal holds is not repeated."""
    overrides = ["data.preprocessing.flip=true", "data.preprocessing.crop_padding=4"]
    space = load_space(HERE / "resnet20_no_finetuning.yaml", overrides=overrides, env=os.environ)
    ingredients = pipeline.ingredients_of(space, cache=options.cache)
    network = pipeline.trace_ingredients(ingredients, space)
    problem = pipeline.problem_of(network, pipeline.searchable_groups(network, space), space)
    bench = pipeline.workbench_of(space, ingredients, network, cache=options.cache, models=None, note=lambda text: None)
    basic = replace(pipeline.recipe_of(space), batch_size=options.batch_size)
    known: dict[str, dict[str, float]] = {}
    if options.journal and options.journal.is_file():
        known = json.loads(options.journal.read_text(encoding="utf-8"))
    table: dict[tuple[str, float], list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for budget in options.budgets:
            policy = additive(problem, bench.knowledge.tables, budget, criterion="l1")
            for name in options.recipes:
                key = f"{name} | {budget} | {options.epochs} | {seed}"
                if key not in known:
                    recipe = replace(basic, **CHANGES[name])
                    known[key] = train(bench, policy, recipe, epochs=options.epochs, seed=seed)
                    if options.journal:
                        options.journal.write_text(json.dumps(known, indent=1), encoding="utf-8")
                table.setdefault((name, budget), []).append(known[key])
                print(key, {k: round(v, 4) for k, v in known[key].items()}, flush=True)
    return table


def render(table: Mapping[tuple[str, float], list[dict[str, float]]], options: argparse.Namespace) -> str:
    """Returns the comparison as Markdown."""
    lines = [
        "# Recipes in few epochs (`make recipes`)",
        "",
        f"ResNet-20, CIFAR-10 (JPEG), additive solutions repaired as in a search and trained for {options.epochs:g}",
        f"epochs, batch {options.batch_size}; accuracy in % on 5,000 validation images (standard error 0.5, all see",
        f"the same ones), {options.seeds} seed(s). Each row changes one setting. Seconds: of the processor,",
        f"of a training on one core; torch {torch.__version__}.",
        "",
        "| recipe | " + " | ".join(f"{budget:g} of the MACs" for budget in options.budgets) + " | seconds |",
        "|---|" + "---|" * (len(options.budgets) + 1),
    ]
    rows = [("before training", DEFAULT, "before"), *((name, name, "after") for name in options.recipes)]
    rows += [(f"default, moving average {decay:g} a step", DEFAULT, f"average {decay}") for decay in DECAYS]
    for title, name, key in rows:
        cells = []
        for budget in options.budgets:
            values = [100 * found[key] for found in table[name, budget]]
            cells.append(f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else ""))
        seconds = fmean(found["seconds"] for budget in options.budgets for found in table[name, budget])
        lines.append(f"| {title} | " + " | ".join([*cells, "" if key == "before" else f"{seconds:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the comparison and writes its table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=float, default=0.2)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.35])
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
