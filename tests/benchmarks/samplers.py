"""Which sampler to trust with how many groups and candidates: whole screens on a surrogate that costs no network.

    python tests/benchmarks/samplers.py [--whole] [--groups 9 27 60] [--candidates 30 100] [--seeds 3] [--output FILE]

`make samplers` calls it; `--whole` adds 300 candidates, and the Gaussian process where its asks are slow (hours). The
surrogate is made of measured parts: the error curves of the inner groups of ResNet-20 and
ResNet-56, the weights with which they add up to ResNet-20's loss, and what 360 measured policies leave unexplained:
half of it as products of two groups' errors, half as noise. 60 groups are those of a ResNet with 20 blocks a stage, its
curves taken from ResNet-56. Every contender goes through the real ladder: warm starts, projection, mirror, storage.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np
import optuna

from autoprune.budget import resolve_budget
from autoprune.cost import CostModel, Form, Term
from autoprune.pareto import front_indices, hypervolume
from autoprune.policy import Group, Policy, feasible_widths
from autoprune.results import Fidelity, Problem, TrialResult
from autoprune.studies import LadderPlan, RungPlan, run_ladder
from autoprune.studies.warmstart import warm_starts

HERE = Path(__file__).parent
REFERENCE = (0.5, 1.0)
"""Error and fraction of the dense MACs below which the hypervolume is measured, as in `make bench`."""
CONTENDERS: Mapping[str, tuple[str | None, bool]] = {
    "warm starts alone": (None, True),
    "random": ("random", True),
    "TPE without warm starts": ("tpe", False),
    "TPE": ("tpe", True),
    "NSGA-II": ("nsga2", True),
    "GP": ("gp", True),
    "learned additive": ("learned", True),
    "auto": ("auto", True),
}
"""Name → sampler, and whether the warm starts go first."""
WARM_STARTS = 24
"""The most that a search tries, as in `coordinator.running.session`."""
CANDIDATES, WHOLE = (30, 100), (30, 100, 300)
SLOW, SMALL = "GP", (9, 30)
"""The contender that is left out beyond so many groups and candidates, unless the whole comparison is asked for."""
PATIENCE = 1.0
"""Processor seconds of a screen trial: where a shorter run asked longer than that, longer runs are not tried."""
LOSS = (0.343, 0.838, 0.127)
"""Validation loss as a polynomial of the weighted sum of errors, fitted to 360 policies of ResNet-20."""
ACCURACY = (0.9925, -0.3004, 0.0173)
"""Accuracy as a polynomial of the loss; the policies scatter around it by `ACCURACY_NOISE`."""
ACCURACY_NOISE = 0.006
UNEXPLAINED = 0.031
"""Standard deviation of the loss that the weighted sum does not explain."""


@dataclass
class Surrogate:
    """Stands for a network: gives a policy's loss and accuracy without one.

    `submitted` and `answered` are the processor times at which candidates came and went.
    """

    problem: Problem
    tables: Mapping[str, Mapping[str, list[float]]]
    scores: Mapping[str, Mapping[str, list[float]]]
    weights: Mapping[str, Mapping[str, float]]
    pairs: np.ndarray
    seed: int
    submitted: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)

    def truth(self, policy: Policy) -> tuple[float, float]:
        """Returns the loss and the accuracy without noise."""
        widths = policy.widths(self.problem.groups)
        parts = np.array(
            [
                self.weights[g.name][policy.choices[g.name].criterion]
                * self.tables[g.name][policy.choices[g.name].criterion][widths[g.name]]
                for g in self.problem.groups
            ]
        )
        total = float(parts.sum())
        level = parts / max(total, 1e-12) * math.sqrt(len(parts))  # about one each: the pairs weigh what the sum does
        mixed = float(level @ self.pairs @ level) * min(total, 1.0)
        loss = LOSS[0] + LOSS[1] * total + LOSS[2] * total**2 + mixed
        return loss, ACCURACY[0] + ACCURACY[1] * loss + ACCURACY[2] * loss**2

    def __call__(self, policy: Policy, fidelity: Fidelity) -> Future[TrialResult]:
        """Evaluates at once; the noise belongs to the policy, as it does where all see the same images."""
        self.submitted.append(time.process_time())
        loss, accuracy = self.truth(policy)
        rng = np.random.default_rng([self.seed, int(policy.id, 16)])
        loss += float(rng.normal()) * UNEXPLAINED * math.sqrt(0.5)
        accuracy = min(1.0, max(0.0, accuracy + float(rng.normal()) * ACCURACY_NOISE))
        widths = policy.widths(self.problem.groups)
        costs = self.problem.cost_model.costs(widths)
        metrics = {"val_accuracy": accuracy, "val_loss": loss}
        future: Future[TrialResult] = Future()
        future.set_result(TrialResult(policy, policy.id, fidelity, widths, costs, metrics))
        self.answered.append(time.process_time())
        return future

    @property
    def asks(self) -> list[float]:
        """Processor seconds from the end of one evaluation to the beginning of the next one: storing and asking."""
        return [b - a for a, b in zip(self.answered, self.submitted[1:], strict=False)]


def surrogate(count: int, seed: int) -> Surrogate:
    """Returns the surrogate of a CIFAR ResNet with `count` inner groups, a third in each stage; `seed` draws what no
    measurement gives: weights beyond the nine known ones, interactions and noise.
    """
    known = json.loads((HERE / "samplers_curves.json").read_text(encoding="utf-8"))
    criteria, nine = known["criteria"], count == 9
    source = known["networks"]["resnet20" if nine else "resnet56"]
    rng = np.random.default_rng([seed, count])
    blocks, rows = count // 3, len(source["groups"]) // 3
    groups, tables, scores, weights = [], {}, {}, {}
    factors = []
    for i in range(count):
        stage, block = divmod(i, blocks)
        row = stage * rows + min(rows - 1, block * rows // blocks)
        entry, size = source["groups"][row], source["groups"][row]["size"]
        name = f"layer{stage + 1}.{block}.conv1"
        groups.append(Group(name, size, feasible_widths(size, min_ratio=0.0, max_ratio=0.95), name))
        grid = np.arange(17) * size / 16
        tables[name] = {
            c: np.interp(np.arange(size + 1), grid, curve).tolist()
            for c, curve in zip(criteria, entry["curves"], strict=True)
        }
        scores[name] = np.interp(np.linspace(0, 16, size), np.arange(17), entry["scores"]).tolist()
        place = block * 3 / blocks  # the weight of a block is that of the block of ResNet-20 at its place
        measured = known["weights"][3 * stage : 3 * stage + 3]
        spread = 1.0 if nine else math.exp(0.4 * rng.normal())
        weights[name] = float(np.interp(place, [0, 1, 2], measured)) * 3 / blocks * spread
        factors.append(source["channel_macs"][row])
    fixed = Term(source["fixed_macs"])
    macs = (fixed, *(Term(factor, (Form(0, ((i, 1),)),)) for i, factor in enumerate(factors)))
    params = tuple(Term(18, (Form(0, ((i, 1),)),)) for i in range(count))
    sizes = tuple(group.size for group in groups)
    model = CostModel(tuple(g.name for g in groups), sizes, macs, params, params, live=((Term(1),),))
    budget = resolve_budget({"macs": 0.7}, model, tuple(groups), front=(0.3, 0.7))
    problem = Problem(tuple(groups), model, budget, tuple(criteria))
    by_criterion = {
        name: {
            c: weights[name] * factor * math.exp(0.1 * rng.normal())
            for c, factor in zip(criteria, known["factors"], strict=True)
        }
        for name in weights
    }
    # Products of two groups' levels: their spread over policies is the share of the residual that pairs explain.
    pairs = rng.normal(size=(count, count)) * UNEXPLAINED * math.sqrt(0.5) / count
    ranking = dict.fromkeys(criteria, scores)
    return Surrogate(problem, tables, ranking, by_criterion, pairs, seed)


@dataclass(frozen=True)
class Run:
    """One screen: the true hypervolume of what it calls its front, and the median seconds of its last asks."""

    hypervolume: float
    ask: float


def screen(contender: str, groups: int, candidates: int, *, seed: int) -> Run:
    """Runs one contender's screen."""
    sampler, warm = CONTENDERS[contender]
    stand_in = surrogate(groups, seed)
    problem = stand_in.problem
    count = candidates if sampler is None else max(1, min(WARM_STARTS, candidates // 2))
    starts = warm_starts(problem, stand_in.scores, stand_in.tables, count=count) if warm else ()
    plan = LadderPlan(
        name="samplers",
        problem=problem,
        rungs=(RungPlan(Fidelity("screen"), candidates), RungPlan(Fidelity("unused"), 1)),
        fingerprint="samplers",
        warm_starts=starts,
        sampler=sampler,
        seed=seed,
        tables=stand_in.tables,
    )
    found = run_ladder(optuna.storages.InMemoryStorage(), plan, submit=stand_in, identity=lambda policy: policy.id)
    results = [trial.result for trial in found.rungs["screen"] if trial.result is not None]
    dense = problem.cost_model.cost("macs", {})
    seen = [(r.val_error, r.costs["macs"] / dense) for r in results]
    front = [results[i] for i in front_indices(seen)]
    true = [(1.0 - stand_in.truth(r.policy)[1], r.costs["macs"] / dense) for r in front]
    return Run(hypervolume(true, REFERENCE), median(stand_in.asks[-12:-2]))


class Journal:
    """Runs screens once: what a file holds already is read from it."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[tuple[object, ...], Run] = {}
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                *key, volume, ask = json.loads(line)
                self._known[tuple(key)] = Run(volume, ask)

    def run(self, contender: str, groups: int, candidates: int, *, seed: int) -> Run:
        """Returns one screen's outcome."""
        key = (contender, groups, candidates, seed)
        if key not in self._known:
            found = self._known[key] = screen(contender, groups, candidates, seed=seed)
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps([*key, found.hypervolume, found.ask]) + "\n")
        return self._known[key]


def compare(options: argparse.Namespace) -> dict[tuple[int, int], dict[str, list[Run]]]:
    """Runs every contender at every size; those whose asks take too long leave out the longer runs."""
    table: dict[tuple[int, int], dict[str, list[Run]]] = {}
    journal = Journal(options.journal)
    for groups in options.groups:
        slow: set[str] = set()
        for candidates in options.candidates:
            rows: dict[str, list[Run]] = {}
            for name in options.contenders:
                if name in slow or (name == SLOW and not options.whole and (groups, candidates) > SMALL):
                    continue
                rows[name] = [journal.run(name, groups, candidates, seed=seed) for seed in range(options.seeds)]
                if median(run.ask for run in rows[name]) > options.patience:
                    slow.add(name)
                said = " ".join(f"{run.hypervolume:.4f}" for run in rows[name])
                print(f"{groups} groups, {candidates} candidates, {name}: {said}; ask {rows[name][0].ask:.3f} s")
            table[groups, candidates] = rows
    return table


def render(table: Mapping[tuple[int, int], Mapping[str, list[Run]]], options: argparse.Namespace) -> str:
    """Returns the comparison as Markdown."""
    lines = [
        "# Samplers on a surrogate (`make samplers`)",
        "",
        "The hypervolume (reference: error 0.5, MACs 1.0; true errors of the points that look best) of a screen on a "
        "surrogate of CIFAR ResNets: measured error curves and weights, with the interactions and the noise that "
        f"ResNet-20 shows. Mean and standard deviation over {options.seeds} seeds; each seed is another network. In "
        "brackets the seconds of an ask, late in the run, with storing.",
        "",
        f"optuna {optuna.__version__}, numpy {np.__version__}. Not tried: "
        + (
            ""
            if options.whole
            else f"{SLOW} beyond {SMALL[0]} groups and {SMALL[1]} candidates (`--whole`), and where "
        )
        + f"an ask of the shorter run took more than "
        f"{options.patience:g} s, what a screen trial takes.",
    ]
    for groups in options.groups:
        columns = [c for c in options.candidates if (groups, c) in table]
        lines += ["", f"## {groups} groups", ""]
        lines += ["| sampler | " + " | ".join(f"{c} candidates" for c in columns) + " |"]
        lines += ["|---|" + "---|" * len(columns)]
        for name in options.contenders:
            cells = [_cell(table[groups, c].get(name)) for c in columns]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(runs: list[Run] | None) -> str:
    if runs is None:
        return "not tried"
    values = [run.hypervolume for run in runs]
    spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{fmean(values):.4f}{spread} ({median(run.ask for run in runs):.2f} s)"


def main() -> None:
    """Runs the comparison and writes its table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--groups", nargs="+", type=int, default=[9, 27, 60])
    parser.add_argument("--candidates", nargs="+", type=int, help="default: 30 and 100")
    parser.add_argument("--whole", action="store_true", help="also 300 candidates, and GP at every size (hours)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=PATIENCE)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--journal", type=Path, help="a file of finished runs: they are not repeated")
    options = parser.parse_args()
    options.candidates = options.candidates or list(WHOLE if options.whole else CANDIDATES)
    text = render(compare(options), options)
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
