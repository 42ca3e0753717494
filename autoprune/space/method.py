"""Sections of a space file that say how it is pruned: budget, groups, criteria and search.

Decides their keys, meanings and valid values. Must not know how any of it is carried out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from autoprune.budget import KEYS, read_limit
from autoprune.errors import BudgetError, nearest
from autoprune.space.criteria import NAMED_CRITERIA, described
from autoprune.space.masking import DEFAULT_STEP
from autoprune.space.section import FACTORY_PATTERN, NAME_PATTERN, Duration, Found, Globs, Section, as_tuple, number

CRITERIA = tuple(NAMED_CRITERIA)


def _criterion(value: Any) -> Any:
    if isinstance(value, str) and (value in NAMED_CRITERIA or re.match(FACTORY_PATTERN, value)):
        return value
    if isinstance(value, str):
        text = (
            f"unknown value {value!r}{nearest(value, NAMED_CRITERIA)} (a function of your own: package.module:function)"
        )
    else:
        text = f"expected one of {', '.join(NAMED_CRITERIA)}, or package.module:function; got {value!r}"
    raise PydanticCustomError("fault", "{text}", {"text": text})


Criterion = Annotated[
    str,
    BeforeValidator(_criterion),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "enum": list(CRITERIA)}, {"type": "string", "pattern": FACTORY_PATTERN}]}
    ),
]


def _count(value: Any) -> Any:
    return _checked("macs", value)


def _bytes(value: Any) -> Any:
    return _checked("size", value)


def _latency(value: Any) -> Any:
    return _checked("latency", value)


def _latency_ms(value: Any) -> Any:
    return _checked("latency_ms", value)


def _checked(key: str, value: Any) -> Any:
    if value is None:
        return None
    try:
        read_limit(key, value)
    except BudgetError as error:
        raise PydanticCustomError("fault", "{text}", {"text": str(error)}) from error
    return value


Count = Annotated[float | str | None, BeforeValidator(_count)]
Bytes = Annotated[float | str | None, BeforeValidator(_bytes)]


class BudgetSettings(Section):
    """Upper limits; each is a fraction of the dense network (0.5, "50%") or absolute ("30M", "1.2 MB")."""

    macs: Count = Field(default=None, description="Limit on multiply-accumulates of one sample: 0.5, '50%' or '30M'.")
    params: Count = Field(
        default=None, description="Limit on the number of trainable parameters: 0.5, '50%' or '270k'."
    )
    size: Bytes = Field(
        default=None, description="Limit on the bytes of the weights: 0.5, '50%', '1.2 MB' or '512 KiB'."
    )
    memory: Bytes = Field(
        default=None,
        description="Limit on the bytes of activations that are alive together for one sample: 0.5, '2 MB'.",
    )
    latency: Annotated[float | str | None, BeforeValidator(_latency)] = Field(
        default=None,
        description="Limit on the latency that the latency table predicts, under the conditions of the section "
        "`latency`: a fraction of the dense network's (0.5, '50%') or a time ('4 ms').",
    )
    latency_ms: Annotated[float | None, BeforeValidator(_latency_ms)] = Field(
        default=None, description="The same limit in milliseconds: 4. Excludes `latency`."
    )
    front: Annotated[tuple[float, float] | None, BeforeValidator(as_tuple)] = Field(
        default=None,
        description="Fractions of the dense cost between which the front is searched, [low, high]. The cost is the "
        "first of macs, params, size, memory, latency that has a limit (macs where none has). Null: from the "
        "least possible to the limit.",
    )
    points: Annotated[tuple[float, ...] | None, BeforeValidator(as_tuple)] = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="In the place of `front`: the fractions of that cost at which candidates are wanted, and only "
        "there, such as [0.7, 0.5, 0.35].",
    )

    @property
    def limits(self) -> dict[str, float | str]:
        """The limits that are set, as `budget.resolve_budget` reads them."""
        return {key: value for key in KEYS if (value := getattr(self, key)) is not None}

    @property
    def limits_latency(self) -> bool:
        """Whether a latency table is needed."""
        return self.latency is not None or self.latency_ms is not None

    @classmethod
    def cross_faults(cls, raw: Mapping[str, Any]) -> Iterator[Found]:
        """Checks that latency is limited once, and that the front rises within (0, 1] and reaches below the limit."""
        if raw.get("latency") is not None and raw.get("latency_ms") is not None:
            yield ("latency_ms",), "is the same limit as `latency`; give one of them"
        yield from _point_faults(raw)
        front = raw.get("front")
        if not isinstance(front, (list, tuple)) or len(front) != 2:
            return
        low, high = (number(value) for value in front)
        if low is None or high is None:
            return
        if not 0.0 < low < high <= 1.0:
            yield ("front",), f"rises within (0, 1], such as [0.25, 1.0]; got [{low}, {high}]"
            return
        key, limit = _axis(raw)
        if limit < low:
            yield ("front",), f"starts at {low}, above the budget {key}: {raw[key or '']}"


def _axis(raw: Mapping[str, Any]) -> tuple[str | None, float]:
    """Returns the key of the cost on the front's axis, and its limit as a fraction where it is given as one, else 1."""
    key = next((key for key in KEYS if raw.get(key) is not None), None)
    try:
        limit, fraction = read_limit(key, raw[key]) if key else (1.0, True)
    except BudgetError:
        return key, 1.0
    return key, limit if fraction else 1.0


