"""What is learnt about a dense network before it is pruned, and its cache: one safetensors file, written whole.

Decides what that is, and names and layout in that file. A file that cannot be read is learnt anew; nothing is ever
unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoprune.errors import CheckpointError
from autoprune.network.calibration.moments import Moments, Statistics
from autoprune.network.calibration.targets import Targets
from autoprune.network.criteria.inputs import Scores
from autoprune.network.criteria.tables import Tables
from autoprune.network.models.checkpoints import read_metadata, read_state, save_state

SCHEMA = 4


@dataclass(frozen=True)
class Knowledge:
    """What was learnt about the dense network on calibration images: moments, targets, scores, error tables."""

    statistics: Statistics = field(default_factory=dict)
    targets: Targets | None = None
    scores: Mapping[str, Mapping[str, Scores]] = field(default_factory=dict)
    tables: Tables = field(default_factory=dict)


def write_knowledge(path: Path, knowledge: Knowledge) -> None:
    """Writes `knowledge` to `path`."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, list[int]] = {}
    for name, moments in knowledge.statistics.items():
        tensors[f"gram|{name}"], tensors[f"mean|{name}"] = moments.gram, moments.mean
        about[name] = [moments.rows, moments.kernel]
    for criterion, by_group in knowledge.scores.items():
        for group, scores in by_group.items():
            tensors[f"score|{criterion}|{group}"] = torch.from_numpy(scores)
    for group, by_criterion in knowledge.tables.items():
        for criterion, curve in by_criterion.items():
            # A curve by width is stored as its widths and errors, one that has every width as errors alone.
            numbers = [list(curve), list(curve.values())] if isinstance(curve, Mapping) else list(curve)
            tensors[f"table|{group}|{criterion}"] = torch.tensor(numbers, dtype=torch.float64)
    if knowledge.targets is not None:
        tensors["images"] = knowledge.targets.images
        for name, rows in knowledge.targets.outputs.items():
            tensors[f"target|{name}"] = rows
        about["|rows"] = [knowledge.targets.rows, knowledge.targets.seed]
    save_state(tensors, path, {"schema": str(SCHEMA), "about": json.dumps(about)})


def read_knowledge(path: Path, *, device: str) -> Knowledge | None:
    """Returns what `write_knowledge` wrote, or None where there is no file, or one of another version."""
    if not path.is_file():
        return None
    try:
        metadata, tensors = read_metadata(path), read_state(path)
    except CheckpointError:
        return None  # damaged (a full disk, say): everything in it can be learnt again
    if metadata.get("schema") != str(SCHEMA):
        return None
    # Memory of their own: those of a file lie at any address, where kernels may add up in another order.
    for name in list(tensors):  # one after the other: all twice would be gigabytes
        tensors[name] = tensors[name].clone()
    about = json.loads(metadata["about"])
    scores: dict[str, dict[str, np.ndarray]] = {}
    tables: Tables = {}
    outputs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("|")
        if kind == "score":
            criterion, _, group = rest.partition("|")
            scores.setdefault(criterion, {})[group] = tensor.numpy()
        elif kind == "table":
            group, _, criterion = rest.rpartition("|")
            tables.setdefault(group, {})[criterion] = _curve(tensor)
        elif kind == "target":
            outputs[rest] = tensor.to(device)
    statistics = {
        name: Moments(tensors[f"gram|{name}"].to(device), tensors[f"mean|{name}"].to(device), *values)
        for name, values in about.items()
        if name != "|rows"
    }
    targets = Targets(tensors["images"].to(device), outputs, *about["|rows"]) if "images" in tensors else None
    return Knowledge(statistics, targets, scores, tables)


def _curve(stored: Tensor) -> tuple[float, ...] | dict[int, float]:
    if stored.ndim == 1:
        return tuple(stored.tolist())
    widths, errors = stored.tolist()
    return {int(width): error for width, error in zip(widths, errors, strict=True)}
