"""How near a trial comes to its bare forward and backward passes, and how that grows.

    AUTOPRUNE_DATA=... python tests/benchmarks/speed.py [--networks resnet20 resnet56 vit] [--repeats 3] [--steps 10]

`make bench-speed` calls it and keeps tests/benchmarks/results/bench-speed.md. Trials and bare loops run in turn in the
same process and are compared in processor time (on a GPU: elapsed time), so that the ratios stand on a busy machine.
ResNet-20 and ResNet-56 are trained networks on CIFAR-10; the vision transformer (a reduced ViT-B/16: same modules, 6
layers of width 192, 16 patches) has random weights and images. What grows with image size and groups is measured on
random images too: time does not depend on what is in them.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import time
from dataclasses import replace
from pathlib import Path

import torch

from autoprune.coordinator.profiling import bookkeeping_seconds
from autoprune.network import pipeline, profiling
from autoprune.network.data import as_splits
from autoprune.network.models import build_model
from autoprune.network.vision import import_torchvision
from autoprune.network.workbench import Workbench
from autoprune.policy import Policy, uniform_policy
from autoprune.results import Fidelity
from autoprune.space import Space, load_space

HOME = Path(".autoprune/bench-speed")
SPACES = Path("search_spaces")
GOALS = {"screen": 1.2, "tune": 1.05}
RATIO = 0.5


def space_of(network: str) -> Space:
    """Returns the settings: those of the network's own search, or of ResNet-20's."""
    name = network if network.startswith("resnet") else "resnet20"
    return load_space(SPACES / f"cifar10_{name}.yaml", overrides=[], env=os.environ)


def trained(network: str) -> tuple[Space, pipeline.Ingredients]:
    """Returns a trained network with CIFAR-10."""
    space = space_of(network)
    return space, pipeline.ingredients_of(space, cache=HOME)


def synthetic(network: str, size: int, count: int = 4096) -> tuple[Space, pipeline.Ingredients]:
    """Returns a network with random weights and random images of `size` pixels."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=draw)
    splits = as_splits({"train": (images, torch.arange(count) % 10)})
    torch.manual_seed(0)
    if network == "vit":
        import_torchvision()
        from torchvision.models import VisionTransformer

        model: torch.nn.Module = VisionTransformer(size, size // 4, 6, 6, 192, 384, num_classes=10)
    else:
        model = build_model(name=network, factory=None, arguments={}, weights=None, num_classes=10, seed=0)
    return space_of(network), pipeline.Ingredients(
        pipeline.prunable(model).eval(), splits, {}, f"random-{size}-{count}"
    )


def prepared(space: Space, ingredients: pipeline.Ingredients) -> tuple[Workbench, Policy, dict[str, float]]:
    """Returns the workbench, a uniform policy, and the processor time of its preparation."""
    start = time.process_time()
    network = pipeline.trace_ingredients(ingredients, space)
    traced = time.process_time() - start
    export = profiling.export_seconds(network)
    start = time.process_time()
    bench = pipeline.workbench_of(space, ingredients, network, cache=HOME, models=None, note=lambda text: None)
    learnt = time.process_time() - start
    policy = uniform_policy(bench.groups, RATIO, space.criteria.choices[0])
    return bench, policy, {"trace": traced, "export": export, "learning": learnt}


def fidelities(space: Space, images: int) -> list[Fidelity]:
    """Returns the rungs that are timed, each scored on `images` validation images."""
    rungs = {rung.rung: rung for rung in space.search.ladder}
    return [Fidelity(name, rungs[name].epochs, images) for name in ("screen", "tune")]


def ratios(networks: list[str], options: argparse.Namespace) -> list[str]:
    """Returns the table of trials beside their bare passes."""
    lines = [
        "| network | rung | trial | passes alone | ratio | goal | largest stages beyond their passes |",
        "|---|---|---|---|---|---|---|",
    ]
    for network in networks:
        space, ingredients = synthetic("vit", 32) if network == "vit" else trained(network)
        bench, policy, _ = prepared(space, ingredients)
        for fidelity in fidelities(space, options.images):
            found = profiling.profile_trial(bench, policy, fidelity, repeats=options.repeats, steps=options.steps)
            rest = sorted(found.stages, key=lambda stage: stage.floor - stage.seconds)[:2]
            named = ", ".join(f"{s.name.replace('_', ' ')} {s.seconds - s.floor:.2f} s" for s in rest)
            scaled = f" ({found.steps} of {found.whole_steps} steps)" if found.whole_steps > found.steps else ""
            line = f"| {network}, {len(bench.groups)} groups | {fidelity.rung}{scaled} | {found.seconds:.2f} s |"
            lines.append(f"{line} {found.floor:.2f} s | **{found.ratio:.2f}** | {GOALS[fidelity.rung]} | {named} |")
            print(lines[-1], flush=True)
    return lines


def growth(options: argparse.Namespace) -> list[str]:
    """Returns the table of what grows: image size and groups of a network, and candidates of a search."""
    lines = [
        "| network, random images | groups | trace | torch.export alone | learning | screen trial | ratio |"
        " bookkeeping a candidate, of 20 | of 80 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for network, size in options.growth:
        space, ingredients = synthetic(network, size, 1024)
        bench, policy, took = prepared(space, ingredients)
        screen = replace(fidelities(space, 200)[0])
        found = profiling.profile_trial(bench, policy, screen, repeats=1)
        problem = pipeline.problem_of(bench.network, bench.groups, space)
        around = [bookkeeping_seconds(space, bench, problem, policy, candidates=count) for count in (20, 80)]
        times = f"{took['trace']:.2f} s | {took['export']:.2f} s | {took['learning']:.2f} s | {found.seconds:.2f} s"
        shown = " | ".join(f"{1000 * seconds:.0f} ms" for seconds in around)
        lines.append(f"| {network}, {size} px | {len(bench.groups)} | {times} | {found.ratio:.2f} | {shown} |")
        print(lines[-1], flush=True)
    return lines


def machine() -> str:
    """Returns hardware and versions in a line."""
    cpu = platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    threads = f"{torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"
    return f"{cpu}, {threads}, {gpu}; Python {platform.python_version()}, torch {torch.__version__}."


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56", "vit"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("tests/benchmarks/results/bench-speed.md"))
    options = parser.parse_args()
    options.growth = [("resnet20", 32), ("resnet20", 64), ("resnet56", 32), ("vit", 32)]
    if "AUTOPRUNE_DATA" not in os.environ:
        raise SystemExit("AUTOPRUNE_DATA must name the folder with cifar10-jpeg.tar.xz and the weights")
    HOME.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    text = [
        "# How near a trial comes to its bare passes (`make bench-speed`)",
        "",
        machine(),
        "",
        f"Processor time (on a GPU: elapsed time); medians of {options.repeats} trials and as many bare loops in turn; "
        f"{options.images:,} validation images, 512 calibration images; half of every group's channels removed, by l1. "
        f"Of a training {options.steps} steps are run and scaled. Load of the machine when it began: {load:.1f}.",
        "",
        *ratios(options.networks, options),
        "",
        "What grows (one repeat, 200 validation images, 256 calibration images; learning without any cache):",
        "",
        *growth(options),
        "",
        f"Peak resident size of all of this in one process: "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB.",
        "",
    ]
    options.output.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
