"""Inverted moments of the layers that consume channels, shared by all who ask for them.

Decides which ones are kept, within `KEPT_BYTES`: those asked for last. Greedy and one-shot optimal brain surgeon
read the same inverse, and the error tables of a layer that reads several groups (a concatenation) read another one for
each of them. Knows nothing of criteria or of tables.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.network.calibration.moments import Moments
from autoprune.network.graph.groups import Links
from autoprune.network.repair.compensation import layer_moments, raised_factor

KEPT_BYTES = 512 * 2**20
"""Bound on the inverses that are kept; the one asked for last is kept whatever its size."""


@dataclass(frozen=True, slots=True)
class Inverse:
    """The inverse of a consumer's regularised moments `C + λI`, `(G, d, d)` float64, and the power `tr(W C Wᵀ)` of its
    output, with λ in it (`regular_power`) and without it (`power`).
    """

    matrix: Tensor
    power: float
    regular_power: float


class Inverses:
    """Inverts each consumer's moments once for each strength of the ridge, as long as they are within the bound."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, float], Inverse] = OrderedDict()

    def of(self, links: Links, moments: Moments, weight: Tensor, *, ridge: float) -> Inverse:
        """Returns the inverse for a layer with the dense `weight` `(N, d)`. It must not be changed.

        Args:
            links: The layer.
            moments: Of its input.
            weight: The rows of its dense weight.
            ridge: λ relative to the mean of the diagonal; see `regular_factor`.
        """
        key = (links.site, ridge)
        if key not in self._kept:
            self._kept[key] = _inverted(links, moments, weight, ridge)
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and sum(kept.matrix.nbytes for kept in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return self._kept[key]


def _inverted(links: Links, moments: Moments, weight: Tensor, ridge: float) -> Inverse:
    matrix = layer_moments(moments, links)
    flat = grouped_rows(weight, matrix)
    factor, taken = raised_factor(lambda: matrix.to(torch.float64, copy=True), ridge)
    scale = matrix.diagonal(dim1=1, dim2=2).double().mean(1).clamp_min(1e-12)
    regular_power = float((flat @ factor).square().sum())
    power = regular_power - float((taken * scale * flat.square().sum((1, 2))).sum())
    return Inverse(torch.cholesky_inverse(factor), power, regular_power)


def grouped_rows(weight: Tensor, like: Tensor) -> Tensor:
    """Returns a consumer's weight `(N, d)` as `(G, N/G, d)` float64, beside its moments `like` `(G, d, d)`."""
    return weight.reshape(like.shape[0], -1, like.shape[1]).double().to(like.device)
