"""Makes the benchmark's table and plots out of what the contenders left.

The hypervolume is taken over (error, fraction of the dense MACs) with the reference point of `common`, in the range of
costs that the contenders were asked for: what is cheaper than the least budget counts as being at it. Its interval is a
bootstrap over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import numpy as np
from common import BUDGETS, REFERENCE

from autoprune.pareto import hypervolume

LEAST = min(BUDGETS)
"""The least budget: no contender was asked for less, so that nothing is gained below it."""
OURS = ("autoprune", "autoprune, 75 s")
RESULTS = Path(__file__).parents[1] / "results"


def interval(values: list[float]) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of the mean."""
    if len(values) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    means = rng.choice(np.array(values), size=(4000, len(values))).mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def read(folder: Path, epochs: float) -> dict[str, dict[str, list[dict[str, object]]]]:
    """Returns network → contender → one document a seed."""
    found: dict[str, dict[str, list[dict[str, object]]]] = {}
    for file in sorted(folder.glob(f"*/seed*/*/finished-{epochs}.json")):
        run = json.loads((file.parent / "run.json").read_text(encoding="utf-8"))
        lines = (file.parent / "candidates.jsonl").read_text(encoding="utf-8").splitlines()
        document = {
            **run,
            "rows": json.loads(file.read_text(encoding="utf-8")),
            "candidates": list(map(json.loads, lines)),
        }
        found.setdefault(run["network"], {}).setdefault(run["name"], []).append(document)
    return found


def volume(rows: dict[str, dict[str, float]], key: str, least: float = LEAST) -> float:
    """Returns the hypervolume of the picks' test errors before or after fine-tuning, from the `least` cost on."""
    points = [(1 - row[key], max(least, row["macs"])) for name, row in rows.items() if name != "dense" and key in row]
    return hypervolume(points, REFERENCE)


def volume_of_candidates(candidates: list[dict[str, float]]) -> float:
    """Returns the hypervolume of candidates' validation errors, where their cost is known."""
    known = [c for c in candidates if math.isfinite(c["macs"])]
    return hypervolume([(1 - c["val_accuracy"], max(LEAST, c["macs"])) for c in known], REFERENCE)


def within_budgets(rows: dict[str, dict[str, float]], key: str) -> float:
    """Returns the hypervolume with every pick at its budget: nothing is gained by what it leaves of it."""
    points = [(1 - row[key], float(name)) for name, row in rows.items() if name != "dense" and key in row]
    return hypervolume(points, REFERENCE)


def mean_accuracy(rows: dict[str, dict[str, float]], key: str, span: tuple[float, float] = (0.35, 0.70)) -> float:
    """Returns the mean accuracy over a span of MACs, by straight lines between the picks and the dense network.

    Where on the axis the picks stand neither gains nor loses anything. NaN where no pick reaches the span's lower end.
    """
    picks = {row["macs"]: row[key] for name, row in rows.items() if name != "dense" and key in row}
    macs, accuracies = zip(*sorted({**picks, 1.0: rows["dense"]["before"]}.items()), strict=True)
    return float(np.interp(np.linspace(*span, 201), macs, accuracies).mean()) if macs[0] <= span[0] else math.nan


def spread_of(values: list[float], form: str) -> str:
    """Returns the mean with the standard deviation, where there are several values."""
    deviation = f" ± {format(np.std(values, ddof=1), form)}" if len(values) > 1 else ""
    return f"{format(fmean(values), form)}{deviation}"


def time_to(documents: list[dict[str, object]], goal: float) -> float | None:
    """Returns the mean seconds until the hypervolume of the candidates' validation errors reaches `goal`."""
    times = []
    for document in documents:
        seen: list[dict[str, float]] = []
        reached = None
        for candidate in sorted(document["candidates"], key=lambda c: c["seconds"]):
            seen.append(candidate)
            if volume_of_candidates(seen) >= goal:
                reached = candidate["seconds"]
                break
        if reached is None:
            return None
        times.append(reached)
    return fmean(times)


def table(network: str, contenders: dict[str, list[dict[str, object]]]) -> list[str]:
    """Returns one network's table."""
    budgets = sorted({b for docs in contenders.values() for d in docs for b in d["rows"] if b != "dense"}, reverse=True)
    dense = next(iter(contenders.values()))[0]["rows"]["dense"]["before"]
    lines = [f"## {network} (dense: {100 * dense:.1f} % on the test images)", ""]
    for key, title in (("before", "Before fine-tuning"), ("after", "After fine-tuning")):
        if not any(
            key in row for docs in contenders.values() for d in docs for n, row in d["rows"].items() if n != "dense"
        ):
            continue
        head = [
            f"{title}: test accuracy, %",
            *[f"{b} MACs" for b in budgets],
            "hypervolume",
            "95 % interval",
            "also below",
            "at the budgets",
            "mean accuracy",
            "search, s",
            "candidates",
        ]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for name, documents in sorted(
            contenders.items(), key=lambda item: -fmean(volume(d["rows"], key) for d in item[1])
        ):
            cells = [name]
            for budget in budgets:
                scores = [100 * d["rows"][budget][key] for d in documents if key in d["rows"].get(budget, {})]
                cells.append(spread_of(scores, ".1f") if scores else "–")
            volumes = [volume(d["rows"], key) for d in documents]
            low, high = interval(volumes)
            cells += [f"{fmean(volumes):.4f}", f"{low:.4f} to {high:.4f}" if math.isfinite(low) else "one seed"]
            cells.append(spread_of([volume(d["rows"], key, 0.0) for d in documents], ".4f"))
            cells.append(spread_of([within_budgets(d["rows"], key) for d in documents], ".4f"))
            means = [100 * mean_accuracy(d["rows"], key) for d in documents]
            cells.append(spread_of(means, ".2f") if all(map(math.isfinite, means)) else "–")
            cells.append(f"{fmean(d['seconds'] for d in documents):.0f}")
            cells.append(", ".join(str(len(d["candidates"])) for d in documents))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return lines + speed(contenders)


