"""Sections of a space file that say how networks are trained and repaired: the recipe, and the dense baseline.

Decides their keys, meanings and valid values. Must not know how any of it is carried out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from autoprune.errors import nearest
from autoprune.space.section import Found, Section, number


def _as_distillation(value: Any) -> Any:
    return None if value is False else {} if value is True else value


def _as_schedule(value: Any) -> Any:
    if isinstance(value, str):
        if value not in ("one_shot", "iterative"):
            names = ("one_shot", "iterative")
            raise PydanticCustomError("fault", "{text}", {"text": f"unknown value {value!r}{nearest(value, names)}"})
        return None if value == "one_shot" else {}
    return value


def _compensation(value: Any) -> Any:
    if not isinstance(value, bool) and value != "merge":
        shown = f"the text {value!r}" if isinstance(value, str) else f"{value!r}"
        text = f"expected true or false, or merge; got {shown}"
        raise PydanticCustomError("fault", "{text}", {"text": text})
    return value


class DistillationSettings(Section):
    """Fine-tuning also imitates the dense network's outputs."""

    temperature: float = Field(default=4.0, gt=0, description="Softens both outputs before they are compared.")
    weight: float = Field(
        default=0.9, ge=0, le=1, description="Share of this term in the loss; the labels have the rest."
    )


class BaselineSettings(Section):
    """How a dense network is trained where there is no checkpoint."""

    epochs: float = Field(default=25, gt=0, le=100_000, description="Passes over the training data.")
    lr: float = Field(default=0.1, gt=0, description="Peak learning rate.")


class IterativeSettings(Section):
    """The network is pruned in several cuts with fine-tuning between them; the epochs in all are those of the rung."""

    kind: Literal["iterative"] = Field(default="iterative", description="Cuts in steps; the alternative is one_shot.")
    steps: int = Field(default=3, ge=2, le=100, description="Number of cuts; widths fall linearly over them.")
    share: float = Field(
        default=0.5, gt=0, lt=1, description="Fraction of the epochs that is spent between the first and the last cut."
    )


class RegularisationSettings(Section):
    """Training of the dense network that makes channels small before they are cut."""

    kind: Literal["bn_l1", "group_lasso", "growing_l2", "targeted_dropout"] = Field(
        description="bn_l1: L1 on the scales of normalisations; group_lasso: L2 norms of whole channels; growing_l2: a "
        "growing decay of the channels that will go; targeted_dropout: those channels are dropped at random."
    )
    strength: float | None = Field(
        default=None,
        ge=0,
        description="What is taken off in all, relative to the mean, by bn_l1 (0.25) and group_lasso (0.1); "
        "growing_l2: exponent of the decay in all (5); targeted_dropout: probability (0.5). Null: what brackets say.",
    )
    share: float = Field(default=0.3, gt=0, lt=1, description="Fraction of the epochs of a rung that is spent on it.")

    @classmethod
    def cross_faults(cls, raw: Mapping[str, Any]) -> Iterator[Found]:
        """Checks that a probability is one."""
        strength = number(raw.get("strength"))
        if raw.get("kind") == "targeted_dropout" and strength is not None and strength > 1:
            yield ("strength",), f"the strength of targeted_dropout is a probability, got {strength}"


_Switch = DistillationSettings | bool | None


class RecipeSettings(Section):
    """How a pruned network is repaired and fine-tuned."""

    batch_size: int = Field(default=64, ge=1, le=100_000, description="Samples of a training step.")
    optimizer: Literal["sgd", "adamw"] = Field(default="sgd", description="sgd (Nesterov momentum) or adamw.")
    lr: float = Field(default=0.02, gt=0, description="Peak learning rate; it falls to zero along a cosine.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of sgd.")
    weight_decay: float = Field(default=0.0005, ge=0, description="Weight decay; norms and biases have none.")
    warmup: float = Field(
        default=0.1, ge=0, lt=1, description="Fraction of the steps in which the learning rate rises."
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Probability taken from the true label for the others."
    )
    distillation: Annotated[
        DistillationSettings | None, BeforeValidator(_as_distillation, json_schema_input_type=_Switch)
    ] = Field(
        default_factory=DistillationSettings,
        description="Fine-tuning also imitates the dense network's outputs. Null or false: off.",
    )
    compensation: Annotated[bool | Literal["merge"], BeforeValidator(_compensation)] = Field(
        default=True,
        description="Weights that consume the kept channels are refitted to reproduce the dense layer's output. merge: "
        "instead each removed channel is folded into the kept one that is most like it, without data.",
    )
    ridge: float = Field(
        default=0.001,
        ge=0,
        description="Regularisation of that fit, relative to the mean of the Gram matrix's diagonal.",
    )
    recalibration_batches: int = Field(
        default=10,
        ge=0,
        description="Batches on which BatchNorm statistics are re-estimated before fine-tuning. 0: none.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Number format of fine-tuning and evaluation; auto takes the faster one on the device.",
    )
    baseline: BaselineSettings = Field(
        default_factory=BaselineSettings, description="Training of the dense network where there is no checkpoint."
    )
    schedule: Annotated[
        IterativeSettings | None,
        BeforeValidator(
            _as_schedule, json_schema_input_type=IterativeSettings | Literal["one_shot", "iterative"] | None
        ),
    ] = Field(
        default=None,
        description="one_shot (or null): the network is cut once, then fine-tuned. {kind: iterative}: it is cut in "
        "steps. On rungs with epochs.",
    )
    regularisation: RegularisationSettings | None = Field(
        default=None,
        description="The dense network is trained for a part of the epochs, before it is cut, so that channels become "
        "small. On rungs with epochs. Null: it is not.",
    )

    @classmethod
    def cross_faults(cls, raw: Mapping[str, Any]) -> Iterator[Found]:
        """Checks that the stages leave epochs for the last one."""
        shares = []
        for key, default in (("schedule", 0.5), ("regularisation", 0.3)):
            part = raw.get(key)
            if isinstance(part, Mapping):
                shares.append(number(part.get("share", default)))
            elif isinstance(part, Section) or part == "iterative":
                shares.append(number(getattr(part, "share", default)))
        known = [share for share in shares if share is not None]
        if len(known) == 2 and sum(known) >= 1:
            yield ("regularisation", "share"), f"with schedule.share it leaves no epochs for the last cut: {known}"
