"""Data that the user brings: a mapping of parts, each a pair of tensors or a `Dataset`.

Decides which targets are classes and which are not, and whether the parts fit together. Must not know how splits are
carved or how images are preprocessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, TensorDataset

from autoprune.errors import DataError, nearest
from autoprune.network.data.samples import Source, as_target, as_tensor

PARTS = ("train", "calibration", "val", "test")
"""What a mapping may hold."""

_Piece = tuple[Tensor | Dataset[Any], Tensor]


def read_mapping(data: Any) -> Source:
    """Returns the parts of `data` as one source.

    Whole numbers `(N,)` are classes, from 0 up. Real numbers of any shape `(N, ...)` and whole numbers of more than one
    dimension are no classes. Of a `Dataset` the first sample tells which.

    Raises:
        DataError: `data` is no mapping, has an unknown part or lacks `train`; samples and targets, or the parts, do not
            fit together; or a number is not finite.
    """
    if not isinstance(data, Mapping):
        raise DataError(
            "data must be Splits or a mapping with 'train' (and 'val', 'test', 'calibration'), "
            f"not {type(data).__name__}"
        )
    for key in data:
        if key not in PARTS:
            raise DataError(f"unknown part {key!r} of the data{nearest(str(key), PARTS)}")
    if "train" not in data:
        raise DataError("the data has no 'train' part")
    pieces = {str(key): _piece(str(key), value) for key, value in data.items()}
    parts, start = {}, 0
    for key, (_, y) in pieces.items():
        parts[key] = torch.arange(start, start + len(y))
        start += len(y)
    samples, targets = _join(list(pieces.values()))
    classes: tuple[str, ...] = ()
    if len(targets) and _are_classes(targets):
        if int(targets.max()) >= len(targets):
            raise DataError(
                f"the largest class is {int(targets.max())}, and there are only {len(targets)} samples: classes are"
                " numbered from 0 up without gaps"
            )
        classes = tuple(str(number) for number in range(int(targets.max()) + 1))
    return Source(samples=samples, targets=targets, parts=parts, classes=classes, as_is=True)


def _join(pieces: list[_Piece]) -> _Piece:
    """Returns the samples of all parts one after the other, and their targets, as `Source` describes them."""
    kinds = {(str(y.dtype).removeprefix("torch."), tuple(y.shape[1:])) for _, y in pieces}
    if len(kinds) > 1:
        raise DataError(f"the parts hold targets of different types or shapes: {sorted(kinds)}")
    tensors = [piece for piece, _ in pieces if isinstance(piece, Tensor)]
    if len(tensors) == len(pieces):
        shapes = {tuple(piece.shape[1:]) for piece in tensors}
        if len(shapes) > 1:
            raise DataError(f"the parts hold samples of different shapes: {sorted(shapes)}")
        return torch.cat(tensors), torch.cat([y for _, y in pieces])
    streamed: Dataset[Any] = ConcatDataset(
        [TensorDataset(piece, y) if isinstance(piece, Tensor) else piece for piece, y in pieces]
    )
    first = pieces[0][1]
    if _are_classes(first):
        return streamed, torch.cat([y for _, y in pieces])
    return streamed, first.new_zeros(()).expand(sum(len(y) for _, y in pieces), *first.shape[1:])  # takes no memory


def _piece(part: str, value: Any) -> _Piece:
    """Returns one part of a mapping as samples (or the data set) and targets `(N, ...)`.

    Targets of a data set that are no classes are not read: the first one stands for all of them.
    """
    if isinstance(value, IterableDataset):
        raise DataError(f"{part}: an IterableDataset cannot be split; give a map-style Dataset or tensors")
    if isinstance(value, Dataset):
        length = len(value)  # type: ignore[arg-type]  # Dataset itself declares no __len__
        if length:
            first = as_target(value[0][1], part)
            if not _are_classes(first[None]):
                return value, first.expand(length, *first.shape)
        known = getattr(value, "targets", None)  # torchvision's habit; else each sample is read once
        labels = known if known is not None else [int(value[i][1]) for i in range(length)]
        return value, _targets(part, labels if length else torch.zeros(0, dtype=torch.int64), length)
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise DataError(f"{part} must be a pair (samples, targets) or a Dataset, not {type(value).__name__}")
    samples = as_tensor(value[0]).cpu()
    if samples.dim() < 2:
        raise DataError(f"{part}: samples need at least two dimensions, got shape {tuple(samples.shape)}")
    if samples.dtype == torch.uint8 and samples.dim() == 4 and samples.shape[3] in (1, 3) and samples.shape[1] > 4:
        raise DataError(f"{part}: images must be (N, C, H, W), but the shape {tuple(samples.shape)} looks like NHWC")
    if samples.dtype not in (torch.uint8, torch.int64):
        samples = samples.to(torch.float32)
        if not bool(torch.isfinite(samples).all()):
            raise DataError(f"{part}: the samples hold values that are not finite")
    return samples, _targets(part, value[1], len(samples))


def _targets(part: str, values: Any, length: int) -> Tensor:
    targets = as_target(values, part)
    if targets.dim() < 1 or len(targets) != length:
        raise DataError(f"{part}: {length} samples but targets of shape {tuple(targets.shape)}")
    if length and _are_classes(targets) and int(targets.min()) < 0:
        raise DataError(f"{part}: classes must be integers from 0 up; give other numbers as floats")
    return targets


def _are_classes(targets: Tensor) -> bool:
    return targets.dim() == 1 and not targets.is_floating_point()
