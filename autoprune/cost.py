"""The exact cost of a network as a function of the widths of its pruning groups.

Every cost is a sum of terms `factor * (c0 + c1*w1 + ...) * (...)`: a convolution multiplies its kept inputs by its kept
outputs, a flattened feature map repeats a channel, a concatenation adds groups up. Latency, which follows no such
formula, is a sum of measured surfaces over the same linear forms. Decides how such sums are held and evaluated; knows
nothing of how they were found.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TypeVar

MACS = "macs"
PARAMS = "params"
SIZE = "size_bytes"
MEMORY = "activation_bytes"
COSTS = (MACS, PARAMS, SIZE, MEMORY)
"""What every network's model prices, exactly."""
LATENCY = "latency_ns"
"""The predicted latency in nanoseconds, which only a model with a latency table prices."""

Number = TypeVar("Number")


@dataclass(frozen=True, slots=True)
class Form:
    """A linear form `const + Σ coefficient * width[group]`; `terms` holds (group index, coefficient)."""

    const: int = 0
    terms: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Term:
    """The product of `factor` and of all `forms`, divided by `divisor`.

    What is computed once for a whole batch costs a sample a fraction, which need not be whole.
    """

    factor: int
    forms: tuple[Form, ...] = ()
    divisor: int = 1


@dataclass(frozen=True, slots=True)
class Surface:
    """A time in nanoseconds over a grid of sizes, multilinear between the knots and constant beyond them.

    Axis k is the size `forms[k]` at the ascending `knots[k]`. `values` are in row-major order. Where they rise along
    every axis, a wider network never costs less.
    """

    forms: tuple[Form, ...]
    knots: tuple[tuple[int, ...], ...]
    values: tuple[int, ...]

    def __post_init__(self) -> None:
        cells = 1
        for knots in self.knots:
            cells *= len(knots)
            if not knots or any(a >= b for a, b in pairwise(knots)):
                raise ValueError(f"knots must rise, got {knots}")
        if len(self.forms) != len(self.knots) or len(self.values) != cells:
            raise ValueError(
                f"{len(self.forms)} forms, {len(self.knots)} axes and {len(self.values)} values for {cells} cells"
            )

    def at(self, widths: Sequence[int]) -> int:
        """Returns the time at the widths of the groups, in whole nanoseconds."""
        values, total = self.values, 0.0
        if len(self.forms) == 1:
            i, part = _place(self.forms[0], self.knots[0], widths)
            total = values[i] + part * (values[i + 1] - values[i]) if part else values[i]
        elif len(self.forms) == 2:
            i, part = _place(self.forms[0], self.knots[0], widths)
            j, other = _place(self.forms[1], self.knots[1], widths)
            i = i * len(self.knots[1]) + j
            total = values[i] + other * (values[i + 1] - values[i]) if other else values[i]
            if part:
                i += len(self.knots[1])
                above = values[i] + other * (values[i + 1] - values[i]) if other else values[i]
                total += part * (above - total)
        else:
            total = self._corners(widths)
        # Rounded down but for the noise of the sum, so that equal times stay equal.
        return int(total + 1e-6)

    def _corners(self, widths: Sequence[int]) -> float:
        corners = [(0, 1.0)]
        for form, knots in zip(self.forms, self.knots, strict=True):
            i, part = _place(form, knots, widths)
            corners = [
                (index * len(knots) + i + step, weight * share)
                for index, weight in corners
                for step, share in ((0, 1.0 - part), (1, part))
                if share
            ]
        return sum(self.values[index] * weight for index, weight in corners)


def _place(form: Form, knots: Sequence[int], widths: Sequence[int]) -> tuple[int, float]:
    """Returns the knot at or below a form's size, and how far it is to the next one; beyond the ends, the end."""
    size = form.const
    for group, coefficient in form.terms:
        size += coefficient * widths[group]
    if size <= knots[0]:
        return 0, 0.0
    i = bisect_right(knots, size) - 1
    if i == len(knots) - 1:
        return i, 0.0
    return i, (size - knots[i]) / (knots[i + 1] - knots[i])


