"""Samples and the batches made of them.

Decides how samples are held (one tensor that is copied to a device once, or a data set that is streamed through worker
processes), and how a batch is augmented and normalised. Targets are handed on as they are. Must not know where samples
come from or how they are split.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat, starmap
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from autoprune.errors import DataError
from autoprune.network.data.staging import Batch as Batch
from autoprune.network.data.staging import Device as Device
from autoprune.network.data.staging import lane_to, staged


class Split(Protocol):
    """Samples of one role (training, calibration, validation, test), given out in batches.

    The stored order is a stratified shuffle: any prefix holds every class in its proportion, so `limit` is a fair
    sample. Where there are no classes it is a plain shuffle.
    """

    @property
    def num_classes(self) -> int:
        """Number of classes of the whole data set; 0 where the targets are no classes."""
        ...

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: Generator | None = None,
        augment: bool = False,
        device: Device = "cpu",
        limit: int | None = None,
    ) -> Iterator[Batch]:
        """Yields normalised float32 samples `(n, ...)` (images NCHW, channels-last in memory where a network runs so;
        int64 where they are whole numbers such as the ids of tokens) and their targets.

        Targets are int64 classes `(n,)`; where there are no classes, float32 or int64 `(n, ...)`.

        Args:
            batch_size: Samples a batch; the last one may be smaller.
            shuffle: A CPU generator: a new order is drawn from it at each call. None: the stored order.
            augment: Flip and crop as the settings say, drawn from `shuffle`.
            device: Where the batches are.
            limit: Only the first `limit` samples of the stored order (shuffled among themselves).

        Raises:
            ValueError: `augment` without `shuffle`, or `batch_size` below 1.
            DataError: A target that is read only now is no number, or not finite.
        """
        ...


@dataclass(frozen=True, slots=True)
class Draws:
    """What chance says about the images of a batch: shifts in pixels `(2, n)`, and which are mirrored `(n,)`."""

    shifts: Tensor | None = None
    mirrored: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Transform:
    """What is done to a batch: augmentation of 4-D samples, then `(x - mean) / std` along dimension 1.

    `mean` and `std` are one number a channel (or a feature), for uint8 samples in units of 255; empty: nothing is
    subtracted or divided. Images come `channels_last` in memory, or contiguous. With `whole`, int64 samples (the ids of
    tokens) that are not standardised stay what they are; without it they become real numbers like all others.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    flip: bool = False
    crop_padding: int = 0
    channels_last: bool = True
    whole: bool = True
    _constants: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def draw(self, n: int, generator: Generator) -> Draws:
        """Returns what chance says about `n` images."""
        shifts = torch.randint(0, 2 * self.crop_padding + 1, (2, n), generator=generator) if self.crop_padding else None
        return Draws(shifts, torch.rand(n, generator=generator) < 0.5 if self.flip else None)

    def draws(self, sizes: Sequence[int], generator: Generator | None, device: Device) -> Iterator[Draws]:
        """Yields what chance says about batches of `sizes` images, one after the other; nothing without a generator.

        For a device that is not the CPU all is drawn at once and copied together: a copy from memory that is not pinned
        makes the host wait. The numbers are the same everywhere.
        """
        if generator is None or not (self.crop_padding or self.flip):
            return repeat(Draws(), len(sizes))
        drawn = (self.draw(n, generator) for n in sizes)
        return drawn if torch.device(device).type == "cpu" else _moved(list(drawn), sizes, device)

    def __call__(self, x: Tensor, draws: Draws) -> Tensor:
        """Returns the batch `x` as float32 (see `whole`); images are augmented as `draws` says."""
        if x.dim() == 4:
            if draws.shifts is not None:
                x = _shifted(x, draws.shifts, padding=self.crop_padding)
            if draws.mirrored is not None:
                x = torch.where(draws.mirrored[:, None, None, None], x.flip(3), x)
        if self.whole and x.dtype == torch.int64 and not self.mean:
            return x
        scale, shift = self._affine(x)
        x = x.to(torch.float32)
        x = torch.addcmul(shift, x, scale) if self.mean else x * scale
        if x.dim() != 4:
            return x
        return x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scale and shift, shaped to broadcast along dimension 1, held on the batch's device."""
        unit = 1 / 255 if x.dtype == torch.uint8 else 1.0
        key = (x.device, x.dim(), unit)
        if key not in self._constants:
            shape = (1, -1, *[1] * (x.dim() - 2)) if x.dim() > 1 else (-1,)
            std = torch.tensor(self.std or (1.0,), dtype=torch.float64)
            mean = torch.tensor(self.mean or (0.0,), dtype=torch.float64)
            scale, shift = (unit / std).float().view(shape), (-mean / std).float().view(shape)
            self._constants[key] = (scale.to(x.device), shift.to(x.device))
        return self._constants[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_constants": {}}


def _moved(drawn: Sequence[Draws], sizes: Sequence[int], device: Device) -> Iterator[Draws]:
    """Yields `drawn` on `device`, each kind brought there by one copy."""
    shifts = [draws.shifts for draws in drawn if draws.shifts is not None]
    mirrored = [draws.mirrored for draws in drawn if draws.mirrored is not None]
    every = (
        torch.split(torch.cat(parts, -1).to(device), list(sizes), -1) if parts else repeat(None, len(sizes))
        for parts in (shifts, mirrored)
    )
    return starmap(Draws, zip(*every, strict=True))


def _shifted(x: Tensor, shifts: Tensor, *, padding: int) -> Tensor:
    """Shifts each image of `x` `(N, C, H, W)` by up to `padding` pixels, zeros coming in from outside."""
    n, _, height, width = x.shape
    windows = F.pad(x, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # (N, C, y, x, H, W), a view
    return windows[torch.arange(n, device=x.device), :, shifts[0], shifts[1]]  # whole rows are copied at once


_SHARE = 0.5
"""The part of a device's free memory that a copy of all samples may take; the rest is for training."""


def _room(device: torch.device) -> int:
    """Returns the bytes of a GPU that this process may still take, of its share where it has one."""
    free, total = torch.cuda.mem_get_info(device)
    taken = torch.cuda.memory_allocated(device)
    kept = torch.cuda.memory_reserved(device) - taken
    return int(min(free + kept, torch.cuda.get_per_process_memory_fraction(device) * total - taken))


@dataclass(frozen=True, eq=False)
class Pool:
    """Samples and targets, each `(N, ...)`, in memory; each device gets one copy, made when it is first asked for, if
    that leaves room. Else batches are sent to it one by one.
    """

    samples: Tensor
    targets: Tensor
    _copies: dict[torch.device, Batch] = field(default_factory=dict, repr=False)

    def on(self, device: Device) -> Batch:
        """Returns the samples and targets on `device`; where they would fill it, those on the CPU."""
        device = torch.device(device)
        if device.type == "cpu":
            return self.samples, self.targets
        if device not in self._copies:
            fits = self.samples.nbytes + self.targets.nbytes <= _SHARE * _room(device)
            there = device if fits else "cpu"
            self._copies[device] = self.samples.to(there), self.targets.to(there)
        return self._copies[device]

    def leave(self) -> None:
        """Forgets the copies; who asks again gets a new one."""
        self._copies.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}}


