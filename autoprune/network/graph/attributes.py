"""Numbers that a module writes down twice: sizes of dimensions that are also integer attributes (heads, widths).

Decides which attribute of which module a literal size in a call of `view` comes from, and what it becomes when
channels go. A module such as `x.view(B, N, 3, self.num_heads, self.head_dim)` runs with fewer heads only where
`num_heads` follows. Knows nothing of labels' meaning or of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from autoprune.errors import CheckpointError
from autoprune.network.graph.labels import Labels
from autoprune.network.graph.record import Size

_NOT_WIDTHS = ("stride", "kernel", "pad", "dilat", "depth", "layers", "window", "patch", "image", "img", "resolution")
"""Parts of names that speak of space or of depth: never the number of channels."""


@dataclass(frozen=True, slots=True)
class Attribute:
    """An integer attribute of a module that follows the number of indices with `units` that stay.

    `place` is the position of the integer in an attribute that is a list of them.
    """

    module: str
    name: str
    units: Labels
    place: int | None = None


def width_attributes(module: nn.Module) -> dict[str, int]:
    """Returns the integer attributes of a module that may be the number of channels, heads or the like."""
    return {
        name: value
        for name, value in vars(module).items()
        if type(value) is int and value > 1 and not any(part in name.lower() for part in _NOT_WIDTHS)
    }


def width_lists(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the attributes of a module that are lists or tuples of integers, such as widths of parts."""
    return {
        name: tuple(value)
        for name, value in vars(module).items()
        if type(value) in (list, tuple, torch.Size)
        and len(value) > 0
        and all(type(n) is int and n > 0 for n in value)
        and not any(part in name.lower() for part in _NOT_WIDTHS)
    }


def following(model: nn.Module, sizes: Sequence[tuple[Size, Labels]]) -> tuple[Attribute, ...]:
    """Returns the attributes that must follow, given every size that was written down and its units.

    An attribute stands for the dimension with its number, a list of integers for the parts with its numbers. Where two
    dimensions of one module have the same number, a name with `head` and without `dim` is the outermost one and every
    other name the next.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    dims: dict[tuple[str, int], list[Labels]] = {}
    found: dict[tuple[str, str, int | None], Attribute] = {}
    for size, units in sizes:
        if not (units >= 0).any() or isinstance(modules[size.module], (nn.RNNBase, nn.RNNCellBase)):
            continue  # a recurrent module's sizes are read from its parameters
        for name, parts in width_lists(modules[size.module]).items():
            if parts == size.parts:
                found[size.module, name, size.axis] = Attribute(size.module, name, units, size.axis)
        if size.implied:
            if (own := _channels_of(modules[size.module])) is not None:
                found[size.module, own, None] = Attribute(size.module, own, units)
            continue
        known = dims.setdefault((size.module, size.number), [])
        if not any(_same(units, other) for other in known):
            known.append(units)
    for (module, number), choices in dims.items():
        for name, value in width_attributes(modules[module]).items():
            if value == number:
                counts_heads = "head" in name and "dim" not in name
                found[module, name, None] = Attribute(module, name, choices[0 if counts_heads else -1])
    return tuple(found.values())


def _channels_of(norm: nn.Module) -> str | None:
    """Returns the attribute in which PyTorch's own norms keep their number of channels."""
    if isinstance(norm, nn.GroupNorm):
        return "num_channels"
    return "num_features" if isinstance(norm, _NormBase) else None


def _same(a: Labels, b: Labels) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def _holds_integers(value: Any) -> bool:
    """Whether an attribute is an integer or a list of them; those of a layer that lost every channel are 0."""
    if type(value) in (list, tuple, torch.Size):
        return bool(value) and all(type(n) is int for n in value)
    return type(value) is int


Numbers = Mapping[str, Mapping[str, "int | Mapping[str, int]"]]
"""Module path → attribute → its new value, or position (as text, for JSON) → new value in a list of integers."""


def set_attributes(model: nn.Module, values: Numbers) -> None:
    """Sets integer attributes and integers in lists, in place.

    Raises:
        CheckpointError: The model has no such module or attribute.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, attributes in values.items():
        module = modules.get(path)
        for name, value in attributes.items():
            if module is None or not _holds_integers(vars(module).get(name)):
                raise CheckpointError(f"the model has no module {path!r} with an integer attribute {name!r}")
            old = getattr(module, name)
            if not isinstance(value, Mapping):
                setattr(module, name, int(value))
                continue
            if isinstance(old, int) or any(int(place) >= len(old) for place in value):
                raise CheckpointError(f"the attribute {name!r} of the module {path!r} is shorter than the saved one's")
            setattr(module, name, type(old)(int(value.get(str(place), n)) for place, n in enumerate(old)))
