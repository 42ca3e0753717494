"""What is learnt about a dense network before its weights are masked.

Decides the order: moments, gradients, scores, dense outputs, error tables. Knows nothing of settings or of caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autoprune.errors import DataError
from autoprune.network.knowledge import Knowledge
from autoprune.network.mask_repair import gather_evidence
from autoprune.network.mask_scores import weight_scores, weight_tables
from autoprune.network.sequential import gather_targets
from autoprune.network.trace import Network
from autoprune.policy import Group


def learn_weights(
    network: Network,
    batches: Sequence[tuple[Tensor, Tensor]],
    groups: Sequence[Group],
    *,
    criteria: Sequence[str],
    loss: Callable[[Tensor, Tensor], Tensor],
    seed: int,
) -> Knowledge:
    """Gathers moments, targets, scores and error tables of a network whose weights are masked.

    Args:
        network: The traced network, on the device that `batches` are on.
        batches: Calibration inputs and targets.
        groups: The groups that may be masked; their widths are those of the error tables.
        criteria: The criteria that score weights.
        loss: The mean loss of a batch, for criteria that need gradients.
        seed: Draws patches of inputs.

    Raises:
        DataError: There are no calibration images.
        PolicyError: A criterion gives scores that are not finite.
    """
    if not batches:
        raise DataError("there are no calibration images")
    inputs = torch.cat([x for x, _ in batches])
    evidence = gather_evidence(network, batches, criteria, loss=loss, seed=seed, device=str(inputs.device))
    scores = weight_scores(evidence, criteria)
    targets = gather_targets(network, inputs, seed=seed)
    tables = weight_tables(evidence, groups, scores, pattern=network.pruning)
    return Knowledge(evidence.statistics, targets, scores, tables)
