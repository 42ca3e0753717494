"""The classical ways of making a network smaller, side by side: same network, same data, same epochs.

    python tests/benchmarks/techniques.py [--quick] [--networks resnet20 lstm] [--output FILE]

A two-layer LSTM and a ResNet-20 on scikit-learn's digits, at half and at a quarter of their multiply-accumulates.
Every row gets the same number of epochs after (or around) its surgery, with the same optimizer, learning rate and
distillation from the dense network; only what the row names differs. Three seeds; the test images are seen here alone.

Rows without `least squares` or `merged` are cut and recalibrated only. Rows `before` spend 30 % of the epochs on the
dense network. `search` screens and tunes policies on validation images before its best one is trained like the others;
its screening is not counted in the epochs.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoprune.network import preparing, settings
from autoprune.network.criteria.channels import score
from autoprune.network.criteria.inputs import Evidence
from autoprune.network.tracing.counting import count_macs
from autoprune.network.training.evaluation import evaluate
from autoprune.network.training.recipe import Iterative, Stage, fine_tune
from autoprune.network.training.regularisation import REGULARISERS, STRENGTHS, Regularisation
from autoprune.network.workbench import Workbench
from autoprune.policy import Policy
from autoprune.results import Fidelity, Problem
from autoprune.space import load_space
from autoprune.studies import LadderPlan, RungPlan, open_storage, run_ladder
from autoprune.studies.warmstart import uniform, warm_starts

ROOT = Path(__file__).parents[2]
SPACES = {"lstm": "digits_lstm.yaml", "resnet20": "digits_resnet20.yaml"}
TARGETS = (0.5, 0.25)
SEEDS = 3
EPOCHS = {"resnet20": 4.0, "lstm": 6.0}


@dataclass(frozen=True)
class Setting:
    """One network, ready to be pruned."""

    name: str
    bench: Workbench
    problem: Problem
    epochs: float
    trials: int

    def share(self, model: nn.Module) -> float:
        """Returns the fraction of the dense network's MACs that a model needs."""
        return count_macs(model, self.bench.network.example_inputs) / self.problem.cost_model.dense()["macs"]


@dataclass(frozen=True)
class Outcome:
    """One run of one technique."""

    accuracy: float
    loss: float
    share: float


# --- techniques that are no part of the package -------------------------------------------------------------------


class _EveryWeight:
    """L1 or L2 on every weight by itself, as textbooks have it: no channel is looked at."""

    def __init__(self, network: Any, selection: Any, strength: float, *, power: int) -> None:
        self.weights = [p for p in network.model.parameters() if p.dim() > 1]
        self.taken = [strength * p.detach().abs().mean() for p in self.weights]
        self.strength, self.power = strength, power

    @contextmanager
    def hiding(self) -> Iterator[None]:
        yield

    @torch.no_grad()
    def shrink(self, progress: float, steps: int) -> None:
        for weight, taken in zip(self.weights, self.taken, strict=True):
            if self.power == 1:
                weight.copy_(weight.sign() * (weight.abs() - taken / steps).clamp_min(0))
            else:
                weight.mul_(1 - self.strength / steps)


