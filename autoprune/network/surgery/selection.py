"""Selections: which channels of each group stay, and which indices of a dimension follow from that.

Decides what a valid selection is. Knows nothing of how it was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from autoprune.errors import PolicyError, nearest
from autoprune.network.graph.groups import stays
from autoprune.network.graph.labels import Labels
from autoprune.network.graph.network import Network
from autoprune.policy import Policy

Selection = Mapping[str, Labels]
"""Group → ascending positions (0 .. size-1) of the channels that stay, none of them only in a group that is removable.
Groups that are left out stay whole.
"""
_MOST_KEPT = 1 << 22
"""Positions that are kept between calls, 32 MiB: thousands of policies over channels, or the latest of large masks."""


class KeptSelections:
    """The selections of the latest policies, so that none is computed again for the next step of the same trial.

    The latest one is kept whatever its size. Copied to another process it is empty there.
    """

    def __init__(self) -> None:
        self._kept: dict[Policy, tuple[tuple[object, ...], Selection, int]] = {}

    def __reduce__(self) -> tuple[type[KeptSelections], tuple[()]]:
        return KeptSelections, ()

    def of(self, policy: Policy, made_from: tuple[object, ...], compute: Callable[[Policy], Selection]) -> Selection:
        """Returns the selection under `policy`, by `compute` where none is kept that was made from the same objects."""
        found = self._kept.pop(policy, None)
        if found is None or any(a is not b for a, b in zip(found[0], made_from, strict=True)):
            selection = compute(policy)
            found = (made_from, selection, sum(map(len, selection.values())))
        self._kept[policy] = found
        while len(self._kept) > 1 and sum(size for *_, size in self._kept.values()) > _MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        return found[1]


def unit_mask(network: Network, selection: Selection) -> np.ndarray:
    """Returns a `(units,)` boolean array: which channels of the whole network stay.

    Raises:
        PolicyError: There is no such group, or it keeps no channel and is not removable, or one that it does not have.
    """
    names = [group.name for group in network.groups]
    for name in selection:
        if name not in names:
            raise PolicyError(f"no pruning group {name!r}{nearest(name, names)}")
    kept = np.ones(sum(group.size for group in network.groups), dtype=bool)
    for group in network.groups:
        chosen = selection.get(group.name)
        if chosen is None:
            continue
        if len(chosen) == 0 and group.name not in network.removable:
            raise PolicyError(f"group {group.name!r} would keep no channel")
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= group.size):
            raise PolicyError(f"group {group.name!r} has channels 0 to {group.size - 1}")
        kept[group.offset : group.offset + group.size] = False
        kept[group.offset + np.asarray(chosen, dtype=np.int64)] = True
    return kept


def kept_indices(units: Labels, kept: np.ndarray) -> Labels:
    """Returns the indices of one parameter dimension that stay; `units` is its row of the index map."""
    if len(kept) == 0:
        return np.arange(len(units))  # every group went whole in an earlier cut
    return np.flatnonzero(stays(units, kept))