def speed(contenders: dict[str, list[dict[str, object]]]) -> list[str]:
    """Says how long autoprune takes to reach the best peer's last hypervolume on the validation images."""
    goals = {}
    for name, documents in contenders.items():
        if not name.startswith("autoprune"):
            goals[name] = fmean(volume_of_candidates(d["candidates"]) for d in documents)
    if not goals or "autoprune" not in contenders:
        return []
    peer = max(goals, key=lambda name: goals[name])
    ours = time_to(contenders["autoprune"], goals[peer])
    theirs = fmean(d["seconds"] for d in contenders[peer])
    reached = "does not reach" if ours is None else f"reaches after {ours:.0f} s"
    line = f"On the validation images autoprune {reached} the last hypervolume of the best peer "
    lines = [line + f"({peer}: {goals[peer]:.4f} after {theirs:.0f} s); preparation is counted."]
    after = {
        name: (fmean(volume(d["rows"], "after") for d in documents), fmean(d["seconds"] for d in documents))
        for name, documents in contenders.items()
        if all("after" in row for d in documents for n, row in d["rows"].items() if n != "dense")
    }
    peers = {name: found for name, found in after.items() if not name.startswith("autoprune")}
    if peers:
        peer = max(peers, key=lambda name: peers[name][0])
        goal, theirs = peers[peer]
        lines += [
            f"After the same fine-tuning {name} has a hypervolume of {reached_volume:.4f} from {seconds:.0f} s of "
            f"search, the best peer ({peer}) one of {goal:.4f} from {theirs:.0f} s: {seconds / theirs:.3f} of its time."
            for name, (reached_volume, seconds) in after.items()
            if name in OURS and reached_volume >= goal
        ]
    return [*lines, ""]


def plot(network: str, contenders: dict[str, list[dict[str, object]]], file: Path) -> None:
    """Draws accuracy against MACs before and after fine-tuning, and hypervolume against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    for number, (name, documents) in enumerate(sorted(contenders.items())):
        style = {"color": f"C{number}", "label": name, "marker": "o", "markersize": 4}
        for axis, key in zip(axes, ("before", "after"), strict=False):
            points = sorted(
                (row["macs"], 100 * row[key])
                for d in documents
                for n, row in d["rows"].items()
                if n != "dense" and key in row
            )
            if points:
                axis.plot(*zip(*points, strict=True), **style, linestyle="-" if len(documents) == 1 else "")
        ordered = sorted(documents[0]["candidates"], key=lambda c: c["seconds"])
        curve = [
            (c["seconds"], volume_of_candidates(ordered[: number + 1]))
            for number, c in enumerate(ordered)
            if math.isfinite(c["macs"])
        ]
        if curve:
            axes[2].plot(*zip(*curve, strict=True), color=f"C{number}", label=name)
    for axis, title in zip(axes, ("before fine-tuning", "after fine-tuning", "search, seed 0"), strict=True):
        axis.set_title(f"{network}, {title}")
        axis.grid(alpha=0.3)
    for axis in axes[:2]:
        axis.set_xlabel("MACs, fraction of the dense network's")
        axis.set_ylabel("test accuracy, %")
    axes[2].set_xscale("log")
    axes[2].set_xlabel("seconds")
    axes[2].set_ylabel("hypervolume of the candidates (validation)")
    axes[2].legend(fontsize=7)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def render(folder: Path, options: argparse.Namespace) -> None:
    """Writes `bench-<tag>.md` and its plots."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = read(folder, options.epochs)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "optuna", "numpy"))
    what = (
        f"CIFAR-10 (JPEG copy), {options.seeds} seed(s), {options.seconds:.0f} s of search where a contender takes a "
        "time (thrice for ResNet-56), 2,000 validation images a candidate, 512 calibration images; test: the 5,000 "
        f"images that no search sees; {options.epochs} epochs of fine-tuning with distillation for all. Reference "
        f"point of the hypervolume: error {REFERENCE[0]}, MACs {REFERENCE[1]}; a pick cheaper than the least budget, "
        f"{LEAST}, counts as being at it, as none was asked for ('also below': it does not); 'at the budgets' puts "
        "every pick at its budget, so that what a pick leaves of it counts nothing; 'mean accuracy' is that over 0.35 "
        "to 0.70 MACs by straight lines between the picks and the dense network, so that it does not count where the "
        "picks stand. Spread: standard deviation over seeds."
    )
    where = (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {options.jobs} contenders at a time, "
        f"one thread each, no GPU; Python {platform.python_version()}, {versions}, Torch-Pruning 1.6.1, "
        "nvidia-modelopt 0.47.0."
    )
    title = f"# Fronts of autoprune and its peers (`make bench{'-quick' if options.quick else ''}`)"
    lines = [title, "", what, "", where, ""]
    for network, contenders in sorted(found.items()):
        lines += table(network, contenders)
        plot(network, contenders, RESULTS / f"bench-{options.tag}-{network}.png")
        lines += [f"![{network}](bench-{options.tag}-{network}.png)", ""]
    (RESULTS / f"bench-{options.tag}.md").write_text("\n".join(lines), encoding="utf-8")
