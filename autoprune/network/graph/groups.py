"""Pruning groups: which channels must be removed together, and where they lie in each parameter.

Decides how indices, units and groups are numbered. Knows nothing of how groups are found or of what they cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoprune.cost import CostModel
from autoprune.network.graph.labels import Labels, Solution
from autoprune.network.graph.record import Layer


@dataclass(frozen=True, slots=True)
class PruningGroup:
    """Channels of one kind that are removed one by one, each from all of its places at once.

    `producers` and `consumers` are module paths. `units` are the group's channels in the numbering of `IndexMap`.
    `stage` counts changes of spatial resolution from the input on. `approximate` says why removal also changes the
    channels that stay (a LayerNorm over them), or is None where a pruned network equals its masked twin.
    """

    name: str
    size: int
    offset: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    stage: str
    approximate: str | None = None

    @property
    def units(self) -> range:
        """The group's channels, in the numbering of the index map."""
        return range(self.offset, self.offset + self.size)


@dataclass(frozen=True, slots=True)
class Frozen:
    """A layer whose output channels all stay, and why."""

    name: str
    size: int
    reason: str


IndexMap = dict[str, dict[int, Labels]]
"""Parameter or buffer → dimension → units of each index.

Units are `(n,)`, one an index, where -1 stays; or `(n, k)` where an index belongs to several channels (a head, and a
dimension of every head) and stays while all of them do.
"""


GONE = -2
"""Stands for the unit of what an earlier cut has removed: no index has it any more."""


@dataclass(frozen=True, slots=True)
class Links:
    """One use of a weight in units instead of labels: `inputs[i]` are the units of input channel i (see `IndexMap`)."""

    layer: Layer
    module: str
    inputs: Labels | None
    outputs: Labels

    @property
    def called(self) -> bool:
        """Whether the module that owns the weight is called; else another one reads its parameter."""
        return self.layer.where == self.module and self.layer.weight == f"{self.module}.weight"

    @property
    def site(self) -> str:
        """How statistics name this use: the module that is called, or the parameter and the first row that is used."""
        return self.module if self.called else f"{self.layer.weight}:{self.layer.start}"


@dataclass(frozen=True, slots=True)
class Assembly:
    """What `assemble` finds."""

    groups: tuple[PruningGroup, ...]
    frozen: tuple[Frozen, ...]
    index_map: IndexMap
    links: tuple[Links, ...]
    cost_model: CostModel
    unit: Labels
    """The unit of every component that is its own factor; -1 stays, and `GONE` went in an earlier cut."""


def module_named(name: str) -> str:
    """Returns the module part of a name of a group or of a frozen layer: without `:heads` and the like."""
    return name.partition(":")[0]


def units_of(solution: Solution, unit: Labels, labels: Labels) -> Labels:
    """Returns the units of labels, `(n,)` or `(n, k)` as in `IndexMap`; what is gone is left out."""
    factors = solution.factors_of(labels)  # (n, k), -1 fills up
    units: Labels = np.where(factors < 0, -1, unit[factors])  # (n, k)
    units = units[(units != GONE).all(axis=1)]  # (n - gone, k)
    if units.shape[1] == 1:
        return units[:, 0]
    units = -np.sort(-units, axis=1)  # what stays goes last: a row [-1, 7, 3] becomes [7, 3, -1]
    # Columns that are -1 throughout say nothing.
    used = max(1, int((units >= 0).sum(1).max(initial=0)))
    return units[:, 0] if used == 1 else units[:, :used]


def positions_in(units: Labels, group: PruningGroup) -> Labels:
    """Returns the position in `group` of every index, -1 where it does not belong to it; `units` as in `IndexMap`."""
    inside = (units >= group.offset) & (units < group.offset + group.size)  # (n,) or (n, k)
    positions: Labels = np.where(inside, units - group.offset, -1)
    # (n, k) → (n,): the factors that belong to other groups are -1.
    return positions if positions.ndim == 1 else positions.max(axis=1)


def stays(units: Labels, kept: np.ndarray) -> np.ndarray:
    """Returns which indices stay, `(n,)`; `units` as in `IndexMap`, `kept` a boolean for each unit."""
    if not len(kept):
        return np.ones(len(units), dtype=bool)
    found: np.ndarray = (units < 0) | kept[np.maximum(units, 0)]  # (n,) or (n, k); what has no unit (-1) stays
    return found if found.ndim == 1 else np.all(found, axis=1)


def is_whole(units: Labels, kept: np.ndarray) -> bool:
    """Whether none of the indices stays."""
    return not stays(units, kept).any()


def module_of(parameter: str) -> str:
    """Returns the path of the module that owns a parameter, or whose weight is computed from it."""
    owner, _, computed = parameter.partition(".parametrizations.")
    return owner if computed else parameter.rpartition(".")[0] or parameter