def _point_faults(raw: Mapping[str, Any]) -> Iterator[Found]:
    points = raw.get("points")
    if not isinstance(points, (list, tuple)):
        return
    if raw.get("front") is not None:
        yield ("points",), "takes the place of `front`; give one of them"
    key, limit = _axis(raw)
    for i, value in enumerate(points):
        point = number(value)
        if point is None:
            continue
        if not 0.0 < point <= 1.0:
            yield ("points", i), f"is a fraction of the dense cost, in (0, 1]; got {point}"
        elif point > limit:
            yield ("points", i), f"{point} is above the budget {key}: {raw[key or '']}"


class LatencySettings(Section):
    """Under which conditions latency is measured and predicted; the device is the space's."""

    batch: int = Field(default=1, ge=1, le=100_000, description="Samples of a forward pass.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Number format of weights and inputs."
    )
    threads: int = Field(default=1, ge=1, le=1024, description="Threads of a forward pass on the CPU.")


class GroupSettings(Section):
    """Which pruning groups may shrink, and how far."""

    include: Globs = Field(
        default=("*",), min_length=1, description="Globs for the names of the groups that may be pruned."
    )
    exclude: Globs = Field(
        default=(), description="Globs for the names of groups that keep all their channels; wins over `include`."
    )
    min_ratio: float = Field(
        default=0.0, ge=0, lt=1, description="Least fraction of channels that is removed from each group."
    )
    max_ratio: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="Largest fraction of channels (with masks: of weights) that is removed from a group.",
    )
    round_to: int = Field(
        default=1, ge=1, description="Widths are multiples of this number (8 suits many accelerators)."
    )
    step: float = Field(
        default=DEFAULT_STEP,
        gt=0,
        le=0.5,
        description="With `pruning: unstructured`, ratios are multiples of this number; min_ratio and max_ratio too.",
    )

    blocks: bool = Field(
        default=False,
        description="A group may also be removed whole (ratio 1), whatever max_ratio says, where the network works "
        "without it: the inside of a residual block, an SE gate. So depth is searched together with width.",
    )

    @classmethod
    def cross_faults(cls, raw: Mapping[str, Any]) -> Iterator[Found]:
        """Checks the order of the ratios."""
        low, high = number(raw.get("min_ratio", 0.0)), number(raw.get("max_ratio", 0.9))
        if low is not None and high is not None and low > high:
            yield ("min_ratio",), f"is above max_ratio ({low} > {high})"


class CriteriaSettings(Section):
    """Which criteria the search may choose from to rank channels."""

    choices: Annotated[tuple[Criterion, ...], BeforeValidator(as_tuple)] = Field(
        default=("l2", "taylor", "obs"),
        min_length=1,
        description=f"{described()}; package.module:function: your own, see autoprune.network.criteria.own.",
    )
    scope: Literal["model", "stage", "layer"] = Field(
        default="model",
        description="One criterion for the whole model, one for each stage, or one for each pruning group.",
    )

    @classmethod
    def cross_faults(cls, raw: Mapping[str, Any]) -> Iterator[Found]:
        """Checks that no criterion occurs twice."""
        choices = raw.get("choices")
        if not isinstance(choices, (list, tuple)):
            return
        for i, choice in enumerate(choices):
            if choice in choices[:i]:
                yield ("choices", i), f"{choice!r} occurs twice"


