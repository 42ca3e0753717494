"""How near a trial comes to its bare forward and backward passes, and how that grows.

    AUTOPRUNE_DATA=... python tests/benchmarks/speed.py [--device auto] [--networks resnet20 resnet56 vit] [--repeats 3]

`make bench-speed` calls it and keeps tests/benchmarks/results/bench-speed.md. Trials and bare loops run in turn in the
same process and are compared in processor time (on a GPU: elapsed time), so that the ratios stand on a busy machine.
A GPU is taken where there is one; its file is tests/benchmarks/results/bench-speed-cuda.md, and tells which part of the
time its kernels run (the trial's profile). There the bare loop launches every kernel, while a trial replays captured
steps, so a ratio may be below 1.
ResNet-20 and ResNet-56 are trained networks on CIFAR-10; the vision transformer has random weights and images. It is
ViT-B/16 with 6 layers instead of 12 and width 192 instead of 768: same modules, same 196 patches. What grows with image
size and groups is measured on random images too: time does not depend on what is in them. What an earlier run has
measured is kept (`--fresh`: not).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from autoprune.coordinator.commands.profiling import bookkeeping_seconds
from autoprune.cost import MACS
from autoprune.memory import keep_freed
from autoprune.network import preparing, profiling, settings
from autoprune.network.data.loading import as_splits
from autoprune.network.devices.device import device_name, resolve_device
from autoprune.network.models.building import build_model
from autoprune.network.models.torchvision import import_torchvision
from autoprune.network.tracing.trace import trace
from autoprune.network.workbench import Workbench
from autoprune.policy import Policy, uniform_policy
from autoprune.results import Fidelity
from autoprune.space import Space, load_space
from autoprune.studies.pricing import costs_many

HOME = Path(".autoprune/bench-speed")
SPACES = Path("search_spaces")
RESULTS = Path("tests/benchmarks/results")
GROWTH = (("resnet20", 32), ("resnet20", 64), ("resnet56", 32), ("vit", 32), ("vit", 56))
TRANSFORMER = {"patch_size": 4, "num_layers": 6, "num_heads": 6, "hidden_dim": 192, "mlp_dim": 768}
"""At 56 px it has the 196 patches of ViT-B/16 at 224 px."""
TRACED = ("resnet20", "resnet56", "resnet50", "vit_b_16")
LARGE = ("resnet50", "vit_b_16")
GOALS = {"screen": 1.2, "tune": 1.05}
RATIO = 0.5


def space_of(network: str, device: str) -> Space:
    """Returns the settings: those of the network's own search, or of ResNet-20's."""
    name = network if network.startswith("resnet") else "resnet20"
    return load_space(SPACES / f"cifar10_{name}.yaml", overrides=[f"device={device}"], env=os.environ)


def trained(network: str, device: str) -> tuple[Space, preparing.Ingredients]:
    """Returns a trained network with CIFAR-10."""
    space = space_of(network, device)
    return space, preparing.ingredients_of(space, cache=HOME)


def synthetic(network: str, size: int, device: str, count: int = 4096) -> tuple[Space, preparing.Ingredients]:
    """Returns a network with random weights and random images of `size` pixels."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=draw)
    splits = as_splits({"train": (images, torch.arange(count) % 10)})
    torch.manual_seed(0)
    if network == "vit":
        import_torchvision()
        from torchvision.models import VisionTransformer

        model: torch.nn.Module = VisionTransformer(size, **TRANSFORMER, num_classes=10)
    else:
        model = build_model(name=network, factory=None, arguments={}, weights=None, num_classes=10, seed=0)
    return space_of(network, device), preparing.Ingredients(
        preparing.prunable(model).eval(), splits, {}, f"random-{size}-{count}"
    )


def prepared(space: Space, ingredients: preparing.Ingredients) -> tuple[Workbench, Policy, dict[str, float]]:
    """Returns the workbench, a uniform policy, and the time of its preparation."""
    clock = profiling.clock_of(space.device)
    preparing.trace_ingredients(ingredients, space)  # loads what is loaded on first use, as before the export alone
    start = clock()
    network = preparing.trace_ingredients(ingredients, space)
    traced = clock() - start
    export = profiling.export_seconds(network, clock)
    with tempfile.TemporaryDirectory() as folder:
        preparing.trace_ingredients(ingredients, space, cache=Path(folder))  # kept
        start = clock()
        network = preparing.trace_ingredients(ingredients, space, cache=Path(folder))
        read = clock() - start
    start = clock()
    bench = preparing.workbench_of(space, ingredients, network, cache=HOME, models=None, note=lambda text: None)
    learnt = clock() - start
    policy = uniform_policy(bench.groups, RATIO, space.criteria.choices[0])
    return bench, policy, {"trace": traced, "export": export, "kept": read, "learning": learnt}


