"""What repairs a pruned network best before any training: refits, their ridge, statistics, and which channels go.

    python tests/benchmarks/compensation.py [--network resnet20] [--seeds 3] [--output FILE]

`make compensation` calls it. Needs AUTOPRUNE_DATA. Six fixed policies, the additive solution and the uniform one at
0.70, 0.50 and 0.35 of the MACs, are repaired in every way and scored on the same 2,000 validation images. A seed draws
other calibration images (512 of the training set), from which everything is learnt anew but the policies.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from autoprune.network import preparing, settings
from autoprune.network.calibration import targets as calibration_targets
from autoprune.network.calibration.moments import gather
from autoprune.network.calibration.patches import patch_rows
from autoprune.network.criteria.channels import choose, score
from autoprune.network.criteria.inputs import Evidence
from autoprune.network.graph import modules
from autoprune.network.graph.network import Network
from autoprune.network.repair import compensation, sequential
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.selection import Selection
from autoprune.network.training.evaluation import evaluate
from autoprune.space import load_space
from autoprune.studies.warmstart import additive, uniform

HERE = Path(__file__).parent
BUDGETS = (0.7, 0.5, 0.35)
IMAGES = 2000


class Case:
    """One network, with what one seed's calibration images say about it."""

    def __init__(self, network: str, cache: Path) -> None:
        overrides = [
            f"name=compensation-{network}",
            f"model.name={network}",
            f"checkpoint=${{AUTOPRUNE_DATA}}/{network}_cifar10jpeg.safetensors",
        ]
        space = load_space(HERE / "resnet20_no_finetuning.yaml", overrides=overrides, env=os.environ)
        ingredients = preparing.ingredients_of(space, cache=cache)
        self.splits = ingredients.splits
        self.network: Network = preparing.trace_ingredients(ingredients, space)
        groups = settings.searchable_groups(self.network, space)
        self.problem = settings.problem_of(self.network, groups, space)
        self.bench = preparing.workbench_of(
            space, ingredients, self.network, cache=cache, models=None, note=lambda text: None
        )
        tables = self.bench.knowledge.tables
        self.policies = {
            f"{kind} {budget:.2f}": policy
            for budget in BUDGETS
            for kind, policy in (
                ("additive", additive(self.problem, tables, budget, criterion="l1")),
                ("uniform", uniform(self.problem, "l1", budget)),
            )
        }

    def draw(self, seed: int) -> None:
        """Draws 512 training images and gathers moments and targets on them."""
        drawn = self.splits.train.batches(64, shuffle=torch.Generator().manual_seed(seed))
        batches = [x for (x, _), _ in zip(drawn, range(8), strict=False)]
        self.images = torch.cat(batches)
        self.statistics = gather(self.network, batches, seed=seed)
        self.targets = calibration_targets.gather_targets(self.network, self.images, seed=seed)
        self.evidence = Evidence(self.network, self.statistics, seed=seed)

    def widths(self, name: str) -> dict[str, int]:
        """Returns the widths of a policy."""
        return self.policies[name].widths(self.problem.groups)

    def accuracy(self, model: nn.Module) -> float:
        """Returns the accuracy on the validation images."""
        dtype = self.bench.precision.autocast_dtype
        return evaluate(model, self.splits.val, limit=IMAGES, autocast_dtype=dtype).accuracy


# --- ways of repairing --------------------------------------------------------------------------------------------


def refitted(case: Case, model: nn.Module, selection: Selection, ridge: float = 1e-3) -> None:
    """The way of a search: the sequential refit with BatchNorm statistics, in which the dense moments count too."""
    targets = replace(case.targets, statistics=case.statistics)
    sequential.refit_sequentially(case.network, model, selection, targets, ridge=ridge)


def recalibrated(case: Case, model: nn.Module, selection: Selection) -> None:
    """BatchNorm statistics alone."""
    sequential._run_collecting(model, lambda: model(case.images))


def cached(case: Case, model: nn.Module, selection: Selection) -> None:
    """Refits on what the dense network's layers read, then BatchNorm statistics."""
    compensation.compensate(case.network, model, selection, case.statistics)
    recalibrated(case, model, selection)


