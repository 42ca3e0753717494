"""What criteria of single weights look at, and how a masked network is repaired.

Decides which layers have moments, and how weights are refitted: by what each layer really reads where dense outputs are
at hand, by the cached moments otherwise. Knows nothing of policies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from autoprune.network.calibration import Statistics, gather
from autoprune.network.criteria import NEEDS_GRADIENTS, Evidence
from autoprune.network.mask_compensation import compensate_masked
from autoprune.network.mask_scores import gather_weight_gradients
from autoprune.network.masks import mask_tensors
from autoprune.network.sequential import Targets, refit_sequentially, refittable_layers
from autoprune.network.surgery import Selection
from autoprune.network.trace import Network


def gather_evidence(
    network: Network,
    batches: Sequence[tuple[Tensor, Tensor]],
    criteria: Sequence[str],
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    seed: int = 0,
    device: str = "cpu",
) -> Evidence:
    """Returns what criteria may look at, for a network whose weights are masked.

    Args:
        network: The traced network.
        batches: Calibration inputs and targets; targets are read for `taylor` alone.
        criteria: The criteria that will be asked.
        loss: The mean loss of a batch.
        seed: Draws patches of inputs.
        device: Where it runs.

    Raises:
        DataError: There is no batch, or an activation is not finite.
    """
    layers = refittable_layers(network)
    statistics = gather(network, [x for x, _ in batches], seed=seed, device=device, layers=layers)
    needed = bool(NEEDS_GRADIENTS & set(criteria))
    gradients = gather_weight_gradients(network, batches, loss, device=device) if needed else {}
    return Evidence(network, statistics, gradients, seed)


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
