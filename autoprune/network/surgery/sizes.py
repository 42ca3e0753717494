"""Sizes that a forward pass computes from another width: told from outside, so that they follow what is pruned.

`B, N, C = x.shape` and, behind the attention, `x.reshape(B, N, C)`: such code takes the width of its input for the
width of its heads, and breaks when either of them shrinks. No attribute says the number, so a module of such a class
becomes an instance of a subclass: its forward pass is the original one, under a mode that puts the right numbers where
`view`, `reshape`, `unflatten`, `expand` or a split is called. Decides how a module is told sizes; `computed_sizes`
decides which calls need it. Knows nothing of labels' meaning or of parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from autoprune.errors import CheckpointError
from autoprune.network.graph.groups import stays
from autoprune.network.graph.network import Network
from autoprune.network.graph.rules.table import SIZED_FUNCTIONS, Operator, Sizing

Numbers = Mapping[str, Mapping[str, Mapping[str, int]]]
"""Module path → number of the call in its forward pass → axis → size; numbers as text, for JSON."""


@contextmanager
def uncounted() -> Iterator[None]:
    """Keeps the calls inside of it from those modules whose forward passes are under way: for hooks of our own.

    A hook that reads what a layer gets reshapes it; sizes are told by the number of a call in the module's own code.
    """
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    running = [mode for mode in modes if isinstance(mode, Sizes) and not mode.paused]
    for mode in running:
        mode.paused = True
    try:
        yield
    finally:
        for mode in running:
            mode.paused = False


class Telling:
    """Mixed into a module's class: runs its forward pass with the sizes in `told_sizes`."""

    told_sizes: Mapping[int, Mapping[int, int]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the original forward pass returns."""
        with Sizes(self.told_sizes):
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles by the original class: this one is made when it is needed."""
        return _made, (type(self).__mro__[2],), self.__dict__.copy()


@functools.cache
def _telling(base: Any) -> Any:
    return type(base.__name__, (Telling, base), {"__module__": base.__module__, "__doc__": base.__doc__})


def _made(base: Any) -> Any:
    kind = _telling(base)
    return kind.__new__(kind)


class Sizes(TorchFunctionMode):
    """Puts the sizes of `told` into the calls that are told sizes, which it counts; `seen` gets every such result, and
    apart from them those that are counted from -1 downwards.
    """

    def __init__(
        self,
        told: Mapping[int, Mapping[int, int]],
        seen: tuple[list[tuple[tuple[int, ...], ...]], list[tuple[tuple[int, ...], ...]]] | None = None,
    ):
        super().__init__()
        self._told, self._seen, self._count, self._made = told, seen, 0, 0
        self.paused = False
        """Whether the calls are those of a hook; see `uncounted`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        apart = None if self.paused else _parsed_apart(func, args, kwargs or {})
        call = apart or (None if self.paused else _parsed(func, args, kwargs or {}))
        if call is None:
            return func(*args, **(kwargs or {}))
        first, sizes, again = call
        own = self._told.get(self._count if apart is None else -1 - self._made, {})
        if apart is None:
            self._count += 1
        else:
            self._made += 1
        result = again([n if _is(n, -1) else own.get(first + k, n) for k, n in enumerate(sizes)])
        if self._seen is not None:
            parts = result if isinstance(result, (tuple, list)) else [result]
            self._seen[apart is not None].append(tuple(tuple(int(n) for n in part.shape) for part in parts))
        return result


def _is(value: Any, number: int) -> bool:
    return isinstance(value, int) and value == number


_Call = tuple[int, Sequence[Any], Callable[[list[Any]], Any]]
"""Axis of the first size, the sizes, and the call with other sizes."""


def _parsed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    """Returns the parts of a call that is told sizes, or None for any other call."""
    known = _sized(func, Sizing.RESULT, Sizing.PARTS)
    if known is None or len(args) < 2 or not isinstance(args[0], Tensor):
        return None
    x, place = args[0], known.sizes or 1
    if known.start is not None:  # unflatten(x, dim, sizes)
        if len(args) <= place or not isinstance(args[known.start], int):
            return None
        before, after = args[:place], args[place + 1 :]
        return args[known.start] % x.ndim, list(args[place]), lambda sizes: func(*before, sizes, *after, **kwargs)
    listed = isinstance(args[place], (tuple, list))
    if known.sizing is Sizing.PARTS:
        return (0, list(args[1]), lambda sizes: func(x, sizes, *args[2:], **kwargs)) if listed else None
    sizes = list(args[1]) if listed else list(args[1:])
    if not all(isinstance(n, (int, torch.SymInt, Tensor)) for n in sizes):
        return None  # another type, not another shape; `torch.jit.trace` makes tensors of sizes
    return 0, sizes, lambda sizes: func(x, sizes, **kwargs)


def _parsed_apart(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    """Returns the parts of a call that makes a tensor of a size (zeros), or of a norm that is told a width.

    These are counted apart, from -1 downwards: numbers of models that were saved before these were told stay right.
    """
    known = _sized(func, Sizing.LAST, Sizing.CHANNELS)
    if known is not None:
        if len(args) < 2:
            return None
        listed = isinstance(args[1], (tuple, list))
        return (
            0,
            list(args[1]) if listed else [args[1]],
            lambda sizes: func(args[0], sizes if listed else sizes[0], *args[2:], **kwargs),
        )
    known = _sized(func, Sizing.NEW)
    if known is None:
        return None
    before = args[: known.sizes]  # the tensor that `new_zeros` is a method of
    rest = args[len(before) :]
    if "size" in kwargs:
        sizes, after = kwargs["size"], rest
    elif rest and isinstance(rest[0], (tuple, list)):
        sizes, after = rest[0], rest[1:]
    else:
        sizes, after = rest, ()
    if not all(isinstance(n, (int, torch.SymInt)) for n in sizes):
        return None
    others = {key: value for key, value in kwargs.items() if key != "size"}
    return 0, list(sizes), lambda sizes: func(*before, tuple(sizes), *after, **others)


def _sized(func: Any, *kinds: Sizing) -> Operator | None:
    """Returns what is known of a function that is given sizes of one of these kinds, or None for any other."""
    known = SIZED_FUNCTIONS.get(getattr(func, "__name__", ""))
    return known if known is not None and known.sizing in kinds else None


def tell(model: nn.Module, numbers: Numbers) -> nn.Module:
    """Gives modules of `model` the sizes of `numbers`, in place; their classes change, their parameters do not.

    Raises:
        CheckpointError: The model has no such module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, calls in numbers.items():
        module: Any = modules.get(path)
        if module is None:
            raise CheckpointError(f"the model has no module {path!r}")
        if not isinstance(module, Telling):
            base: Any = type(module)
            module.__class__ = _telling(base)
        module.told_sizes = {int(call): {int(axis): int(n) for axis, n in own.items()} for call, own in calls.items()}
    return model


def told_numbers(network: Network, kept: np.ndarray) -> Numbers:
    """Returns the sizes that the network's modules are told when the units `kept` stay."""
    numbers: dict[str, dict[str, dict[str, int]]] = {}
    for told in network.told:
        axes = numbers.setdefault(told.module, {}).setdefault(str(told.call), {})
        axes[str(told.axis)] = int(stays(network.units_of(told.labels), kept).sum())
    return numbers
