"""Where samples come from and how they are split.

Decides which data sets can be named, and how training, calibration, validation and test samples are kept apart:
disjoint, stratified by class where they are carved and the targets are classes, and the same for the same seed. Must
not know of networks or training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from autoprune.errors import DataError, nearest
from autoprune.network.data.cifar import read_cifar
from autoprune.network.data.folders import read_image_folder
from autoprune.network.data.given import PARTS, read_mapping
from autoprune.network.data.samples import (
    Pool,
    Source,
    Split,
    StreamSplit,
    TensorSplit,
    Transform,
    as_tensor,
    channel_statistics,
    resize,
)
from autoprune.network.models.building import import_factory
from autoprune.network.models.torchvision import import_torchvision

__all__ = ["DATA_NAMES", "DataSettings", "Split", "Splits", "as_splits", "load_data"]


@dataclass(frozen=True)
class DataSettings:
    """The data section of a space file, flat. See the space file's documentation for the meaning of each field.

    `calibration` None means 512 samples, but at most a quarter of the training data. `size` needs images; `mean` and
    `std` None are computed from the training images (float samples of the user's own are left as they are).
    """

    name: str | None = None
    factory: str | None = None
    path: str | None = None
    download: bool = False
    validation_source: str = "train"
    validation_fraction: float = 0.15
    validation_match: str | None = None
    calibration: int | None = None
    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    flip: bool = False
    crop_padding: int = 0

    def __post_init__(self) -> None:
        if self.validation_source not in ("train", "test"):
            raise DataError(f"validation.source must be 'train' or 'test', not {self.validation_source!r}")
        if self.validation_source == "test" and not self.validation_match:
            raise DataError("validation.source is 'test': validation.match must say which of its files serve")
        if not 0 < self.validation_fraction < 1:
            raise DataError(f"validation.fraction must lie between 0 and 1, got {self.validation_fraction}")
        if self.calibration is not None and self.calibration < 1:
            raise DataError(f"calibration must be at least 1, got {self.calibration}")
        if (self.mean is None) != (self.std is None):
            raise DataError("preprocessing.mean and preprocessing.std are given together or not at all")
        if self.std is not None and min(self.std, default=0) <= 0:
            raise DataError(f"preprocessing.std must be positive, got {list(self.std)}")


@dataclass(frozen=True, eq=False)
class Splits:
    """Four disjoint splits of one data set; `sample_shape` is the shape of a sample without the batch dimension.

    Where the targets are no classes, `num_classes` is 0 and `classes` empty.
    """

    train: Split
    calibration: Split
    val: Split
    test: Split
    num_classes: int
    sample_shape: tuple[int, ...]
    classes: tuple[str, ...]

    def first(self, count: int) -> Tensor:
        """Returns the first `count` samples `(count, ...)`, or as many as there are, of the largest split."""
        split = max((self.calibration, self.val, self.test, self.train), key=len)
        return next(iter(split.batches(count, limit=count)))[0]

    def given_out(self, *, channels_last: bool | None = None, whole: bool | None = None) -> Splits:
        """Returns the same splits that give out samples in another way: see `Transform`."""

        def dressed(split: Split) -> Split:
            if not isinstance(split, TensorSplit | StreamSplit):
                return split
            old = split.transform
            last = old.channels_last if channels_last is None else channels_last
            kept = old.whole if whole is None else whole
            return replace(split, transform=replace(old, channels_last=last, whole=kept, _constants={}))

        return self.changed(dressed)

    @property
    def parts(self) -> dict[str, Split]:
        """The four splits by name."""
        return {name: getattr(self, name) for name in PARTS}

    def changed(self, change: Callable[[Split], Split]) -> Splits:
        """Returns the same data with what `change` makes of each split."""
        changes: dict[str, Any] = {name: change(split) for name, split in self.parts.items()}
        return replace(self, **changes)


def load_data(settings: DataSettings, *, seed: int, cache_dir: Path) -> Splits:
    """Reads the data set that `settings` names and splits it.

    Args:
        settings: What to read and how to split it.
        seed: Decides, alone, which samples are carved out.
        cache_dir: Folder that keeps decoded images.

    Raises:
        DataError: The name is unknown, files are missing or unreadable, a set or a class is empty, or a split that was
            asked for leaves nothing for another.
        InputError: The factory cannot be imported.
    """
    if (settings.name is None) == (settings.factory is None):
        raise DataError("the data needs either a name or a factory, and not both")
    if settings.factory is not None:
        return as_splits(import_factory(settings.factory)(), settings=settings, seed=seed)
    assert settings.name is not None
    if settings.name not in _READERS:
        raise DataError(f"unknown data set {settings.name!r}{nearest(settings.name, _READERS)}")
    return _split(_READERS[settings.name](settings, cache_dir), settings=settings, seed=seed)


def as_splits(data: Any, *, settings: DataSettings | None = None, seed: int = 0) -> Splits:
    """Returns `data` as splits; what it does not hold (calibration, val, test) is carved out of its training data.

    Args:
        data: `Splits`, taken as they are; or a mapping with `train` and any of `calibration`, `val`, `test`, each
            either a pair (samples, targets) of tensors or arrays, or a map-style `Dataset` of such pairs. uint8 images
            are normalised as the settings say; float samples are left as they are unless mean and std are given.
            Whole numbers `(N,)` are classes, from 0 up. Real numbers of any shape `(N, ...)` and whole numbers of more
            than one dimension (masks `(N, H, W)`) are no classes: they are split at random and handed on as float32
            or int64. Of a `Dataset` the first sample tells which.
        settings: How to carve and preprocess; None: the defaults.
        seed: Decides, alone, which samples are carved out.

    Raises:
        DataError: `data` is of another kind or lacks `train`; samples and targets, or the parts, do not fit together;
            a number is not finite; or images would be moved while their masks stay.
    """
    if isinstance(data, Splits):
        return data
    settings = settings or DataSettings()
    source = read_mapping(data)
    if settings.size is not None and not isinstance(source.samples, Tensor):
        raise DataError("preprocessing.size does not apply to a Dataset of your own: let it return images of that size")
    _check_targets_stay(tuple(source.targets.shape[1:]), settings)
    return _split(source, settings=settings, seed=seed)


def _check_targets_stay(shape: tuple[int, ...], settings: DataSettings) -> None:
    """Refuses to flip, shift or resize images whose targets have places in the image (masks, key points)."""
    if len(shape) < 2:
        return
    moves = {"size": settings.size, "flip": settings.flip, "crop_padding": settings.crop_padding}
    for name, value in moves.items():
        if value:
            raise DataError(
                f"preprocessing.{name} would move the images but not their targets of shape {shape}: "
                "let your own Dataset do both"
            )


def _split(source: Source, *, settings: DataSettings, seed: int) -> Splits:
    """Carves the parts that the source does not name, and dresses each with the transform."""
    parts = {name: index for name, index in source.parts.items() if len(index)}
    for name in source.parts:
        if name not in parts:
            raise DataError(f"the {name} part of the data is empty")
    if source.classes:
        _check_classes(source)
    strata = source.strata
    if settings.validation_source == "test":
        parts |= _match(source, settings)
    if "test" not in parts:
        count = round(0.2 * len(parts["train"]))
        parts |= _carve("test", count, parts["train"], strata, seed=seed)
    if "val" not in parts:
        count = round(settings.validation_fraction * len(parts["train"]))
        parts |= _carve("val", count, parts["train"], strata, seed=seed)
    if "calibration" not in parts:
        available = len(parts["train"])
        wanted = settings.calibration or min(512, max(1, available // 4))
        parts |= _carve("calibration", wanted, parts["train"], strata, seed=seed)
    ordered = {name: _spread(parts[name], strata, generator=_generator(seed, f"order of {name}")) for name in PARTS}
    if settings.size is not None and isinstance(source.samples, Tensor):
        source = replace(source, samples=resize(source.samples, settings.size))
    transform = _transform(source, ordered["train"], settings)
    made: dict[str, Split] = {}
    pool = Pool(source.samples, source.targets) if isinstance(source.samples, Tensor) else None
    for name, index in ordered.items():
        if pool is not None:
            made[name] = TensorSplit(pool, index, transform, len(source.classes))
        else:
            assert not isinstance(source.samples, Tensor)
            made[name] = StreamSplit(source.samples, index, transform, len(source.classes))
    shape = tuple(_peek(source, ordered["train"][:1]).shape[1:])
    return Splits(**made, num_classes=len(source.classes), sample_shape=shape, classes=source.classes)


def _check_classes(source: Source) -> None:
    train = source.targets[source.parts["train"]]
    counts = torch.bincount(train, minlength=len(source.classes)).tolist()
    for name, count in zip(source.classes, counts, strict=True):
        if count == 0:
            raise DataError(f"class {name!r} has no training sample")
    if len(source.classes) < 2:
        raise DataError(f"the data has only one class, {source.classes[0]!r}")


def _match(source: Source, settings: DataSettings) -> dict[str, Tensor]:
    """Returns validation and test parts: the test files that match, and the others."""
    pattern = settings.validation_match
    assert pattern is not None  # checked by the settings
    if not source.names:
        raise DataError("validation.match needs files: it works with data.name 'imagefolder' alone")
    if "test" not in source.parts:
        raise DataError("validation.source is 'test' but the data has no test part")
    if "val" in source.parts:
        raise DataError("validation.source is 'test' but the data has a val part of its own")
    test = source.parts["test"]
    hit = torch.tensor([fnmatchcase(source.names[i], pattern) for i in test.tolist()])
    if not bool(hit.any()) or bool(hit.all()):
        which = "every" if bool(hit.all()) else "no"
        raise DataError(
            f"validation.match {pattern!r} matches {which} test file "
            f"(of {len(test)}, such as {source.names[int(test[0])]!r})"
        )
    return {"val": test[hit], "test": test[~hit]}


def _generator(seed: int, purpose: str) -> Generator:
    """Returns a generator that is independent of those of other purposes, so that no split moves another."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _carve(name: str, count: int, index: Tensor, strata: Tensor, *, seed: int) -> dict[str, Tensor]:
    """Takes `count` of `index`, each class in its proportion (largest remainders), and leaves the others for training.

    Raises:
        DataError: `count` is zero, or a class would be left without a training sample.
    """
    if count < 1:
        raise DataError(f"the {name} split would be empty: there are only {len(index)} training samples")
    if count >= len(index):
        raise DataError(
            f"{name}: {count} samples were asked for, but only {len(index)} training samples are left; "
            f"ask for at most {len(index) // 4}"
        )
    generator = _generator(seed, name)
    labels = strata[index]
    members = {label: (labels == label).nonzero().flatten() for label in _present(labels)}
    shares = {label: len(found) * count / len(index) for label, found in members.items()}
    quotas = {label: math.floor(share) for label, share in shares.items()}
    short = count - sum(quotas.values())
    for label in sorted(shares, key=lambda label: (quotas[label] - shares[label], label))[:short]:
        quotas[label] += 1
    taken = torch.zeros(len(index), dtype=torch.bool)
    for label, found in members.items():
        if quotas[label] >= len(found):
            raise DataError(f"{name}: taking {count} samples leaves class {label} without a training sample")
        taken[found[torch.randperm(len(found), generator=generator)[: quotas[label]]]] = True
    return {name: index[taken], "train": index[~taken]}


def _present(labels: Tensor) -> list[int]:
    return [label for label, count in enumerate(torch.bincount(labels).tolist()) if count]


def _spread(index: Tensor, strata: Tensor, *, generator: Generator) -> Tensor:
    """Shuffles `index` so that every prefix holds each class in its proportion."""
    labels = strata[index]
    position = torch.empty(len(index), dtype=torch.float64)
    for label in _present(labels):
        found = (labels == label).nonzero().flatten()
        order = torch.randperm(len(found), generator=generator).double()
        offset = torch.rand(1, generator=generator, dtype=torch.float64)
        position[found] = (order + offset) / len(found)
    return index[position.argsort()]


def _peek(source: Source, index: Tensor) -> Tensor:
    """Returns the raw samples `index`, stacked."""
    if isinstance(source.samples, Tensor):
        return source.samples[index]
    return torch.stack([as_tensor(source.samples[i][0]) for i in index.tolist()])


def _transform(source: Source, train: Tensor, settings: DataSettings) -> Transform:
    """Returns the transform; statistics not given come from at most 10,000 training samples (1,000 where streamed)."""
    sample = _peek(source, train[:1])
    if settings.mean is not None and settings.std is not None:
        mean, std = settings.mean, settings.std
        width = sample.shape[1]
        if {len(mean), len(std)} - {width}:
            raise DataError(f"preprocessing.mean and std have {len(mean)} and {len(std)} values for {width} channels")
    elif source.as_is and sample.dtype != torch.uint8:
        mean, std = (), ()
    else:
        mean, std = channel_statistics(_peek(source, train[: 10_000 if isinstance(source.samples, Tensor) else 1_000]))
    return Transform(mean=mean, std=std, flip=settings.flip, crop_padding=settings.crop_padding)


def _read_digits(settings: DataSettings, cache_dir: Path) -> Source:
    """Scikit-learn's 1,797 handwritten digits, 8x8 pixels in 17 grey levels, as uint8 `(N, 1, 8, 8)`."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    return _whole(images, torch.from_numpy(found.target), [str(name) for name in found.target_names])


def _read_iris(settings: DataSettings, cache_dir: Path) -> Source:
    """Scikit-learn's 150 irises, four measurements each, as float32 `(N, 4)`."""
    from sklearn.datasets import load_iris

    found = load_iris()
    table = torch.from_numpy(found.data).to(torch.float32)
    return _whole(table, torch.from_numpy(found.target), [str(name) for name in found.target_names])


def _whole(samples: Tensor, targets: Tensor, classes: list[str]) -> Source:
    parts = {"train": torch.arange(len(samples))}
    return Source(samples=samples, targets=targets.to(torch.int64), parts=parts, classes=tuple(classes))


def _read_torchvision(builder: str) -> Callable[[DataSettings, Path], Source]:
    def read(settings: DataSettings, cache_dir: Path) -> Source:
        if settings.path is None:
            raise DataError(
                f"data {settings.name!r} needs data.path: the folder that holds it (or that download fills)"
            )
        if builder.startswith("CIFAR"):
            return read_cifar(builder, settings.path, download=settings.download)
        factory = getattr(import_torchvision().datasets, builder)
        try:
            found = [factory(settings.path, train=train, download=settings.download) for train in (True, False)]
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            hint = "" if settings.download else "; download: true would fetch it"
            raise DataError(f"{builder} cannot be read from {settings.path}: {error}{hint}") from error
        images = torch.cat([torch.as_tensor(part.data) for part in found])  # (N, H, W)
        images = images[:, None]
        targets = torch.cat([torch.as_tensor(part.targets) for part in found]).to(torch.int64)
        border = len(found[0].targets)
        parts = {"train": torch.arange(border), "test": torch.arange(border, len(targets))}
        return Source(samples=images, targets=targets, parts=parts, classes=tuple(map(str, found[0].classes)))

    return read


def _read_image_folder(settings: DataSettings, cache_dir: Path) -> Source:
    if settings.path is None:
        raise DataError("data 'imagefolder' needs data.path: a folder or a tar archive")
    return read_image_folder(Path(settings.path).expanduser(), size=settings.size, cache_dir=cache_dir)


_READERS: Mapping[str, Callable[[DataSettings, Path], Source]] = {
    "digits": _read_digits,
    "iris": _read_iris,
    "mnist": _read_torchvision("MNIST"),
    "fashion-mnist": _read_torchvision("FashionMNIST"),
    "cifar10": _read_torchvision("CIFAR10"),
    "cifar100": _read_torchvision("CIFAR100"),
    "imagefolder": _read_image_folder,
}
DATA_NAMES = tuple(_READERS)
