"""What a criterion is and what it may look at: the dense network, statistics, gradients, ranks of feature maps.

Decides what a criterion says of itself, and how an index of a weight becomes a channel of a group. Knows nothing of
policies or of any one criterion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor

from autoprune.errors import PolicyError
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


Scored = TypeVar("Scored")
"""What a criterion scores: a `PruningGroup`, or a weight that is masked."""
Given = TypeVar("Given")
"""What it gives: `Scores`, or a tensor of the weight's shape."""


@dataclass(frozen=True, slots=True)
class Criterion(Generic[Scored, Given]):
    """One criterion: its function, and what must be gathered before it is called.

    `weights_alone`: it looks at weights and at nothing else, so that it can score anew at any time. `statistics`: it
    cannot do without calibration inputs. `gradients`, `fisher`, `ranks`: it reads this part of `Evidence`. `source`:
    the paper.

    Raises:
        ValueError: It looks at weights alone and yet needs something else.
    """

    name: str
    function: Callable[[Evidence, Scored], Given]
    weights_alone: bool = False
    statistics: bool = False
    gradients: bool = False
    fisher: bool = False
    ranks: bool = False
    source: str | None = None

    def __post_init__(self) -> None:
        needs = [need for need in ("statistics", "gradients", "fisher", "ranks") if getattr(self, need)]
        if self.weights_alone and needs:
            raise ValueError(f"the criterion {self.name!r} cannot look at weights alone and need {', '.join(needs)}")

    @property
    def labelled(self) -> bool:
        """Whether it needs calibration inputs with targets."""
        return self.gradients or self.fisher

    def __call__(self, evidence: Evidence, of: Scored) -> Given:
        """Returns the scores of a group's channels, or of the elements of a weight.

        Raises:
            PolicyError: It needs gradients, and `evidence` has none.
        """
        if (self.gradients and not evidence.gradients) or (self.fisher and not evidence.fisher):
            raise PolicyError(f"the criterion {self.name} needs gradients on labelled calibration images")
        return self.function(evidence, of)


ChannelCriterion = Criterion[PruningGroup, Scores]
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
