"""What criteria may look at: the dense network, calibration statistics, gradients, ranks of feature maps.

Decides how an index of a weight becomes a channel of a group. Knows nothing of policies or of any criterion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from autoprune.network.calibration.layer_inputs import rows_of
from autoprune.network.calibration.moments import Statistics
from autoprune.network.criteria.inverses import Inverse, Inverses
from autoprune.network.graph.groups import Links, PruningGroup, positions_in
from autoprune.network.graph.network import Network

Scores = np.ndarray
"""`(n,)` float64: one score a channel of a group."""


@dataclass(frozen=True)
class Evidence:
    """What criteria may look at: the dense network, its calibration statistics and its gradients."""

    network: Network
    statistics: Statistics = field(default_factory=dict)
    gradients: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Parameter → `weight * gradient`, summed over everything but its output channels, one `(n,)` tensor a batch."""
    seed: int = 0
    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameter → `(weight * gradient)²`, each weight's by itself, summed like that and averaged over batches."""
    ranks: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Module path → mean rank of each input channel's feature map, for layers that read images."""
    inverses: Inverses = field(default_factory=Inverses, repr=False, compare=False)
    """Inverted moments that several criteria and tables share."""

    def uses(self, group: PruningGroup, kinds: Iterable[str]) -> list[Links]:
        """Returns the layers of the given kinds that produce (or normalise) the group's channels, each weight once."""
        found: dict[str, Links] = {}
        for links in self.network.links:
            if links.layer.kind in kinds and is_inside(links.outputs, group).any():
                found.setdefault(f"{links.layer.weight}:{links.layer.start}", links)
        return list(found.values())

    def consumers(self, group: PruningGroup) -> list[Links]:
        """Returns the refittable layers that read the group's channels and have statistics."""
        found: dict[str, Links] = {}
        for links in self.network.links:
            if links.inputs is not None and links.site in self.statistics and is_inside(links.inputs, group).any():
                found.setdefault(links.site, links)
        return list(found.values())

    def parameter(self, name: str) -> Tensor:
        """Returns a parameter of the dense model, detached."""
        return self.network.model.get_parameter(name).detach()

    def rows(self, links: Links) -> Tensor:
        """Returns the rows of a weight that a layer uses, detached, `(outputs, fan-in)` float64."""
        return rows_of(links, self.parameter(links.layer.weight))

    def inverse(self, links: Links, *, ridge: float) -> Inverse:
        """Returns the inverted moments of a consumer's input, which must not be changed. See `Inverses.of`."""
        return self.inverses.of(links, self.statistics[links.site], self.rows(links), ridge=ridge)


Criterion = Callable[[Evidence, PruningGroup], Scores]
PRODUCERS = ("conv", "transposed", "depthwise", "linear", "embedding", "recurrent", "computed", "product")


def is_inside(units: np.ndarray, group: PruningGroup) -> np.ndarray:
    """Returns which indices belong to a channel of the group: `units` `(n,)` or `(n, k)`, the result `(n,)`."""
    return positions_in(units, group) >= 0


def by_unit(values: Tensor, units: np.ndarray, group: PruningGroup) -> Scores:
    """Adds up `values` `(m,)` of indices that belong to the same channel: `(n,)`."""
    positions = positions_in(units, group)
    inside = positions >= 0
    result = np.zeros(group.size)
    np.add.at(result, positions[inside], values.cpu().numpy()[inside])
    return result


def relative(scores: Scores) -> Scores:
    mean = float(scores.mean())
    return scores / mean if mean != 0 else np.ones_like(scores)  # a NaN stays one, for `score` to refuse
