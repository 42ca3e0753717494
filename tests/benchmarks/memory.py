"""The most memory that a whole search of ResNet-50 at 224 px holds, batch 64: random weights and images.

    python tests/benchmarks/memory.py [--train 192] [--trials 3] [--home FOLDER]

What is asked for here is the peak of the resident size, not accuracy: moments and error tables of 64 calibration
images, `trials` screened candidates, one of them trained for an epoch. `make bench-memory` calls it.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

import autoprune
from autoprune.memory import keep_freed
from autoprune.network.models.torchvision import import_torchvision


def peak_mib() -> int:
    """Returns the highest resident size of this process so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most / 1024 / (1024 if sys.platform == "darwin" else 1))


def main() -> None:
    """Runs the search and prints what it held."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", type=int, default=192, help="training images; 64 more are scored on")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--home", type=Path)
    options = parser.parse_args()
    keep_freed()  # as the command line does
    torch.manual_seed(0)
    model = import_torchvision().models.resnet50(num_classes=10)
    images = torch.rand(options.train + 128, 3, 224, 224)
    labels = torch.randint(0, 10, (len(images),))
    splits = {"calibration": slice(0, 64), "val": slice(64, 128), "train": slice(128, None)}
    data = {name: (images[part], labels[part]) for name, part in splits.items()}
    held = peak_mib()
    print(f"model and data: {held} MiB", flush=True)
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        autoprune.search(
            model,
            data=data,
            budget={"macs": 0.5},
            trials=options.trials,
            home=options.home or folder,
            criteria=("l1", "obs_greedy"),
            recipe={"batch_size": 64},
            search={
                "controls": 0,
                "ladder": [
                    {"rung": "screen", "epochs": 0},
                    {"rung": "final", "epochs": 1, "trials": 1},
                ],
            },
        )
    spent = time.process_time() - begun
    print(
        f"search: {peak_mib()} MiB, {peak_mib() - held} more than before it; {spent:.0f} s of processor time",
        flush=True,
    )


if __name__ == "__main__":
    main()
