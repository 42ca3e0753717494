"""The section of a space file that says which activations may be replaced by which.

Decides its keys and valid values. Must not know how a module is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from autoprune.space.section import Found, Section, as_tuple

Activation = Literal[
    "relu", "relu6", "leaky_relu", "elu", "silu", "hardswish", "gelu", "mish", "tanh", "hardtanh", "sigmoid",
    "hardsigmoid",
]  # fmt: skip
Kinds = Annotated[Annotated[tuple[Activation, ...], Field(min_length=1)] | None, BeforeValidator(as_tuple)]


class ActivationSettings(Section):
    """What may stand in the place of the network's activation modules: `relu: [relu, relu6]`. Default: nothing else."""

    relu: Kinds = Field(default=None, description="What may stand where nn.ReLU does; the first one is the default.")
    relu6: Kinds = Field(default=None, description="What may stand where nn.ReLU6 does.")
    leaky_relu: Kinds = Field(default=None, description="What may stand where nn.LeakyReLU does.")
    elu: Kinds = Field(default=None, description="What may stand where nn.ELU does.")
    silu: Kinds = Field(default=None, description="What may stand where nn.SiLU does, such as [silu, hardswish].")
    hardswish: Kinds = Field(default=None, description="What may stand where nn.Hardswish does.")
    gelu: Kinds = Field(default=None, description="What may stand where nn.GELU does, such as [gelu, relu].")
    mish: Kinds = Field(default=None, description="What may stand where nn.Mish does.")
    tanh: Kinds = Field(default=None, description="What may stand where nn.Tanh does.")
    hardtanh: Kinds = Field(default=None, description="What may stand where nn.Hardtanh does.")
    sigmoid: Kinds = Field(default=None, description="What may stand where nn.Sigmoid does.")
    hardsigmoid: Kinds = Field(default=None, description="What may stand where nn.Hardsigmoid does.")
    scope: Literal["model", "stage", "layer"] | None = Field(
        default=None,
        description="One choice of each kind for the whole model, for each stage, or for each activation. Null: as "
        "criteria.scope says.",
    )

    @property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """Kind → what may stand in its place, for the kinds that are named."""
        return {kind: kinds for kind in get_args(Activation) if (kinds := getattr(self, kind)) is not None}

    @classmethod
    def cross_faults(cls, raw: Mapping[str, Any]) -> Iterator[Found]:
        """Checks that no activation occurs twice in a list."""
        for kind, kinds in raw.items():
            if isinstance(kinds, (list, tuple)):
                for i, name in enumerate(kinds):
                    if name in kinds[:i]:
                        yield (kind, i), f"{name!r} occurs twice"
