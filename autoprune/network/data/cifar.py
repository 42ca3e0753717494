"""CIFAR-10 and CIFAR-100 as their authors publish them: pickled batches, read without running what they say.

Decides which types such a file may hold. torchvision's own reader unpickles whatever it finds; here a file that names
anything but a numpy array is refused, and its checksum must be torchvision's too. Must not know how data are split.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoprune.errors import DataError
from autoprune.network.data.samples import Source
from autoprune.network.models.torchvision import import_torchvision

_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}
"""What an array needs to be built again; none of it runs anything else."""


class _PlainUnpickler(pickle.Unpickler):
    """Builds numbers, texts, lists, mappings and arrays, and refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no CIFAR batch holds")
        return super().find_class(module, name)


def read_cifar(builder: str, path: str, *, download: bool) -> Source:
    """Returns `CIFAR10` or `CIFAR100` from the folder that torchvision's data set of this name lies in.

    Raises:
        DataError: Files are missing, damaged, hold something else than arrays, or cannot be downloaded.
    """
    kind = getattr(import_torchvision().datasets, builder)
    files = kind.__new__(kind)  # for its lists of files and checksums and its download; its constructor unpickles
    files.root = path
    try:
        if download:
            files.download()
        if not files._check_integrity():
            raise OSError(f"files are missing or damaged{'' if download else '; download: true would fetch it'}")
        folder = Path(path) / files.base_folder
        batches = [[_batch(folder / name) for name, _ in listed] for listed in (files.train_list, files.test_list)]
        classes = _batch(folder / files.meta["filename"])[files.meta["key"]]
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise DataError(f"{builder} cannot be read from {path}: {error}") from error
    train, test = batches
    pixels = np.concatenate([batch["data"] for batch in train + test]).reshape(-1, 3, 32, 32)
    counts = [sum(len(batch["data"]) for batch in part) for part in batches]
    labels = [label for batch in train + test for label in (batch.get("labels") or batch["fine_labels"])]
    parts = {"train": torch.arange(counts[0]), "test": torch.arange(counts[0], sum(counts))}
    targets = torch.tensor(labels, dtype=torch.int64)
    return Source(samples=torch.from_numpy(pixels), targets=targets, parts=parts, classes=tuple(map(str, classes)))


def _batch(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        found = _PlainUnpickler(stream, encoding="latin1").load()
    if not isinstance(found, dict):
        raise DataError(f"{file} holds no CIFAR batch but {type(found).__name__}")
    return found