class RungSettings(Section):
    """One rung of the ladder: how much of the recipe is run, and for how many candidates."""

    rung: str = Field(pattern=NAME_PATTERN, description="Name of the rung; its Optuna study is called `<name>.<rung>`.")
    epochs: float = Field(
        default=0,
        ge=0,
        le=100_000,
        description="Epochs of fine-tuning; fractions are allowed. 0: compensation and recalibration only.",
    )
    images: int | None = Field(default=None, ge=1, description="Validation images that score a candidate. Null: all.")
    trials: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="Candidates promoted from the rung before. The first rung takes `search.trials`.",
    )
    seeds: int = Field(
        default=1, ge=1, le=100, description="The recipe is run once a seed and the scores are averaged."
    )
    test: bool = Field(default=False, description="The test set is scored too; on the last rung only.")
    calibration: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Images that the repair of a candidate refits its layers on; beyond `data.calibration` they are "
        "taken from the training images. More of them gain accuracy where a rung trains little or nothing. Null: "
        "`data.calibration`.",
    )


def _rung(rung: Any, key: str) -> Any:
    return rung.get(key) if isinstance(rung, Mapping) else getattr(rung, key, None)


RESERVED = ("controls", "scratch", "finetune")
"""Rungs that a search adds to those of its ladder: controls, points trained from scratch, models trained longer."""
_LADDER = (
    RungSettings(rung="screen", epochs=0, images=2000),
    RungSettings(rung="tune", epochs=3, trials=10),
    RungSettings(rung="final", epochs=8, trials=6, test=True),
)


class SearchSettings(Section):
    """How the search goes about it."""

    trials: int = Field(default=48, ge=1, le=100_000, description="Candidates on the first rung, warm starts included.")
    sampler: Literal["auto", "learned", "tpe", "nsga2", "gp", "random", "qmc"] = Field(
        default="auto",
        description="Who proposes candidates on the first rung after the warm starts: one of Optuna's samplers (gp is "
        "for few groups: an ask of 60 takes seconds); learned: the additive model whose weights are learned from the "
        "trials so far; auto: that model, and TPE for one of four candidates.",
    )
    warm_starts: bool = Field(
        default=True, description="The first candidates are uniform, globally ranked and additive-error policies."
    )
    controls: int = Field(
        default=4,
        ge=0,
        le=1000,
        description="Simple policies that are measured beside the front by the last rung's recipe, to show what the "
        "search gains. In this order: at the budget uniform and global by a weight norm, random ratios, and global by "
        "every other criterion; then uniform and global at lower costs. 0: none.",
    )
    scratch: int = Field(
        default=0,
        ge=0,
        le=100,
        description="So many points of the finished front, well spread, are also trained from random initial weights "
        "by the last rung's recipe, and stand among the controls. 0: none.",
    )
    trial_timeout: Duration | None = Field(
        default=None,
        description="Longest time of a trial, in seconds or as 90s, 10m, 2h; what takes longer fails. Null: no limit.",
    )
    hang_timeout: Duration | None = Field(
        default=900.0,
        description="A worker process without any progress (no batch, no step) for this long is killed, and its trial "
        "is tried once more. Null: never.",
    )
    ladder: Annotated[tuple[RungSettings, ...], BeforeValidator(as_tuple)] = Field(
        default=_LADDER,
        min_length=1,
        description="Rungs from cheap to thorough; the best and well-spread candidates of one enter the next.",
    )

    @classmethod
    def cross_faults(cls, raw: Mapping[str, Any]) -> Iterator[Found]:
        """Checks the rungs against each other."""
        ladder = raw.get("ladder")
        if not isinstance(ladder, (list, tuple)):
            return
        names: list[Any] = []
        for i, rung in enumerate(ladder):
            if not isinstance(rung, (Mapping, RungSettings)):
                continue
            name = _rung(rung, "rung")
            if name in RESERVED:
                yield ("ladder", i, "rung"), f"{name!r} is what autoprune calls a rung of its own; choose another name"
            if name is not None and name in names:
                yield ("ladder", i, "rung"), f"two rungs are called {name!r}"
            names.append(name)
            if i == 0 and _rung(rung, "trials") is not None:
                yield ("ladder", i, "trials"), "the first rung has `search.trials` candidates; leave this out"
            if i > 0 and _rung(rung, "trials") is None:
                yield ("ladder", i, "trials"), "needed: how many candidates are promoted to this rung"
            if i < len(ladder) - 1 and _rung(rung, "test") is True:
                yield ("ladder", i, "test"), "the test set is scored on the last rung only"