@dataclass(frozen=True, eq=False)
class TensorSplit:
    """The samples `index` of a pool; several splits share one pool."""

    pool: Pool
    index: Tensor
    transform: Transform
    num_classes: int

    def __len__(self) -> int:
        return len(self.index)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: Generator | None = None,
        augment: bool = False,
        device: Device = "cpu",
        limit: int | None = None,
    ) -> Iterator[Batch]:
        """Yields batches as `Split.batches` says, cut out of the pool's tensor on `device`."""
        order = _order(self.index, batch_size=batch_size, shuffle=shuffle, augment=augment, limit=limit)
        return self._cut(order, batch_size, device=device, generator=shuffle if augment else None)

    def _cut(self, order: Tensor, batch_size: int, *, device: Device, generator: Generator | None) -> Iterator[Batch]:
        samples, targets = self.pool.on(device)
        lane = lane_to(device) if samples.device.type == "cpu" else None
        generator = generator if samples.dim() == 4 else None  # only images are augmented
        drawn = self.transform.draws(_sizes(len(order), batch_size), generator, device)
        parts = torch.split(order.to(samples.device), batch_size)
        if lane is None:  # `staged` would hold each batch as it was before it was transformed
            for chosen, draws in zip(parts, drawn, strict=False):
                yield self.transform(samples[chosen], draws), targets[chosen]
            return
        cut = ((samples[chosen], targets[chosen]) for chosen in parts)
        for (x, y), draws in zip(staged(cut, lane), drawn, strict=False):
            yield self.transform(x, draws), y