class _Dropout:
    """Dropout on what every layer but the first reads, while the dense network trains."""

    def __init__(self, network: Any, selection: Any, strength: float) -> None:
        layers = [m for m in network.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        self.layers, self.strength = (layers[1:] or layers), strength

    @contextmanager
    def hiding(self) -> Iterator[None]:
        def drop(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (F.dropout(args[0], self.strength), *args[1:])

        handles = [layer.register_forward_pre_hook(drop) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def shrink(self, progress: float, steps: int) -> None:
        pass


def own_regularisers() -> None:
    """Adds the textbook regularisations to the package's table, for this process."""
    STRENGTHS.update(weights_l1=0.1, weights_l2=0.1, dropout=0.1)
    REGULARISERS["weights_l1"] = lambda n, s, strength: _EveryWeight(n, s, strength, power=1)
    REGULARISERS["weights_l2"] = lambda n, s, strength: _EveryWeight(n, s, strength, power=2)
    REGULARISERS["dropout"] = _Dropout


class _Relu6(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.relu, torch.relu, torch.relu_):
            return F.hardtanh(args[0], 0.0, 6.0)
        return func(*args, **(kwargs or {}))


class Capped(nn.Module):
    """A network in which every ReLU is a ReLU6."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with _Relu6():
            return self.model(x)


def factored(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns `(N, r)` and `(r, K)` whose product is the best of that rank for `weight` `(N, K)`."""
    u, s, v = torch.linalg.svd(weight.detach(), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


class LowRankLstm(nn.Module):
    """An LSTM (batch first, one direction) whose weight matrices are products of two thin ones."""

    def __init__(self, lstm: nn.LSTM, fraction: float) -> None:
        super().__init__()
        self.layers, self.hidden = lstm.num_layers, lstm.hidden_size
        self.factors = nn.ParameterDict()
        for layer in range(self.layers):
            for kind in ("ih", "hh"):
                weight = getattr(lstm, f"weight_{kind}_l{layer}")
                rank = max(1, round(fraction * min(weight.shape)))
                a, b = factored(weight, rank)
                self.factors[f"{kind}{layer}a"], self.factors[f"{kind}{layer}b"] = nn.Parameter(a), nn.Parameter(b)
            bias = getattr(lstm, f"bias_ih_l{layer}") + getattr(lstm, f"bias_hh_l{layer}")
            self.factors[f"bias{layer}"] = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Maps `(B, T, K)` to `(B, T, hidden)`."""
        p = self.factors
        for layer in range(self.layers):
            gates = F.linear(F.linear(x, p[f"ih{layer}b"]), p[f"ih{layer}a"], p[f"bias{layer}"])  # (B, T, 4H)
            h = c = gates.new_zeros(x.shape[0], self.hidden)
            out = []
            for step in range(x.shape[1]):
                now = gates[:, step] + F.linear(F.linear(h, p[f"hh{layer}b"]), p[f"hh{layer}a"])
                i, f, g, o = now.chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                out.append(h)
            x = torch.stack(out, 1)
        return x, None


def low_rank(model: nn.Module, fraction: float) -> nn.Module:
    """Returns a copy in which convolutions and LSTMs have the given fraction of their full rank, by SVD."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        if isinstance(module, nn.Conv2d) and module.in_channels > 3:
            flat = module.weight.reshape(module.out_channels, -1)
            rank = max(1, round(fraction * min(flat.shape)))
            a, b = factored(flat, rank)
            first = nn.Conv2d(module.in_channels, rank, module.kernel_size, module.stride, module.padding, bias=False)
            second = nn.Conv2d(rank, module.out_channels, 1, bias=module.bias is not None)
            with torch.no_grad():
                first.weight.copy_(b.reshape(first.weight.shape))
                second.weight.copy_(a[:, :, None, None])
                if module.bias is not None:
                    second.bias.copy_(module.bias)
            setattr(parent, name, nn.Sequential(first, second))
        elif isinstance(module, nn.LSTM):
            setattr(parent, name, LowRankLstm(module, fraction))
    return model


# --- running ------------------------------------------------------------------------------------------------------


def trained(setting: Setting, model: nn.Module, seed: int) -> Outcome:
    """Fine-tunes a network that was made by hand by the same recipe as the others, and scores it."""
    bench = setting.bench
    fine_tune(
        model,
        bench.splits.train,
        recipe=bench.recipe,
        epochs=setting.epochs,
        teacher=bench.network.model,
        seed=seed,
        precision=bench.training_precision,
        stage=Stage(),
    )
    found = evaluate(model, bench.splits.test)
    return Outcome(found.accuracy, found.loss, setting.share(model))


def by_recipe(criterion: str, **options: Any) -> Callable[[Setting, float, int], Outcome]:
    """Returns the technique of uniform pruning by `criterion` with other settings of the recipe."""

    def run(setting: Setting, target: float, seed: int) -> Outcome:
        return of_policy(setting, uniform(setting.problem, criterion, target), seed, **options)

    return run


def of_policy(setting: Setting, policy: Policy, seed: int, **options: Any) -> Outcome:
    """Evaluates a policy as a search does, on the test images."""
    bench = replace(setting.bench, seed=seed, recipe=replace(setting.bench.recipe, **options))
    scores = dict(bench.knowledge.scores)
    scores["random"] = score(Evidence(bench.network, seed=seed), ["random"])["random"]
    bench = replace(bench, knowledge=replace(bench.knowledge, scores=scores))
    result = bench.evaluate(policy, Fidelity("bench", epochs=setting.epochs, test=True))
    share = result.costs["macs"] / setting.problem.cost_model.dense()["macs"]
    return Outcome(result.metrics["test_accuracy"], result.metrics["test_loss"], share)


def relu6(setting: Setting, target: float, seed: int) -> Outcome:
    """Uniform L2 pruning, then fine-tuning with ReLU6 for ReLU."""
    policy = uniform(setting.problem, "l2", target)
    model = setting.bench.repair(setting.bench.selection(policy))
    return trained(setting, Capped(model), seed)


def svd(setting: Setting, target: float, seed: int) -> Outcome:
    """Low-rank factors of every layer, at the common fraction of full rank that meets the target."""
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if setting.share(low_rank(setting.bench.network.model, middle)) <= target else (low, middle)
        )
    return trained(setting, low_rank(setting.bench.network.model, low), seed)


_CHOSEN: dict[tuple[str, float], Policy] = {}


def searched(setting: Setting, target: float, seed: int) -> Outcome:
    """The best policy that a search finds on validation images, trained like the others."""
    key = setting.name, target
    if key not in _CHOSEN:
        _CHOSEN[key] = best_policy(setting, target)
    return of_policy(setting, _CHOSEN[key], seed)


def best_policy(setting: Setting, target: float) -> Policy:
    """Runs a ladder of two rungs, and returns the policy of the best validation loss after tuning."""
    limit = int(target * setting.problem.cost_model.dense()["macs"])
    budget = replace(setting.problem.budget, limits={"macs": limit}, span=(0.9 * target, target))
    problem = replace(setting.problem, budget=budget)
    bench = setting.bench
    rungs = (
        RungPlan(Fidelity("screen"), setting.trials),
        RungPlan(Fidelity("tune", epochs=setting.epochs), max(2, setting.trials // 6)),
    )
    starts = warm_starts(problem, bench.knowledge.scores, bench.knowledge.tables, count=setting.trials // 3)

    def submit(policy: Policy, fidelity: Fidelity) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(bench.evaluate(policy, fidelity))
        return future

    with tempfile.TemporaryDirectory() as folder:
        plan = LadderPlan("bench", problem, rungs, "bench", warm_starts=starts)
        storage = open_storage(Path(folder) / "studies.sqlite3")
        outcome = run_ladder(storage, plan, submit=submit, identity=bench.identity)
    tuned = [t.result for t in outcome.rungs["tune"] if t.result is not None]
    return min(tuned, key=lambda result: result.metrics["val_loss"]).policy


PLAIN = {"compensation": False}
TECHNIQUES: dict[str, Callable[[Setting, float, int], Outcome]] = {
    "random channels": by_recipe("random", **PLAIN),
    "magnitude, L1": by_recipe("l1", **PLAIN),
    "magnitude, L2": by_recipe("l2", **PLAIN),
    "magnitude, L2, merged": by_recipe("l2", compensation="merge"),
    "magnitude, L2, least squares": by_recipe("l2"),
    "L2, iterative in 3 steps": by_recipe("l2", schedule=Iterative(), **PLAIN),
    "L2, iterative in 3 steps, least squares": by_recipe("l2", schedule=Iterative()),
    "L1 on every weight before": by_recipe("l1", regularisation=Regularisation("bn_l1"), **PLAIN),
    "L2 on every weight before": by_recipe("l2", regularisation=Regularisation("bn_l1"), **PLAIN),
    "dropout before": by_recipe("l2", regularisation=Regularisation("bn_l1"), **PLAIN),
    "L1 on BatchNorm scales before": by_recipe("bn_scale", regularisation=Regularisation("bn_l1"), **PLAIN),
    "group lasso before": by_recipe("l2", regularisation=Regularisation("group_lasso"), **PLAIN),
    "growing L2 before": by_recipe("l2", regularisation=Regularisation("growing_l2"), **PLAIN),
    "targeted dropout before": by_recipe("l2", regularisation=Regularisation("targeted_dropout"), **PLAIN),
    "group lasso before, least squares": by_recipe("l2", regularisation=Regularisation("group_lasso")),
    "targeted dropout before, least squares": by_recipe("l2", regularisation=Regularisation("targeted_dropout")),
    "L2, least squares, ReLU6": relu6,
    "low rank by SVD": svd,
    "search": searched,
}
ABSENT = {"lstm": {"L1 on BatchNorm scales before", "L2, least squares, ReLU6"}}
"""What a network has no use for: an LSTM has no BatchNorm and no ReLU."""


def prepare(name: str, *, epochs: float, trials: int, cache: Path) -> Setting:
    """Reads the space, trains the dense network and gathers what pruning needs."""
    names = "[l1, l2, bn_scale, random, taylor, obs]"
    overrides = [f"criteria.choices={names}", "budget={macs: 1.0, front: [0.1, 1.0]}", "device=cpu"]
    space = load_space(ROOT / "search_spaces" / SPACES[name], overrides=overrides, env={})
    ingredients = preparing.ingredients_of(space, cache=cache)
    preparing.train_baseline(space, ingredients, cache=cache, note=print)
    network = preparing.trace_ingredients(ingredients, space)
    bench = preparing.workbench_of(space, ingredients, network, cache=cache, models=None, note=print)
    groups = settings.searchable_groups(network, space)
    problem = settings.problem_of(network, groups, space)
    return Setting(name, bench, problem, epochs, trials)


def row(setting: Setting, label: str, seeds: int) -> str:
    """Returns one line of the table: accuracy and loss at both targets."""
    cells = []
    start = time.perf_counter()
    for target in TARGETS:
        runs = [TECHNIQUES[label](setting, target, seed) for seed in range(seeds)]
        accuracies = [100 * run.accuracy for run in runs]
        spread = statistics.stdev(accuracies) if seeds > 1 else 0.0
        loss = statistics.fmean(run.loss for run in runs)
        print(f"  {label}, {target}: " + ", ".join(f"{a:.1f}" for a in accuracies), flush=True)
        cells += [f"{runs[0].share:.2f}", f"{statistics.fmean(accuracies):.1f} ± {spread:.1f}", f"{loss:.3f}"]
    print(f"  {label}: {time.perf_counter() - start:.0f} s", flush=True)
    return f"| {label} | " + " | ".join(cells) + " |"


def section(setting: Setting, rows: Iterable[str], seeds: int) -> list[str]:
    """Returns one network's table, printed line by line."""
    dense = evaluate(setting.bench.network.model, setting.bench.splits.test)
    macs = setting.problem.cost_model.dense()["macs"]
    lines = [
        f"## {setting.name} on digits",
        "",
        f"Dense: {macs:,} MACs, test accuracy {100 * dense.accuracy:.1f} %, loss {dense.loss:.3f} "
        f"({dense.count} images: one is {100 / dense.count:.2f} %). {setting.epochs:g} epochs a row, {seeds} seeds.",
        "",
        "| technique | MACs | accuracy, % | loss | MACs | accuracy, % | loss |",
        "|---" * 7 + "|",
    ]
    print("\n".join(lines), flush=True)
    for label in rows:
        if label in ABSENT.get(setting.name, ()):
            continue
        lines.append(row(setting, label, seeds))
        print(lines[-1], flush=True)
    return [*lines, ""]


def main() -> None:
    """Writes the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer candidates in the search; the rest is the same")
    parser.add_argument("--networks", nargs="+", choices=list(SPACES), default=list(SPACES))
    parser.add_argument("--rows", nargs="+", choices=list(TECHNIQUES), default=list(TECHNIQUES), metavar="ROW")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--cache", type=Path, default=Path(".autoprune/cache"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options.cache.mkdir(parents=True, exist_ok=True)
    own_regularisers()
    _own_rows()
    lines = [
        "# Techniques side by side",
        "",
        (__doc__ or "").split("\n\n", 2)[2].strip(),
        "",
        f"`make techniques`{' with --quick' if options.quick else ''}, {datetime.date.today()}, "
        f"{platform.machine()} CPU ({_processor()}), one thread, "
        f"Python {platform.python_version()}, torch {torch.__version__}.",
        "",
    ]
    for name in options.networks:
        trials = 18 if options.quick else 48
        lines += section(
            prepare(name, epochs=EPOCHS[name], trials=trials, cache=options.cache), options.rows, options.seeds
        )
        if options.output:
            options.output.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _own_rows() -> None:
    """Gives the rows of the textbook regularisations their kinds, which exist from `own_regularisers` on."""
    for label, criterion, kind in (
        ("L1 on every weight before", "l1", "weights_l1"),
        ("L2 on every weight before", "l2", "weights_l2"),
        ("dropout before", "l2", "dropout"),
    ):
        TECHNIQUES[label] = by_recipe(criterion, regularisation=Regularisation(kind), **PLAIN)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
