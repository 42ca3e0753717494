"""Prices many policies at once: what `CostModel` says of one, as arithmetic on arrays.

Decides nothing but how the sums are carried out; the numbers are those of the cost model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from autoprune.cost import LATENCY, MACS, MEMORY, PARAMS, SIZE, CostModel, Form, Surface, Term

Numbers = npt.NDArray[np.int64]


def costs_many(model: CostModel, widths: Numbers, names: Sequence[str] | None = None) -> dict[str, Numbers]:
    """Returns costs of many policies, each `(N,)`.

    Args:
        model: The cost model.
        widths: `(N, groups)` kept channels, the groups in the order of `model.groups`.
        names: Which costs; all that the model prices by default.

    Raises:
        ValueError: `widths` has another number of columns than the model has groups.
        KeyError: A name is not a cost of the model.
    """
    widths = np.asarray(widths, dtype=np.int64)
    if widths.ndim != 2 or widths.shape[1] != len(model.groups):
        raise ValueError(f"widths must be (N, {len(model.groups)}), got {widths.shape}")
    sums = {MACS: model.macs, PARAMS: model.params, SIZE: model.size_bytes}
    columns = np.ascontiguousarray(widths.T)  # (groups, N)
    forms = _Forms(columns)
    priced: dict[str, Numbers] = {}
    for name in model.names if names is None else names:
        if name not in model.names:
            raise KeyError(name)
        if name == LATENCY:
            priced[name] = sum((_height(s, forms) for s in model.latency), np.zeros(len(widths), np.int64))
        elif name == MEMORY:
            largest = np.zeros(len(widths), np.int64)
            for terms in model.live:
                np.maximum(largest, _total(terms, forms), out=largest)
            priced[name] = largest
        else:
            priced[name] = _total(sums[name], forms)
    return priced


class _Forms:
    """The values of linear forms, each computed once."""

    def __init__(self, columns: Numbers) -> None:
        self.columns = columns
        self._known: dict[Form, Numbers] = {}
        self._products: dict[tuple[Form, ...], Numbers] = {}

    def of(self, form: Form) -> Numbers:
        if form not in self._known:
            value = np.full(self.columns.shape[1], form.const, np.int64)
            for group, coefficient in form.terms:
                value = value + coefficient * self.columns[group]
            self._known[form] = value
        return self._known[form]

    def product(self, forms: tuple[Form, ...]) -> Numbers:
        if forms not in self._products:
            value = np.ones(self.columns.shape[1], np.int64)
            for form in forms:
                value = value * self.of(form)
            self._products[forms] = value
        return self._products[forms]


def _total(terms: Sequence[Term], forms: _Forms) -> Numbers:
    common = math.lcm(*(term.divisor for term in terms)) if terms else 1
    total = np.zeros(forms.columns.shape[1], np.int64)
    for term in terms:
        total += common // term.divisor * term.factor * forms.product(term.forms)
    return total // common


def _height(surface: Surface, forms: _Forms) -> Numbers:
    """Returns `Surface.at` for every policy."""
    values = np.asarray(surface.values, dtype=float)
    count = forms.columns.shape[1]
    corners: list[tuple[Numbers, npt.NDArray[np.float64]]] = [(np.zeros(count, np.int64), np.ones(count))]
    for form, knots in zip(surface.forms, surface.knots, strict=True):
        edges = np.asarray(knots, dtype=np.int64)
        sizes = np.clip(forms.of(form), edges[0], edges[-1])
        below = np.clip(np.searchsorted(edges, sizes, side="right") - 1, 0, max(len(edges) - 2, 0))
        above = np.minimum(below + 1, len(edges) - 1)
        part = (sizes - edges[below]) / np.maximum(edges[above] - edges[below], 1)
        corners = [
            (index * len(edges) + place, weight * share)
            for index, weight in corners
            for place, share in ((below, 1.0 - part), (above, part))
        ]
    total = sum((values[index] * weight for index, weight in corners), np.zeros(count))
    return np.floor(total + 1e-6).astype(np.int64)
