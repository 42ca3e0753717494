"""Numbers that a module writes down twice: sizes of dimensions that are also integer attributes (heads, widths).

Decides which attribute of which module a literal size in a call of `view` comes from, and what it becomes when
channels go. A module such as `x.view(B, N, 3, self.num_heads, self.head_dim)` runs with fewer heads only where
`num_heads` follows. Knows nothing of labels' meaning or of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from autoprune.errors import CheckpointError
from autoprune.network.labels import Labels, Value
from autoprune.network.tape import Made, Size

SIZED = frozenset(["view", "_unsafe_view", "reshape", "unflatten", "expand", "split_with_sizes"])
"""Operators whose arguments are sizes."""
SPLITS = frozenset(["split_with_sizes", "split_with_sizes_copy", "unsafe_split_with_sizes"])
"""Operators that are told the sizes of their parts, one by one."""
_TOLD_NORMS = frozenset(["layer_norm", "rms_norm"])
"""Norms that are told the sizes of the last dimensions."""
_CHANNEL_NORMS = frozenset(["group_norm", "batch_norm", "instance_norm"])
"""Norms over dimension 1, of which PyTorch's modules write down the width, and one is told how many groups it has."""
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
    if name in _TOLD_NORMS or name in _CHANNEL_NORMS:
        return _norm_sizes(node, name, module, result)
    if name not in SIZED:
        return []
    found: list[Size] = []
    parts = result if isinstance(result, tuple) else (result,)
    shapes = tuple(part.shape for part in parts if isinstance(part, Value))
    if name in SPLITS:
        along = split_axis(node, len(shapes[0]))
        sizes = tuple(shape[along] for shape in shapes)
        return [
            Size(module, sizes[place], labels, node.name, shapes, place, sizes)
            for place, part in enumerate(parts)
            if (labels := part.dims[along]) is not None
        ]
    for value in parts:
        if not isinstance(value, Value):
            continue
        open_axis = inferred_axis(node, name, len(value.shape))
        before = node.args[0].meta["val"].shape if isinstance(node.args[0], torch.fx.Node) else ()
        kept = value.dims[0] is None and tuple(before[:1]) == value.shape[:1]
        for axis, labels in enumerate(value.dims):
            if labels is not None and axis != open_axis:
                found.append(Size(module, value.shape[axis], labels, node.name, shapes, axis, apart=kept and axis > 0))
    return found


def made_sizes(made: Mapping[str, Made]) -> list[Size]:
    """Returns the sizes of tensors that modules make (zeros), where they met channels."""
    return [
        Size(own.module, own.shape[axis], labels, node, (own.shape,), axis, apart=axis > 0, made=True)
        for node, own in made.items()
        for axis, labels in enumerate(own.labels)
        if labels is not None and not own.parts
    ]


def _norm_sizes(node: torch.fx.Node, name: str, module: str, result: Any) -> list[Size]:
    """Returns the widths that a norm is told, or that its module repeats beside parameters that it may not have.

    For these `axis` is the place among what the call is told.
    """
    if not isinstance(result, Value):
        return []
    if name in _CHANNEL_NORMS:
        labels = result.dims[1]
        told = name == "group_norm" and node.args[1] == result.shape[1]  # as many groups as channels
        shapes = (result.shape,) if told else ()
        size = None if labels is None else Size(module, len(labels), labels, node.name, shapes, 0)
        return [] if size is None else [replace(size, apart=True, made=True, implied=not told)]
    sizes: Any = node.args[1]
    parts = tuple(int(n) for n in sizes)
    dims = result.dims[len(result.dims) - len(parts) :]
    return [
        Size(module, parts[place], labels, node.name, (result.shape,), place, parts, apart=True, made=True)
        for place, labels in enumerate(dims)
        if labels is not None
    ]


def split_axis(node: torch.fx.Node, rank: int) -> int:
    """Returns the axis along which a call of split cuts."""
    axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    return int(str(axis)) % rank


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
