"""The exact cost of a network as a function of the widths of its pruning groups.

Every cost is a sum of terms `factor * (c0 + c1*w1 + ...) * (...)`: a convolution multiplies its kept inputs by its kept
outputs, a flattened feature map repeats a channel, a concatenation adds groups up. Decides how such sums are held and
evaluated; knows nothing of how they were found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

MACS = "macs"
PARAMS = "params"
SIZE = "size_bytes"
MEMORY = "activation_bytes"
COSTS = (MACS, PARAMS, SIZE, MEMORY)

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


def _value(terms: Sequence[Term], widths: Sequence[int]) -> int:
    total, shared = 0, Fraction(0)
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
            shared += Fraction(product, term.divisor)
    return int(total + shared)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Prices any policy from its widths alone.

    `macs` counts multiply-accumulates of convolutions, linear layers and matrix products for one sample. `params`
    counts trainable elements and `size_bytes` the bytes of the state dict (buffers included). `activation_bytes` is the
    largest sum of tensors that are alive together in one forward pass of one sample, the input included: `live` holds a
    sum for each point of the graph.
    """

    groups: tuple[str, ...]
    sizes: tuple[int, ...]
    macs: tuple[Term, ...]
    params: tuple[Term, ...]
    size_bytes: tuple[Term, ...]
    live: tuple[tuple[Term, ...], ...] = ()

    def cost(self, name: str, widths: Mapping[str, int]) -> int:
        """Returns one cost; groups that `widths` leaves out keep all their channels.

        Raises:
            KeyError: `name` is not in `COSTS`.
        """
        values = [widths.get(group, size) for group, size in zip(self.groups, self.sizes, strict=True)]
        return self._cost(name, values)

    def costs(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Returns every cost by name; groups that `widths` leaves out keep all their channels."""
        values = [widths.get(group, size) for group, size in zip(self.groups, self.sizes, strict=True)]
        return {name: self._cost(name, values) for name in COSTS}

    def dense(self) -> dict[str, int]:
        """Returns every cost of the unpruned network."""
        return self.costs({})

    def _cost(self, name: str, values: Sequence[int]) -> int:
        if name == MEMORY:
            return max((_value(terms, values) for terms in self.live), default=0)
        return _value({MACS: self.macs, PARAMS: self.params, SIZE: self.size_bytes}[name], values)

    def share(self, name: str, group: str) -> CostModel:
        """Returns a model of the terms of one cost (not `activation_bytes`) in which `group` takes part.

        What changes with one group's width is exactly what its share changes, at a fraction of the price.

        Raises:
            KeyError: `name` has no shares.
        """
        attribute = {MACS: "macs", PARAMS: "params", SIZE: "size_bytes"}[name]
        place = self.groups.index(group)
        own = tuple(t for t in getattr(self, attribute) if any(g == place for form in t.forms for g, _ in form.terms))
        empty: dict[str, tuple[Term, ...]] = {"macs": (), "params": (), "size_bytes": (), attribute: own}
        return CostModel(self.groups, self.sizes, empty["macs"], empty["params"], empty["size_bytes"])
