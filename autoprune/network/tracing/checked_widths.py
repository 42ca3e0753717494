"""Widths that a module's code checks or uses where no graph shows it: `assert x.shape[1] == self.channels`.

A check leaves nothing in the exported graph, so nobody is told which attribute is which width. Pruned copies are run
without numbers; where the code of a module raises, the integers that this code reads and that were the size of
something that the module worked on are tried as that size, one after the other. What makes the copy run further is
kept, if it does so for several selections: groups lose unequal fractions in them, so that a number which only happened
to be the same does not pass. All other attributes stay as they are. Decides which attributes follow for that reason;
knows nothing of how groups are found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autoprune.network.graph.assembly import assemble
from autoprune.network.graph.attributes import width_attributes
from autoprune.network.graph.groups import stays
from autoprune.network.graph.labels import Labels
from autoprune.network.graph.modules import evaluating
from autoprune.network.graph.network import Network
from autoprune.network.graph.record import Width
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.selection import Selection, unit_mask
from autoprune.network.tracing.verify import BREAKS, Shapes, halved, verified

_SEEDS = (0, 1, 2)
"""Selections that an attribute must make run further."""
_MOST = 200
"""Attributes that are tried for one network, before it is taken for one that breaks for another reason."""
_OPERATOR = f"{BREAKS}: RuntimeError"
"""What a group says that an operator refused: no attribute is likely to help it alone."""


def with_checked_widths(network: Network, names: Sequence[str]) -> Network:
    """Returns the network with attributes following that let copies run in which the groups `names` are pruned, as far
    as there are such; else the network itself.
    """
    return _Search(network).extended(names)


def with_checks_of_single_groups(network: Network) -> Network:
    """Returns the network with attributes following for groups that broke, each tried by itself, where that frees some.

    Where several break, the first one hides from the others what would let them run.
    """
    names = [name for name, why in network.broken.items() if why.startswith(BREAKS) and not why.startswith(_OPERATOR)]
    if not names or not network.record.widths:
        return network
    whole = replace(network, assembly=assemble(network.record, {}), broken={})
    found = whole
    for name in names:
        found = _Search(found).extended([name])
    if found is whole:
        return network
    again = verified(found, heal=with_checked_widths)
    return again if len(again.groups) > len(network.groups) else network


class _Search:
    """Tries attributes on cut copies of a network."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._shapes = Shapes(network)
        self._tried = 0
        self._widths: dict[str, list[Width]] = {}
        for width in network.record.widths:
            self._widths.setdefault(width.module, []).append(width)

    def extended(self, names: Sequence[str]) -> Network:
        """Returns the network with what lets copies without some of the groups' channels run further."""
        network = self._network
        if not self._widths:
            return network
        failures = [_failure(network, self._shapes, halved(network, list(names), seed)) for seed in _SEEDS[:1]]
        while failures[0] is not None:
            failures += [_failure(network, self._shapes, halved(network, list(names), seed)) for seed in _SEEDS[1:]]
            step = self._next(network, names, failures)
            if step is None:
                break
            network, failures = step[0], step[1][:1]
        return network

    def _next(
        self, network: Network, names: Sequence[str], failures: Sequence[_Failure | None]
    ) -> tuple[Network, list[_Failure | None]] | None:
        """Returns the network with one more attribute that follows, and where copies fail then; None: there is none."""
        first = failures[0]
        assert first is not None
        kept = unit_mask(network, halved(network, list(names), _SEEDS[0]))
        for width, name in self._candidates(network, first, kept):
            self._tried += 1
            if self._tried > _MOST:
                return None
            tried = replace(network, checked=(*network.checked, replace(width, name=name)))
            after: list[_Failure | None] = []
            for seed, before in zip(_SEEDS, failures, strict=True):
                after.append(_failure(tried, self._shapes, halved(tried, list(names), seed)))
                if not _further(after[-1], before):
                    break
            else:
                return tried, after
        return None

    def _candidates(self, network: Network, failure: _Failure, kept: np.ndarray) -> Iterator[tuple[Width, str]]:
        """Yields what an attribute may be the size of, and its name: of the code that raised first, then of its
        callers.
        """
        modules = dict(network.model.named_modules(remove_duplicate=False))
        follows = {(attribute.module, attribute.name) for attribute in network.attributes}
        for path, read in failure.places:
            numbers = width_attributes(modules[path])
            for name in (name for name in read if name in numbers and (path, name) not in follows):
                seen: list[Labels] = []
                for width in self._widths.get(path, []):
                    units = network.units_of(width.labels)
                    known = any(units.shape == own.shape and bool((units == own).all()) for own in seen)
                    if width.number == numbers[name] and not known and not stays(units, kept).all():
                        seen.append(units)
                        yield width, name


class _Failure:
    """How far a pass came that raised, and the modules under way: path and the names that their code reads."""

    def __init__(self, error: Exception, model: nn.Module, calls: int) -> None:
        paths = {id(module): path for path, module in model.named_modules()}
        frames = list(_frames(error.__traceback__))
        self.calls = calls
        self.places: list[tuple[str, tuple[str, ...]]] = []
        self.line: tuple[str, int] = ("", 0)
        for frame, line in reversed(frames):
            code = frame.f_code
            own: Any = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            path = paths.get(id(own)) if isinstance(own, nn.Module) else None
            if path is not None and code.co_filename != nn.modules.module.__file__:
                if not self.places:
                    self.line = (f"{path}:{code.co_name}", line)
                self.places.append((path, _read(type(own), code.co_names)))


def _read(kind: type, names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names that code reads, and those that properties of these names read in turn."""
    properties = (getattr(kind, name, None) for name in names)
    codes = (getattr(own.fget, "__code__", None) for own in properties if isinstance(own, property))
    further = (code.co_names for code in codes if code is not None)
    return tuple(dict.fromkeys((*names, *(name for own in further for name in own))))


def _frames(trace: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _further(after: _Failure | None, before: _Failure | None) -> bool:
    """Whether a pass came further than the one before: to its end, to a later call, or to a later line."""
    if after is None or before is None:
        return after is None
    if after.calls != before.calls:
        return after.calls > before.calls
    return after.line[0] == before.line[0] and after.line[1] > before.line[1]


class _Counted(TorchFunctionMode):
    """Counts calls of torch, and reads of a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def _failure(network: Network, shapes: Shapes, selection: Selection) -> _Failure | None:
    """Runs a copy that is cut to `selection`; returns where it raised, if it did."""
    counter = _Counted()
    model = shapes.cut(network, selection) if shapes.tell else cut(network, selection)
    try:
        with counter:
            if shapes.tell:
                shapes.run_cut(model)
            else:
                with evaluating(model), torch.no_grad():
                    model(*network.example_inputs)
    except Exception as error:  # whatever the model's own code raises on unexpected widths
        return _Failure(error, model, counter.calls)
    return None
