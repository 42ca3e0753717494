"""Scores what a contender kept, fine-tunes it by the common recipe, and scores it again.

python tests/benchmarks/bench/finish.py --network resnet20 --seed 0 --epochs 0.5 --folder OUT
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path

import torch
from common import PRECISION, Task, narrow, picks, task_of
from torch import nn

from autoprune.network.settings import recipe_of
from autoprune.network.training.recipe import fine_tune


def finish(task: Task, model: nn.Module, *, epochs: float, seed: int) -> dict[str, float]:
    """Returns MACs, and the test accuracy before and after fine-tuning by the same recipe for every contender."""
    row = {"macs": task.fraction(model), "before": task.test(model)}
    if epochs > 0:
        recipe = replace(recipe_of(task.space), batch_size=128, lr=0.01)
        teacher = copy.deepcopy(task.ingredients.model)
        fine_tune(
            model,
            task.ingredients.splits.train,
            recipe=recipe,
            epochs=epochs,
            teacher=teacher,
            seed=seed,
            precision=PRECISION,
        )
        row["after"] = task.test(model)
    return row


def main() -> None:
    """Finishes one contender's picks; what is finished already is kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=0.5)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path(".autoprune/bench/cache"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = task_of(options.network, seed=options.seed, cache=options.cache)
    file = options.folder / f"finished-{options.epochs}.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for budget, state in picks(options.folder).items():
        if str(budget) not in rows:
            rows[str(budget)] = finish(task, narrow(task, state), epochs=options.epochs, seed=options.seed)
            file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if "dense" not in rows:
        rows["dense"] = finish(task, copy.deepcopy(task.ingredients.model), epochs=0.0, seed=options.seed)
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
