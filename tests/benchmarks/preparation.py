"""What a search learns before its first candidate, stage by stage: seconds of the processor and memory.

    python tests/benchmarks/preparation.py [--networks resnet20 resnet50 vit_b_16] [--images 64]

`make bench-preparation` calls it and keeps tests/benchmarks/results/preparation.md. Weights and images are random: time
and memory do not depend on what is in them (fewer images than entries leave moments singular, which may cost a second
factorisation). Each network runs in a process of its own, because a process tells only its highest memory. Rows of
earlier runs are kept; a network that is measured again replaces its row (`--networks` alone writes the table again).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from autoprune.memory import keep_freed
from autoprune.network.calibration.one_pass import gather_both
from autoprune.network.criteria.branches import removal_errors
from autoprune.network.criteria.channels import score
from autoprune.network.criteria.inputs import Evidence
from autoprune.network.criteria.tables import error_tables
from autoprune.network.models.building import build_model
from autoprune.network.models.torchvision import import_torchvision
from autoprune.network.tracing.trace import trace

HOME = Path(".autoprune")
CRITERIA = ("l1", "l2", "fpgm", "activation", "obs", "obs_greedy")
NETWORKS = {"resnet20": 32, "resnet56": 32, "resnet50": 224, "vit_b_16": 224, "densenet121": 224}
"""Network → side of its images."""
BATCH = 64


def dense_model(name: str) -> nn.Module:
    """Returns the network with random weights."""
    torch.manual_seed(0)
    if name in ("resnet20", "resnet56"):
        return build_model(name=name, factory=None, arguments={}, weights=None, num_classes=10, seed=0).eval()
    import_torchvision()
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None).eval()
    return model


def measured(name: str, count: int) -> dict[str, float | str]:
    """Returns the processor seconds and the highest memory so far of each stage."""
    side = NETWORKS[name]
    model = dense_model(name)
    found: dict[str, float | str] = {"network": f"{name}, {side} px", "images": count}
    drawn = torch.Generator().manual_seed(0)

    def batches(limit: int | None) -> Iterator[Tensor]:
        drawn.manual_seed(0)
        left = count if limit is None else limit
        while left > 0:
            images = torch.randn(min(BATCH, left), 3, side, side, generator=drawn)
            left -= len(images)
            yield images.contiguous(memory_format=torch.channels_last)

    began = [time.process_time()]

    def done(stage: str) -> None:
        now = time.process_time()
        found[stage] = now - began[0]
        found[f"{stage} MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{name}: {stage} {found[stage]:.1f} s, {found[f'{stage} MiB']:.0f} MiB", file=sys.stderr, flush=True)
        began[0] = time.process_time()

    done("before")
    network = trace(model, torch.zeros(2, 3, side, side))
    found["groups"] = len(network.groups)
    done("trace")
    statistics, targets = gather_both(network, batches, count, number=-(-count // BATCH))
    done("moments and targets")
    evidence = Evidence(network, statistics)
    scores = score(evidence, CRITERIA)
    done("scores")
    error_tables(evidence, scores)
    done("tables")
    removal_errors(network, targets.images, statistics)
    done("branches")
    return found


def row(found: dict[str, float | str]) -> str:
    """Returns what was measured as a row of the table."""
    stages = ("trace", "moments and targets", "scores", "tables", "branches")
    cells = [str(found["network"]), str(found["groups"]), str(found["images"])]
    cells += [f"{float(found[stage]):.1f} s" for stage in stages]
    cells += [f"**{sum(float(found[stage]) for stage in stages):.0f} s**"]
    cells += [" / ".join(f"{float(found[f'{stage} MiB']):,.0f}" for stage in ("before", *stages))]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="*", default=["resnet20", "resnet50", "vit_b_16"], choices=sorted(NETWORKS))
    parser.add_argument("--images", type=int, help="calibration images; else 512 of 32 px and 64 of 224 px")
    parser.add_argument("--output", type=Path, default=Path("tests/benchmarks/results/preparation.md"))
    parser.add_argument("--journal", type=Path, default=HOME / "preparation.json")
    parser.add_argument("--one", action="store_true", help="measure one network in this process")
    options = parser.parse_args()
    keep_freed()  # as the command line does
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.one:
        (name,) = options.networks
        print(json.dumps(measured(name, options.images)))
        return
    options.journal.parent.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        count = options.images or (512 if NETWORKS[name] == 32 else 64)
        command = [sys.executable, __file__, "--one", "--networks", name, "--images", str(count)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        known = json.loads(options.journal.read_text(encoding="utf-8")) if options.journal.is_file() else {}
        options.journal.write_text(json.dumps(known | {name: json.loads(said)}, indent=1), encoding="utf-8")
    rows = json.loads(options.journal.read_text(encoding="utf-8"))
    text = [
        "# What a search learns before its first candidate (`make bench-preparation`)",
        "",
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores; "
        f"Python {platform.python_version()}, torch {torch.__version__}.",
        "",
        f"Processor time, n = 1; criteria {', '.join(CRITERIA)}, each with an error table for every group and width; "
        "random weights and images. Memory is the process's highest until the end of each stage, in MiB: with the "
        "model alone / trace / moments and targets / scores / tables / what branches carry.",
        "",
        "| network | groups | images | trace | moments and targets | scores | tables | branches | all | memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(row(rows[name]) for name in NETWORKS if name in rows),
        "",
    ]
    options.output.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
