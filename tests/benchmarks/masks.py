"""How much accuracy masks cost without fine-tuning: ResNet-20 / CIFAR-10, uniform magnitude against a search.

Prints a row for each sparsity: uniform magnitude masks bare, with batch norms recalibrated, refitted from cached
moments, and refitted by what each layer reads; then, with the last of these, the search's own warm starts. Scored on
the first 2,000 validation images.

    AUTOPRUNE_DATA=../shared/data python tests/benchmarks/masks.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from torch import nn

from autoprune.network import preparing, settings
from autoprune.network.repair.batch_norms import recalibrate
from autoprune.network.repair.masked_compensation import compensate_masked
from autoprune.network.surgery.masks import masked
from autoprune.network.training.evaluation import evaluate
from autoprune.network.workbench import Workbench
from autoprune.policy import Policy, uniform_policy
from autoprune.results import Fidelity, Problem
from autoprune.space import load_space
from autoprune.studies.warmstart import additive, global_ranking

SPACE = Path(__file__).with_name("resnet20_no_finetuning.yaml")
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
SCREEN = Fidelity("screen", 0, 2000)


def prepare(pruning: str, cache: Path) -> tuple[Workbench, Problem]:
    """Returns the workbench and the problem of ResNet-20 under a pattern."""
    changes = [f"pruning={pruning}", "budget={params: 1.0}", "criteria.choices=[l2,lamp,activation,obs]"]
    changes += ["groups.max_ratio=0.98"] if pruning == "unstructured" else ["groups.max_ratio=0.5"]
    space = load_space(SPACE, overrides=changes, env=os.environ)
    ingredients = preparing.ingredients_of(space, cache=cache)
    network = preparing.trace_ingredients(ingredients, space)
    groups = settings.searchable_groups(network, space)
    bench = preparing.workbench_of(space, ingredients, network, cache=cache, models=None, note=print)
    return bench, settings.problem_of(network, groups, space)


def score(bench: Workbench, model: nn.Module) -> float:
    """Returns the accuracy of a model in float32."""
    return evaluate(model, bench.splits.val, limit=SCREEN.images).accuracy


def stages(bench: Workbench, policy: Policy) -> list[float]:
    """Returns the accuracy of a policy bare, recalibrated, and refitted from cached moments."""
    selection = bench.selection(policy)
    bare = masked(bench.network, selection)
    refitted = masked(bench.network, selection)
    compensate_masked(bench.network, refitted, selection, bench.knowledge.statistics)
    found = [score(bench, bare)]
    for model in (bare, refitted):
        recalibrate(model, bench.splits.calibration, batches=10)
        found.append(score(bench, model))
    return found


def row(name: str, bench: Workbench, problem: Problem, policies: dict[str, Policy]) -> None:
    """Prints one line of the table: the first policy step by step, all of them after the whole repair."""
    first = next(iter(policies.values()))
    found = [f"{value:.1%}" for value in stages(bench, first)]
    for label, policy in policies.items():
        result = bench.evaluate(policy, SCREEN)
        kept = result.costs["params"] / problem.cost_model.dense()["params"]
        found.append(f"{label} {result.metrics['val_accuracy']:.1%} ({kept:.3f} of the parameters)")
    print(f"| {name} | {' | '.join(found)} |", flush=True)


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(os.environ.get("AUTOPRUNE_CACHE", scratch))
        bench, problem = prepare("unstructured", cache)
        print(f"dense {score(bench, bench.network.model):.1%}")
        print("| sparsity | bare | recalibrated | moments | policies, refitted")
        for sparsity in SPARSITIES:
            fraction = 1.0 - sparsity
            policies = {"uniform l2": uniform_policy(bench.groups, sparsity, "l2")}
            policies |= {
                f"additive {name}": additive(problem, bench.knowledge.tables, fraction, criterion=name)
                for name in ("l2", "activation", "obs")
            }
            policies |= {
                f"global {name}": global_ranking(problem, bench.ranking(), name, fraction)
                for name in ("l2", "lamp", "obs")
            }
            row(f"{sparsity:.0%}", bench, problem, policies)
        bench, problem = prepare("2:4", cache)
        row(
            "2:4",
            bench,
            problem,
            {f"all {n}": uniform_policy(bench.groups, 0.5, n) for n in ("l2", "activation", "obs")},
        )


if __name__ == "__main__":
    main()