@contextmanager
def dense_statistics() -> Iterator[None]:
    """BatchNorms keep the dense network's statistics: the mean is right by the refit, the variance of a fit is less."""

    def plain(model: nn.Module, run: Callable[[], object]) -> None:
        with modules.evaluating(model), torch.no_grad():
            run()

    with mock.patch.object(sequential, "_run_collecting", plain):
        yield


def shortcut(block: Any, x: Tensor) -> Tensor:
    """Returns what a block adds to its convolutions' output: its input, subsampled and zero-padded where it must be."""
    before = block.padding // 2
    padding = (0, 0, 0, 0, before, block.padding - before)
    return nn.functional.pad(x[:, :, :: block.stride, :: block.stride], padding)


@contextmanager
def residual_targets(case: Case, model: nn.Module) -> Iterator[None]:
    """The last convolution of a block is wanted to make up for what its shortcut has lost too.

    Source: the multi-branch rule of He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017.
    """
    dense = dict(case.network.model.named_modules())
    pointwise = nn.Conv2d(1, 1, 1)
    targets, seed = case.targets, case.targets.seed

    def rows(x: Tensor) -> Tensor:
        return patch_rows(pointwise, x, targets.rows, seed)  # (1, rows, C)

    shortcuts: dict[str, Tensor] = {}
    handles = []
    blocks = [name.removesuffix(".bn2") for name in dense if name.endswith(".bn2")]
    for name in blocks:

        def keep(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            shortcuts[name] = rows(shortcut(module, args[0]))

        handles.append(dense[name].register_forward_pre_hook(keep))
    with modules.evaluating(case.network.model), torch.no_grad():
        case.network.model(targets.images)
    for handle in handles:
        handle.remove()
    handles = []
    wanted = dict(targets.outputs)
    for name in blocks:

        def make_up(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            norm = dense[f"{name}.bn2"]
            factor = (norm.running_var + norm.eps).sqrt() / norm.weight  # of the normalised output, in its input
            actual = shortcut(module, args[0])
            targets.outputs[f"{name}.conv2"] = wanted[f"{name}.conv2"] + (
                (shortcuts[name] - rows(actual)) * factor
            ).transpose(1, 2)

        handles.append(model.get_submodule(name).register_forward_pre_hook(make_up))
    try:
        yield
    finally:
        targets.outputs.update(wanted)
        for handle in handles:
            handle.remove()


def with_(case: Case, model: nn.Module, selection: Selection, *changes: Any) -> None:
    """The way of a search under changes to its parts."""
    with ExitStack() as stack, torch.no_grad():
        for change in changes:
            stack.enter_context(change)
        refitted(case, model, selection)


Way = Callable[[Case, nn.Module, Selection], None]
WAYS: dict[str, Way] = {
    "BatchNorm recalibration alone": recalibrated,
    "cached dense Grams": cached,
    "sequential, ridge 0.001 (default)": refitted,
    "sequential, ridge 0.0001": lambda case, model, kept: refitted(case, model, kept, ridge=1e-4),
    "sequential, ridge 0.01": lambda case, model, kept: refitted(case, model, kept, ridge=1e-2),
    "sequential, without the dense moments": lambda case, model, kept: sequential.refit_sequentially(
        case.network, model, kept, case.targets
    ),
    "sequential, statistics of the dense network": lambda case, model, kept: with_(
        case, model, kept, dense_statistics()
    ),
    "sequential, residual targets": lambda case, model, kept: with_(case, model, kept, residual_targets(case, model)),
    "sequential, residual targets, dense statistics": lambda case, model, kept: with_(
        case, model, kept, residual_targets(case, model), dense_statistics()
    ),
}


# --- ways of choosing ---------------------------------------------------------------------------------------------


def chosen(case: Case, criterion: str, widths: dict[str, int]) -> Selection:
    """Returns the channels that a criterion keeps."""
    groups = {group.name: group for group in case.network.groups}
    narrowed = {name: width for name, width in widths.items() if width < groups[name].size}
    scores = score(case.evidence, [criterion])[criterion]
    return {name: choose(scores[name], width) for name, width in narrowed.items()}


CHOICES = {f"channels by {name}": name for name in ("l1", "l2", "obs", "obs_greedy")}
"""Ways of choosing the channels; all are repaired by the default way."""


# --- the table ----------------------------------------------------------------------------------------------------


class Journal:
    """Measures each combination once: what a file holds already is read from it."""

    def __init__(self, case: Case, path: Path | None) -> None:
        self._case, self._path, self._drawn = case, path, -1
        self._known: dict[str, list[float]] = {}
        if path is not None and path.is_file():
            self._known = json.loads(path.read_text(encoding="utf-8"))

    def measure(self, way: str, policy: str, seed: int) -> tuple[float, float]:
        """Returns the accuracy in % and the processor seconds of a repair (of a ranking, for a way of choosing)."""
        key = f"{way} | {policy} | {seed}"
        if key not in self._known:
            if self._drawn != seed:
                self._case.draw(seed)
                self._drawn = seed
            self._known[key] = list(measured(self._case, way, policy))
            print(key, [round(value, 2) for value in self._known[key]], flush=True)
            if self._path is not None:
                self._path.write_text(json.dumps(self._known, indent=1), encoding="utf-8")
        accuracy, seconds = self._known[key]
        return accuracy, seconds


def measured(case: Case, way: str, policy: str) -> tuple[float, float]:
    """Repairs a policy in a way, or by the default way after choosing its channels in another one."""
    widths = case.widths(policy)
    begun = time.process_time()
    kept = chosen(case, CHOICES.get(way, "l1"), widths)
    ranked = time.process_time()
    model = cut(case.network, kept)
    cutted = time.process_time()
    WAYS.get(way, refitted)(case, model, kept)
    repaired = time.process_time()
    return 100 * case.accuracy(model), ranked - begun if way in CHOICES else repaired - cutted


def render(case: Case, journal: Journal, options: argparse.Namespace) -> str:
    """Measures everything and returns the comparison as Markdown."""
    names = options.policies
    for seed in range(options.seeds):  # one draw after the other: learning from one takes longer than a repair
        for way in options.ways:
            for name in names:
                journal.measure(way, name, seed)
    lines = [
        f"# Repairing {options.network} without training (`make compensation`)",
        "",
        f"Accuracy in % on {IMAGES:,} validation images of CIFAR-10 (JPEG; standard error 0.8; all see the",
        f"same ones); mean over {options.seeds} draw(s) of 512 calibration images, ± the mean over policies of the",
        "standard deviation over draws. Policies: additive solutions and uniform ratios by l1 at parts of the MACs.",
        f"Seconds: of the processor, a repair (a ranking in the last rows), one core; torch {torch.__version__}.",
        "",
        "| | " + " | ".join(names) + " | mean | ± | seconds |",
        "|---|" + "---|" * (len(names) + 3),
    ]
    for way in options.ways:
        cells, spreads, seconds = [], [], []
        for name in names:
            found = [journal.measure(way, name, seed) for seed in range(options.seeds)]
            cells.append(fmean(accuracy for accuracy, _ in found))
            seconds += [spent for _, spent in found]
            spreads.append(stdev(accuracy for accuracy, _ in found) if options.seeds > 1 else math.nan)
        row = [*(f"{cell:.1f}" for cell in cells), f"{fmean(cells):.2f}", f"{fmean(spreads):.1f}"]
        lines.append(f"| {way} | " + " | ".join([*row, f"{fmean(seconds):.2f}"]) + " |")
    return "\n".join(lines).replace("nan", "one draw") + "\n"


def main() -> None:
    """Runs the comparison and writes its table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", default="resnet20", choices=["resnet20", "resnet56"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path(".autoprune/bench/cache"))
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, *CHOICES], default=[*WAYS, *CHOICES])
    policies = [f"{kind} {budget:.2f}" for budget in BUDGETS for kind in ("additive", "uniform")]
    parser.add_argument("--policies", nargs="+", choices=policies, default=policies)
    parser.add_argument("--journal", type=Path, help="a file of finished measurements: they are not repeated")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if "AUTOPRUNE_DATA" not in os.environ:
        raise SystemExit("AUTOPRUNE_DATA must name the folder with cifar10-jpeg.tar.xz and the weights")
    torch.set_num_threads(1)
    case = Case(options.network, options.cache)
    text = render(case, Journal(case, options.journal), options)
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
