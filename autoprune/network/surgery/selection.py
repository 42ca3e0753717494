"""Selections: which channels of each group stay, and which indices of a dimension follow from that.

Decides what a valid selection is. Knows nothing of how it was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autoprune.errors import PolicyError, nearest
from autoprune.network.graph.groups import stays
from autoprune.network.graph.labels import Labels
from autoprune.network.graph.network import Network

Selection = Mapping[str, Labels]
"""Group → ascending positions (0 .. size-1) of the channels that stay, none of them only in a group that is removable.
Groups that are left out stay whole.
"""


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
