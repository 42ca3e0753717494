"""Sections of a space file that say what is pruned: the model and the data.

Decides their keys, meanings and valid values. Must not know how a model is built or data are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from autoprune.space.section import FACTORY_PATTERN, Floats, Found, Section, number

DataName = Literal["digits", "iris", "mnist", "fashion-mnist", "cifar10", "cifar100", "imagefolder"]


def _one_of(raw: Mapping[str, Any], first: str, second: str, what: str) -> Iterator[Found]:
    given = [key for key in (first, second) if raw.get(key) is not None]
    if not given:
        yield (), f"name the {what}: either `{first}` or `{second}` is needed"
    elif len(given) == 2:
        yield (second,), f"`{first}` and `{second}` exclude each other"


class ModelSettings(Section):
    """The network to prune."""

    name: str | None = Field(
        default=None,
        min_length=1,
        description="A network of the zoo (resnet20, resnet32, resnet44, resnet56, vgg16_bn_32, mlp, lstm) or the name "
        "of a classification builder of torchvision, such as resnet50. Excludes `factory`.",
    )
    factory: str | None = Field(
        default=None,
        pattern=FACTORY_PATTERN,
        description="`package.module:function`, a function of your own that returns the network (an nn.Module). The "
        "module must be importable. A function that no file of the working directory defines is run with --allow-code "
        "only. Excludes `name`.",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="Keyword arguments for the builder. `num_classes` is filled in from the data unless given here.",
    )
    weights: str | None = Field(
        default=None,
        min_length=1,
        description="Pre-trained weights of torchvision by name, such as DEFAULT or IMAGENET1K_V2. Null: none.",
    )

    @classmethod
    def cross_faults(cls, raw: Mapping[str, Any]) -> Iterator[Found]:
        """Checks that the network is named once."""
        yield from _one_of(raw, "name", "factory", "network")
        if raw.get("factory") is not None and raw.get("weights") is not None:
            yield ("weights",), "weights belong to a torchvision model; give a factory's weights as `checkpoint`"


class ValidationSettings(Section):
    """Where the images come from on which the search scores candidates."""

    source: Literal["train", "test"] = Field(
        default="train",
        description="`train`: a fraction of the training data is set apart. `test`: the files of the test set that fit "
        "`match`; the others stay the test set.",
    )
    fraction: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="With source train: the fraction of each class that is set apart. Default: 0.15.",
    )
    match: str | None = Field(
        default=None,
        min_length=1,
        description="With source test, and an imagefolder only: a glob for `<class>/<file>`, such as `*/0[0-4]??.jpg`.",
    )

    @property
    def part(self) -> float:
        """The fraction to set apart."""
        return 0.15 if self.fraction is None else self.fraction

    @classmethod
    def cross_faults(cls, raw: Mapping[str, Any]) -> Iterator[Found]:
        """Checks that each source has its own key."""
        source = raw.get("source", "train")
        if source == "test" and raw.get("match") is None:
            yield ("match",), "needed with `source: test`: a glob such as '*/0[0-4]??.jpg'"
        if source == "test" and raw.get("fraction") is not None:
            yield ("fraction",), "belongs to `source: train`; `source: test` uses `match`"
        if source == "train" and raw.get("match") is not None:
            yield ("match",), "belongs to `source: test`; `source: train` uses `fraction`"


class PreprocessingSettings(Section):
    """What happens to an image before the network sees it."""

    size: int | None = Field(
        default=None,
        ge=1,
        le=8192,
        description="Images are resized to this shorter side and cropped to a square (pixels). Null: as they are.",
    )
    mean: Floats | None = Field(
        default=None,
        description="Mean of each channel, of values scaled to [0, 1]. Null: computed from the training data.",
    )
    std: Floats | None = Field(
        default=None, description="Standard deviation of each channel, likewise. Null: computed from the training data."
    )
    flip: bool = Field(default=False, description="Fine-tuning mirrors images at random.")
    crop_padding: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="Fine-tuning pads images by this many pixels and crops them at random. 0: off.",
    )

    @classmethod
    def cross_faults(cls, raw: Mapping[str, Any]) -> Iterator[Found]:
        """Checks that the statistics fit each other."""
        mean, std = raw.get("mean"), raw.get("std")
        if (mean is None) != (std is None):
            yield ("std" if std is None else "mean",), "`mean` and `std` are given together or not at all"
        elif isinstance(mean, (list, tuple)) and isinstance(std, (list, tuple)) and len(mean) != len(std):
            yield ("std",), f"mean has {len(mean)} channels, std has {len(std)}"
        if isinstance(std, (list, tuple)):
            for i, value in enumerate(std):
                amount = number(value)
                if amount is not None and amount <= 0:
                    yield ("std", i), f"a standard deviation is positive, got {value}"


class DataSettings(Section):
    """The data to fine-tune and score on; its four parts (train, calibration, validation, test) are disjoint."""

    name: DataName | None = Field(
        default=None,
        description="digits and iris come with scikit-learn; mnist, fashion-mnist, cifar10, cifar100 are "
        "torchvision's; imagefolder is a folder or archive of your own. Excludes `factory`.",
    )
    factory: str | None = Field(
        default=None,
        pattern=FACTORY_PATTERN,
        description="`package.module:function`, a function of your own that returns "
        '{"train": (x, y), "val": ..., "test": ...} of tensors or data sets; see `model.factory`. Excludes `name`.',
    )
    path: str | None = Field(
        default=None,
        min_length=1,
        description="The folder of the data. For imagefolder also a .tar, .tar.gz or .tar.xz archive, with "
        "train/<class>/* and test/<class>/* or val/<class>/*.",
    )
    download: bool = Field(
        default=False, description="torchvision's sets may be downloaded to `path` where they are missing."
    )
    validation: ValidationSettings = Field(
        default_factory=ValidationSettings, description="Where validation images come from."
    )
    calibration: int | None = Field(
        default=None,
        ge=1,
        description="Number of samples carved out of the training data for statistics (criteria, compensation). Null: "
        "512, but at most a quarter of the training data.",
    )
    preprocessing: PreprocessingSettings = Field(
        default_factory=PreprocessingSettings, description="What happens to an image before the network sees it."
    )

    @classmethod
    def cross_faults(cls, raw: Mapping[str, Any]) -> Iterator[Found]:
        """Checks that the data are named once and that what the name needs is there."""
        yield from _one_of(raw, "name", "factory", "data")
        name, validation = raw.get("name"), raw.get("validation")
        if name == "imagefolder" and raw.get("path") is None:
            yield ("path",), "needed for an imagefolder: a folder or a .tar archive"
        if raw.get("download") is True and name in ("digits", "iris", "imagefolder"):
            yield ("download",), f"there is nothing to download for {name!r}"
        source = validation.get("source") if isinstance(validation, Mapping) else None
        if source == "test" and name is not None and name != "imagefolder":
            yield ("validation", "source"), "validation from the test set needs `name: imagefolder`"