@dataclass(frozen=True, eq=False)
class StreamSplit:
    """The samples `index` of a map-style data set that is read anew at each pass, by worker processes."""

    dataset: Dataset[Any]
    index: Tensor
    transform: Transform
    num_classes: int
    workers: int | None = None
    """Processes that read; None: one for each core but one, at most 8."""

    def __len__(self) -> int:
        return len(self.index)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: Generator | None = None,
        augment: bool = False,
        device: Device = "cpu",
        limit: int | None = None,
    ) -> Iterator[Batch]:
        """Yields batches as `Split.batches` says, read and collated by worker processes."""
        order = _order(self.index, batch_size=batch_size, shuffle=shuffle, augment=augment, limit=limit)
        return self._read(order, batch_size, device=device, generator=shuffle if augment else None)

    def _read(self, order: Tensor, batch_size: int, *, device: Device, generator: Generator | None) -> Iterator[Batch]:
        workers = self.workers
        if workers is None:
            workers = min(8, (os.cpu_count() or 1) - 1)
        loader: DataLoader[Any] = DataLoader(
            Subset(self.dataset, order.tolist()),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=_collate_classes if self.num_classes else _collate_targets,
            pin_memory=torch.device(device).type == "cuda",
        )
        drawn = self.transform.draws(_sizes(len(order), batch_size), generator, device)
        for (x, y), draws in zip(staged(loader, lane_to(device)), drawn, strict=True):
            yield self.transform(x, draws), y


def _order(index: Tensor, *, batch_size: int, shuffle: Generator | None, augment: bool, limit: int | None) -> Tensor:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if augment and shuffle is None:
        raise ValueError("augment needs the generator `shuffle`")
    order = index if limit is None else index[:limit]
    return order if shuffle is None else order[torch.randperm(len(order), generator=shuffle)]


def _sizes(count: int, batch_size: int) -> list[int]:
    """Returns how many of `count` samples each batch holds."""
    return [min(batch_size, count - start) for start in range(0, count, batch_size)]


def _collate_classes(items: list[tuple[Any, Any]]) -> Batch:
    samples = torch.stack([as_tensor(x) for x, _ in items])
    return samples, torch.tensor([int(y) for _, y in items], dtype=torch.int64)


def _collate_targets(items: list[tuple[Any, Any]]) -> Batch:
    samples = torch.stack([as_tensor(x) for x, _ in items])
    return samples, torch.stack([as_target(y, "a sample of the data set") for _, y in items])


def as_target(value: Any, where: str) -> Tensor:
    """Returns a target, or many at once, as float32 (real numbers) or int64 (whole numbers, truth values).

    Args:
        value: A number, nested numbers, a tensor, an array, or a Pillow image, which is a mask `(H, W)`.
        where: Begins the message of an error.

    Raises:
        DataError: It is made of something else than real numbers, or a number is not finite.
    """
    try:
        target = value.cpu() if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: targets must be numbers, not {type(value).__name__}: {error}") from error
    if target.is_complex():
        raise DataError(f"{where}: targets must be real numbers, not complex ones")
    if not target.is_floating_point():
        return target.to(torch.int64)
    target = target.to(torch.float32)
    if not bool(torch.isfinite(target).all()):
        raise DataError(f"{where}: the targets hold values that are not finite in float32")
    return target


