"""What every contender of the benchmark shares: data, dense network, budgets, how a pruned network is kept and scored.

All contenders prune the inner channels of the residual blocks of the same trained network, see the same calibration
images and the same 2,000 validation images, and are scored on the same test images by the same code.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoprune.network.devices.precision import Precision
from autoprune.network.preparing import Ingredients, ingredients_of
from autoprune.network.repair.batch_norms import recalibrate
from autoprune.network.tracing.counting import count_macs
from autoprune.network.training.evaluation import evaluate
from autoprune.space import Space, load_space

ROOT = Path(__file__).parents[3]
BUDGETS = (0.7, 0.6, 0.5, 0.4, 0.35)
"""Fractions of the dense MACs at which fronts are compared."""
IMAGES = 2000
"""Validation images that score a candidate."""
REFERENCE = (0.5, 1.0)
"""Reference point of the hypervolume: error, and fraction of the dense MACs."""
PRECISION = Precision(torch.bfloat16)


@dataclass(frozen=True)
class Task:
    """One network with its data."""

    network: str
    space: Space
    ingredients: Ingredients
    dense_macs: int

    @property
    def example(self) -> Tensor:
        """One image, `(1, 3, 32, 32)`."""
        return torch.zeros(1, 3, 32, 32)

    def fraction(self, model: nn.Module) -> float:
        """Returns the MACs of a pruned network as a fraction of the dense one's."""
        return count_macs(model, (self.example,)) / self.dense_macs

    def validate(self, model: nn.Module, images: int | None = IMAGES) -> float:
        """Returns the accuracy on the validation images."""
        score = evaluate(model, self.ingredients.splits.val, limit=images, autocast_dtype=PRECISION.autocast_dtype)
        return score.accuracy

    def test(self, model: nn.Module) -> float:
        """Returns the accuracy on the test images."""
        return evaluate(model, self.ingredients.splits.test, autocast_dtype=PRECISION.autocast_dtype).accuracy

    def recalibrate(self, model: nn.Module) -> None:
        """Re-estimates BatchNorm statistics on the calibration images."""
        recalibrate(model, self.ingredients.splits.calibration, batches=10, seed=0)


def task_of(network: str, *, seed: int, cache: Path) -> Task:
    """Returns the task of one network; decoded data is kept in `cache`."""
    path = ROOT / "tests" / "benchmarks" / "resnet20_no_finetuning.yaml"
    overrides = [
        f"name=bench-{network}",
        f"model.name={network}",
        f"checkpoint=${{AUTOPRUNE_DATA}}/{network}_cifar10jpeg.safetensors",
        "data.preprocessing.flip=true",
        "data.preprocessing.crop_padding=4",
        f"seed={seed}",
    ]
    space = load_space(path, overrides=overrides, env=os.environ)
    ingredients = ingredients_of(space, cache=cache)
    macs = count_macs(ingredients.model, (torch.zeros(1, 3, 32, 32),))
    return Task(network, space, ingredients, macs)


def inner_convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Returns the first convolution of every residual block: the layers that may be pruned."""
    found = {name: module for name, module in model.named_modules() if name.endswith(".conv1")}
    return {name: module for name, module in found.items() if isinstance(module, nn.Conv2d)}


def narrow(task: Task, state: dict[str, Tensor]) -> nn.Module:
    """Returns the network with the block widths that `state` has, and its weights."""
    import copy

    model = copy.deepcopy(task.ingredients.model)
    for name, conv in inner_convolutions(model).items():
        block = model.get_submodule(name.rpartition(".")[0])
        width = state[f"{name}.weight"].shape[0]
        first = nn.Conv2d(conv.in_channels, width, 3, conv.stride, 1, bias=False)
        second = nn.Conv2d(width, block.conv2.out_channels, 3, block.conv2.stride, 1, bias=False)
        block.conv1, block.bn1, block.conv2 = first, nn.BatchNorm2d(width), second
    model.load_state_dict(state)
    return model


class Journal:
    """Writes a contender's candidates as they come: MACs, validation accuracy, seconds since the start."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.started = time.monotonic()
        self._lines = (folder / "candidates.jsonl").open("w", encoding="utf-8")

    def candidate(self, macs: float, accuracy: float, seconds: float | None = None) -> None:
        """Writes one measured candidate."""
        spent = self.seconds if seconds is None else seconds
        self._lines.write(json.dumps({"macs": macs, "val_accuracy": accuracy, "seconds": round(spent, 2)}) + "\n")
        self._lines.flush()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def keep(self, budget: float, model: nn.Module, accuracy: float) -> None:
        """Keeps the network that the contender picks for one budget."""
        state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, self.folder / f"pick-{budget:.2f}.safetensors", {"val_accuracy": f"{accuracy:.6f}"})

    def close(self, **facts: Any) -> None:
        """Writes the last facts of a run."""
        document = {"seconds": round(self.seconds, 1), **facts}
        (self.folder / "run.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


def picks(folder: Path) -> dict[float, dict[str, Tensor]]:
    """Returns the weights that a contender kept, by budget."""
    files = sorted(folder.glob("pick-*.safetensors"))
    return {float(file.stem.removeprefix("pick-")): load_file(file) for file in files}
