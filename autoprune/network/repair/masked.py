"""How a masked network is repaired.

Decides how weights are refitted: by what each layer really reads where dense outputs are at hand, by the cached moments
otherwise. Knows nothing of policies.
"""

from __future__ import annotations

from torch import nn

from autoprune.network.calibration.moments import Statistics
from autoprune.network.calibration.targets import Targets
from autoprune.network.graph.network import Network
from autoprune.network.repair.masked_compensation import compensate_masked
from autoprune.network.repair.sequential import refit_sequentially
from autoprune.network.surgery.masks import mask_tensors
from autoprune.network.surgery.selection import Selection


def repair_masked(
    network: Network,
    model: nn.Module,
    selection: Selection,
    statistics: Statistics,
    targets: Targets | None,
    *,
    ridge: float = 1e-3,
) -> None:
    """Refits the masked `model` in place; with `targets` its batch norms' statistics are taken too.

    Args:
        network: The traced dense network.
        model: Its masked copy.
        selection: The weights that stay.
        statistics: Moments of the dense layers' inputs.
        targets: What the dense layers give; None: the moments alone decide, and batch norms are left as they are.
        ridge: Relative to the mean of the diagonal of the moments.
    """
    if targets is None:
        compensate_masked(network, model, selection, statistics, ridge=ridge, recalibrated=False)
        return
    masks = mask_tensors(network, selection)
    refit_sequentially(network, model, {}, targets, ridge=ridge, masks=masks)