def as_tensor(sample: Any) -> Tensor:
    """Returns one sample, or many at once, as a tensor: Pillow images as uint8 `(C, H, W)`, whole numbers of other
    types than uint8 as int64, anything else as it is.
    """
    if isinstance(sample, Tensor):
        return widened_integers(sample)
    array = np.asarray(sample)
    if not isinstance(sample, np.ndarray) and array.dtype == np.uint8 and array.ndim in (2, 3):  # a Pillow image
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return widened_integers(torch.from_numpy(np.array(array)))


def widened_integers(x: Tensor) -> Tensor:
    """Returns whole numbers of any type but uint8 (images) and truth values as int64, anything else as it is."""
    whole = not (x.is_floating_point() or x.is_complex() or x.dtype in (torch.uint8, torch.bool))
    return x.to(torch.int64) if whole else x


@dataclass(frozen=True, eq=False)
class Source:
    """What a reader found, before anything is carved: all samples, their targets, and the parts that the data names.

    `samples` is a tensor `(N, ...)` or a map-style data set that is too large to hold. `targets` are the classes
    `(N,)`. Where `classes` is empty there are none: then they are `(N, ...)`, and of a data set, which brings its own
    targets with each sample, their number alone counts. `parts` maps `train`, and where
    they exist `val`, `calibration`, `test`, to indices. `names` holds `<class>/<file>` of each sample where it came
    from a file. `as_is` says that float samples are the user's own: not standardised unless mean and std are given.
    """

    samples: Tensor | Dataset[Any]
    targets: Tensor
    parts: Mapping[str, Tensor]
    classes: tuple[str, ...]
    names: tuple[str, ...] = ()
    as_is: bool = False

    @property
    def strata(self) -> Tensor:
        """Int64 `(N,)`: each split holds these in their proportion. The classes; zeros where there are none."""
        return self.targets if self.classes else torch.zeros(len(self.targets), dtype=torch.int64)


def channel_statistics(samples: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of `samples` `(N, C, ...)` along dimension 1, uint8 in units of 255.

    A constant channel gets the standard deviation 1.
    """
    unit = 1 / 255 if samples.dtype == torch.uint8 else 1.0
    rest = [d for d in range(samples.dim()) if d != 1]
    total = torch.zeros(samples.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for chunk in torch.split(samples, 1000):
        x = chunk.double() * unit
        total += x.sum(rest)
        squares += x.square().sum(rest)
    count = samples.numel() / samples.shape[1]
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0)
    std = [math.sqrt(v) if v > 1e-12 else 1.0 for v in variance.tolist()]
    return tuple(mean.tolist()), tuple(std)


def resize(samples: Tensor, size: int) -> Tensor:
    """Resizes the shorter side of images `(N, C, H, W)` to `size` and cuts out the centre.

    Raises:
        DataError: The samples are no images.
    """
    if samples.dim() != 4:
        raise DataError(f"preprocessing.size needs images, but a sample has the shape {tuple(samples.shape[1:])}")
    height, width = samples.shape[2:]
    if (height, width) == (size, size):
        return samples
    ratio = size / min(height, width)
    height, width = max(size, round(height * ratio)), max(size, round(width * ratio))
    top, left = (height - size) // 2, (width - size) // 2
    chunks = []
    for chunk in torch.split(samples, 1000):
        x = F.interpolate(chunk.float(), size=(height, width), mode="bilinear", antialias=True, align_corners=False)
        x = x[:, :, top : top + size, left : left + size]
        chunks.append(x.round().clamp(0, 255).to(torch.uint8) if samples.dtype == torch.uint8 else x)
    return torch.cat(chunks)
