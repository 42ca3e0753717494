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

from autoprune.errors import CheckpointError
from autoprune.network.labels import Labels, Value
from autoprune.network.tape import Size

SIZED = frozenset(["view", "_unsafe_view", "reshape", "unflatten", "expand", "split_with_sizes"])
"""Operators whose arguments are sizes."""
_NOT_WIDTHS = ("stride", "kernel", "pad", "dilat", "depth", "layers", "window", "patch", "image", "img", "resolution")
"""Parts of names that speak of space or of depth: never the number of channels."""


@dataclass(frozen=True, slots=True)
class Attribute:
    """An integer attribute of a module that follows the number of indices with `units` that stay."""

    module: str
    name: str
    units: Labels


def width_attributes(module: nn.Module) -> dict[str, int]:
    """Returns the integer attributes of a module that may be the number of channels, heads or the like."""
    return {
        name: value
        for name, value in vars(module).items()
        if type(value) is int and value > 1 and not any(part in name.lower() for part in _NOT_WIDTHS)
    }


def inferred_axis(node: torch.fx.Node, name: str, rank: int) -> int | None:
    """Returns the axis of the result whose size a call of `view` or `unflatten` leaves open, if there is one."""
    start = 0
    sizes: Any = node.args[-1]
    if name == "unflatten":
        start = int(str(node.args[1])) % (rank - len(sizes) + 1)
    if name not in SIZED or not isinstance(sizes, (list, tuple)) or -1 not in sizes:
        return None
    return start + list(sizes).index(-1)


def written_sizes(node: torch.fx.Node, name: str, module: str, result: Any) -> list[Size]:
    """Returns the sizes of labelled dimensions that a call writes down, in the order of the dimensions."""
    if name not in SIZED:
        return []
    found: list[Size] = []
    for value in result if isinstance(result, tuple) else (result,):
        if not isinstance(value, Value):
            continue
        open_axis = inferred_axis(node, name, len(value.shape))
        for axis, labels in enumerate(value.dims):
            if labels is not None and axis != open_axis:
                found.append(Size(module, value.shape[axis], labels))
    return found


def following(model: nn.Module, sizes: Sequence[tuple[str, int, Labels]]) -> tuple[Attribute, ...]:
    """Returns the attributes that must follow, given `(module, number, units)` of every size that was written down.

    An attribute stands for the dimension with its number. Where two dimensions of one module have the same number, a
    name with `head` and without `dim` is the outermost one and every other name the next.
    """
    modules = dict(model.named_modules())
    dims: dict[tuple[str, int], list[Labels]] = {}
    for module, number, units in sizes:
        known = dims.setdefault((module, number), [])
        if (units >= 0).any() and not any(_same(units, other) for other in known):
            known.append(units)
    found: list[Attribute] = []
    for (module, number), choices in dims.items():
        if not choices:
            continue
        for name, value in width_attributes(modules[module]).items():
            if value == number:
                counts_heads = "head" in name and "dim" not in name
                found.append(Attribute(module, name, choices[0 if counts_heads else -1]))
    return tuple(found)


def _same(a: Labels, b: Labels) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def set_attributes(model: nn.Module, values: Mapping[str, Mapping[str, int]]) -> None:
    """Sets integer attributes, module path → name → value, in place.

    Raises:
        CheckpointError: The model has no such module or attribute.
    """
    modules = dict(model.named_modules())
    for path, attributes in values.items():
        for name, value in attributes.items():
            if path not in modules or name not in width_attributes(modules[path]):
                raise CheckpointError(f"the model has no module {path!r} with an integer attribute {name!r}")
            setattr(modules[path], name, int(value))