def _value(terms: Sequence[Term], widths: Sequence[int]) -> int:
    total = 0
    shared: Fraction | None = None
    for term in terms:
        product = term.factor
        for form in term.forms:
            size = form.const
            for group, coefficient in form.terms:
                size += coefficient * widths[group]
            product *= size
        if term.divisor == 1:
            total += product
        else:
            shared = (shared or Fraction(0)) + Fraction(product, term.divisor)
    return total if shared is None else int(total + shared)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Prices any policy from its widths alone.

    `macs` counts multiply-accumulates of convolutions, linear layers and matrix products for one sample. `params`
    counts trainable elements and `size_bytes` the bytes of the state dict (buffers included). `activation_bytes` is the
    largest sum of tensors that are alive together in one forward pass of one sample, the input included: `live` holds a
    sum for each point of the graph. `latency` holds the surfaces of a latency table; their sum is the predicted
    latency, a cost of its own where there are any.
    """

    groups: tuple[str, ...]
    sizes: tuple[int, ...]
    macs: tuple[Term, ...]
    params: tuple[Term, ...]
    size_bytes: tuple[Term, ...]
    live: tuple[tuple[Term, ...], ...] = ()
    latency: tuple[Surface, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The costs that this model prices: `COSTS`, and `LATENCY` where there is a latency table."""
        return (*COSTS, LATENCY) if self.latency else COSTS

    def cost(self, name: str, widths: Mapping[str, int]) -> int:
        """Returns one cost; groups that `widths` leaves out keep all their channels.

        Raises:
            KeyError: `name` is neither in `COSTS` nor `LATENCY`.
        """
        values = [widths.get(group, size) for group, size in zip(self.groups, self.sizes, strict=True)]
        return self.at(name, values)

    def costs(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Returns every cost by name; groups that `widths` leaves out keep all their channels."""
        values = [widths.get(group, size) for group, size in zip(self.groups, self.sizes, strict=True)]
        return {name: self.at(name, values) for name in self.names}

    def dense(self) -> dict[str, int]:
        """Returns every cost of the unpruned network."""
        return self.costs({})

    def at(self, name: str, values: Sequence[int]) -> int:
        """Returns one cost at the widths of all groups, in their order: `cost` for who asks often.

        Raises:
            KeyError: `name` is neither in `COSTS` nor `LATENCY`.
        """
        if name == MEMORY:
            return max((_value(terms, values) for terms in self.live), default=0)
        if name == LATENCY:
            return sum(surface.at(values) for surface in self.latency)
        return _value({MACS: self.macs, PARAMS: self.params, SIZE: self.size_bytes}[name], values)

    def used(self, name: str) -> set[int]:
        """Returns the places of the groups that take part in one cost (not `activation_bytes`).

        Raises:
            KeyError: `name` is no such cost.
        """
        if name == LATENCY:
            forms = [form for surface in self.latency for form in surface.forms]
        else:
            terms = {MACS: self.macs, PARAMS: self.params, SIZE: self.size_bytes}[name]
            forms = [form for term in terms for form in term.forms]
        return {place for form in forms for place, _ in form.terms}

    def share(self, name: str, group: str) -> CostModel:
        """Returns a model of the terms of one cost (not `activation_bytes`) in which `group` takes part.

        What changes with one group's width is exactly what its share changes, at a fraction of the price.

        Raises:
            KeyError: `name` has no shares.
        """
        place = self.groups.index(group)
        if name == LATENCY:
            surfaces = tuple(s for s in self.latency if any(g == place for form in s.forms for g, _ in form.terms))
            return CostModel(self.groups, self.sizes, (), (), (), latency=surfaces)
        attribute = {MACS: "macs", PARAMS: "params", SIZE: "size_bytes"}[name]
        own = tuple(t for t in getattr(self, attribute) if any(g == place for form in t.forms for g, _ in form.terms))
        empty: dict[str, tuple[Term, ...]] = {"macs": (), "params": (), "size_bytes": (), attribute: own}
        return CostModel(self.groups, self.sizes, empty["macs"], empty["params"], empty["size_bytes"])