def fidelities(space: Space, images: int) -> list[Fidelity]:
    """Returns the rungs that are timed, each scored on `images` validation images."""
    rungs = {rung.rung: rung for rung in space.search.ladder}
    return [Fidelity(name, rungs[name].epochs, images) for name in ("screen", "tune")]


def kept(key: str, measure: Callable[[], str], options: argparse.Namespace) -> str:
    """Returns a row of a table: the one of an earlier run where there is one, else a new one, which is kept."""
    path = HOME / "rows.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if key not in rows or options.fresh:
        rows[key] = measure()
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        print(rows[key], flush=True)
    return str(rows[key])


def busy(bench: Workbench, policy: Policy, fidelity: Fidelity, options: argparse.Namespace) -> str:
    """Returns which part of a trial's time kernels of the GPU run; the profiler slows the host, so it is a lower bound.

    The trial is the shortened one that was timed before.
    """
    if torch.device(bench.device).type != "cuda":
        return "no GPU"
    short, _, _ = profiling.shortened(bench, fidelity, options.steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        torch.cuda.synchronize()
        start = time.perf_counter()
        bench.evaluate(policy, short)
        torch.cuda.synchronize()
        took = time.perf_counter() - start
    return f"{sum(event.self_device_time_total for event in recorded.key_averages()) / 1e6 / took:.0%}"


def ratio_row(network: str, rung: str, options: argparse.Namespace) -> str:
    """Returns a trial beside its bare passes, as a row."""
    device = options.device
    space, ingredients = synthetic("vit", 56, device) if network == "vit" else trained(network, device)
    bench, policy, _ = prepared(space, ingredients)
    fidelity = next(f for f in fidelities(space, options.images) if f.rung == rung)
    found = profiling.profile_trial(bench, policy, fidelity, repeats=options.repeats, steps=options.steps)
    rest = sorted(found.stages, key=lambda stage: stage.floor - stage.seconds)[:2]
    named = ", ".join(f"{s.name.replace('_', ' ')} {s.seconds - s.floor:.2f} s" for s in rest)
    scaled = f" ({found.steps} of {found.whole_steps} steps)" if found.whole_steps > found.steps else ""
    cells = [
        f"{network}, {len(bench.groups)} groups",
        f"{rung}{scaled}",
        f"{options.images:,}",
        f"{options.repeats}",
        f"{found.seconds:.2f} s",
        f"{found.floor:.2f} s",
        f"**{found.ratio:.2f}**",
        f"{GOALS[rung]}",
        busy(bench, policy, fidelity, options),
        named,
    ]
    return f"| {' | '.join(cells)} |"


def growth_row(network: str, size: int, device: str) -> str:
    """Returns what a network of random weights costs at an image size, as a row."""
    space, ingredients = synthetic(network, size, device, 1024)
    bench, policy, took = prepared(space, ingredients)
    found = profiling.profile_trial(bench, policy, fidelities(space, 200)[0], repeats=1)
    problem = settings.problem_of(bench.network, bench.groups, space)
    around = [bookkeeping_seconds(space, bench, problem, policy, candidates=count) for count in (20, 80)]
    seconds = [*took.values(), found.seconds]
    cells = [f"{network}, {size} px", f"{len(bench.groups)}", *(f"{value:.2f} s" for value in seconds)]
    cells += [f"{found.ratio:.2f}", *(f"{1000 * value:.0f} ms" for value in around)]
    return f"| {' | '.join(cells)} |"


def untrained(network: str) -> torch.nn.Module:
    """Returns one of the networks that are traced, with random weights, in eval mode."""
    torch.manual_seed(0)
    if network in LARGE:
        return import_torchvision().models.get_model(network).eval()
    return build_model(name=network, factory=None, arguments={}, weights=None, num_classes=10, seed=0).eval()


def example_of(network: str) -> torch.Tensor:
    """Returns two empty images of the size that the network takes."""
    size = 224 if network in LARGE else 32
    return torch.zeros(2, 3, size, size)


def trace_row(network: str, options: argparse.Namespace) -> str:
    """Returns a trace of a model beside its plain export, as a row; in turn, the medians."""
    model, example = untrained(network), example_of(network)
    runs: dict[str, Callable[[], object]] = {
        "export": lambda: torch.export.export(model, (example,), strict=False),
        "unverified": lambda: trace(model, example, verify=False),
        "whole": lambda: trace(model, example),
    }
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            with torch.no_grad():
                run()
            took[name].append(time.process_time() - start)
    export, unverified, whole = (median(took[name][1:]) for name in runs)  # the first ones load what is loaded once
    spread = f"{min(took['whole'][1:]):.2f} to {max(took['whole'][1:]):.2f}"
    cells = [f"{network}, {example.shape[-1]} px", f"{options.repeats}", f"{export:.2f} s", f"{unverified:.2f} s"]
    return f"| {' | '.join([*cells, f'{whole:.2f} s ({spread})', f'**{whole / export:.2f}**', '2'])} |"


def price_row(network: str) -> str:
    """Returns what prices of policies cost, as a row: random widths, the medians of 200 and of 7."""
    net = trace(untrained(network), example_of(network), verify=False)
    model, draw = net.cost_model, np.random.default_rng(0)
    many = np.stack([draw.integers(1, size + 1, 10_000) for size in model.sizes], axis=1)
    policies = [dict(zip(model.groups, map(int, row), strict=True)) for row in many[:200]]

    def seconds(calls: Iterable[Callable[[], object]]) -> float:
        took = []
        for call in calls:
            start = time.perf_counter()
            call()
            took.append(time.perf_counter() - start)
        return median(took)

    single = seconds(partial(model.cost, MACS, widths) for widths in policies)
    every = seconds(partial(model.costs, widths) for widths in policies)
    macs = seconds([partial(costs_many, model, many, (MACS,))] * 7)
    together = seconds([partial(costs_many, model, many)] * 7)
    cells = [f"{network}, {len(model.groups)} groups", f"{1e6 * single:.0f} µs", f"{1e6 * every:.0f} µs"]
    return f"| {' | '.join([*cells, f'{1e3 * macs:.1f} ms', f'{1e3 * together:.1f} ms'])} |"


def machine(device: str) -> str:
    """Returns hardware and versions in a line."""
    cpu = platform.processor() or platform.machine()
    gpu = "no GPU"
    if torch.device(device).type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        gpu = f"{facts.name} ({facts.total_memory / 2**30:.0f} GiB), {versions}"
    threads = f"{torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"
    return f"{cpu}, {threads}, {gpu}; Python {platform.python_version()}, torch {torch.__version__}."


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="auto", help="auto: a GPU where there is one; else cpu, cuda, cuda:1")
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56", "vit"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, help="training steps that are run; default 10, on a GPU 300")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--fresh", action="store_true", help="measure again what an earlier run has measured")
    parser.add_argument("--output", type=Path, help="default: bench-speed.md, on a GPU bench-speed-cuda.md")
    options = parser.parse_args()
    keep_freed()  # as every process of a search does, for trials and bare loops alike
    options.device = resolve_device(options.device)
    on_gpu = torch.device(options.device).type == "cuda"
    options.steps = options.steps or (300 if on_gpu else 10)  # below 32 nothing is captured
    options.output = options.output or RESULTS / ("bench-speed-cuda.md" if on_gpu else "bench-speed.md")
    where = f"{device_name(options.device)} " if on_gpu else ""  # what one device has measured is no other's
    if "AUTOPRUNE_DATA" not in os.environ:
        raise SystemExit("AUTOPRUNE_DATA must name the folder with cifar10-jpeg.tar.xz and the weights")
    HOME.mkdir(parents=True, exist_ok=True)
    text = [
        "# How near a trial comes to its bare passes (`make bench-speed`)",
        "",
        machine(options.device),
        "",
        "Processor time (on a GPU: elapsed time) of whole trials and of bare loops in turn, the medians of n; half of "
        "every group's channels removed, by l1; 512 calibration images. Of a training some steps are run, and scaled.",
        "",
        "| network | rung | validation images | n | trial | passes alone | ratio | goal | GPU busy |"
        " beyond its passes |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(
            kept(f"{where}{network} {rung}", partial(ratio_row, network, rung, options), options)
            for network in options.networks
            for rung in GOALS
        ),
        "",
        "What grows (random weights and images, n = 1, 200 validation and 205 calibration images; nothing is cached):",
        "",
        "| network | groups | trace | torch.export alone | trace read from disk | learning | screen trial | ratio |"
        " around a candidate, of 20 | of 80 |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(
            kept(f"{where}{network} {size}", partial(growth_row, network, size, options.device), options)
            for network, size in GROWTH
        ),
        "",
        "A trace beside plain `torch.export` of the same model (processor time of one CPU thread, medians of n; two "
        "images of random weights):",
        "",
        "| network | n | torch.export | trace without running pruned copies | trace | ratio | goal |",
        "|---|---|---|---|---|---|---|",
        *(kept(f"trace {network}", partial(trace_row, network, options), options) for network in TRACED),
        "",
        "Prices of policies, one at a time and 10,000 in a call (goals for ResNet-50: 100 µs and 100 ms):",
        "",
        "| network | MACs of one | all four costs of one | MACs of 10,000 | all four costs of 10,000 |",
        "|---|---|---|---|---|",
        *(kept(f"price {network}", partial(price_row, network), options) for network in TRACED),
        "",
    ]
    options.output.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
