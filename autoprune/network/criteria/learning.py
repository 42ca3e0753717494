"""What is learnt about a dense network on calibration images before anything of it is removed or masked.

Decides the order: moments and dense outputs, gradients, ranks, scores, error tables, what branches carry. Knows nothing
of settings or of caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from autoprune.errors import DataError
from autoprune.network.calibration.one_pass import gather_both
from autoprune.network.calibration.targets import gather_targets
from autoprune.network.criteria.branches import removal_errors, with_depth
from autoprune.network.criteria.channels import score
from autoprune.network.criteria.gathering import Batches, gather_evidence
from autoprune.network.criteria.knowledge import Knowledge
from autoprune.network.criteria.tables import error_tables
from autoprune.network.criteria.weights import weight_scores, weight_tables
from autoprune.network.data.samples import Split
from autoprune.network.data.tasks import Loss, cross_entropy
from autoprune.network.graph.network import Network
from autoprune.policy import Group

_BATCH = 64


def learn(
    network: Network,
    calibration: Split,
    *,
    criteria: Sequence[str],
    loss: Loss | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Knowledge:
    """Gathers moments, targets, gradients, scores and error tables on the calibration images.

    Args:
        network: The traced network, on `device`.
        calibration: Images, with targets where a criterion needs gradients.
        criteria: The criteria that score channels.
        loss: Own loss, the mean over a batch; None: cross-entropy.
        device: Where it runs.
        seed: Draws patches of inputs.

    Raises:
        DataError: There are no calibration images.
        PolicyError: A criterion gives scores that are not finite.
    """
    mean = mean_loss(loss)
    count = len(calibration)
    if not count:
        raise DataError("there are no calibration images")

    def batches(limit: int | None) -> Iterator[Tensor]:
        return (x for x, _ in calibration.batches(_BATCH, limit=limit, device=device))

    number = -(-count // _BATCH)
    statistics, targets = gather_both(network, batches, count, number=number, seed=seed, device=device)
    samples = Batches([targets.images], lambda size: calibration.batches(size or _BATCH, device=device))
    evidence = gather_evidence(network, samples, criteria, loss=mean, statistics=statistics, seed=seed, device=device)
    scores = score(evidence, criteria)
    tables = with_depth(error_tables(evidence, scores), removal_errors(network, targets.images, statistics))
    return Knowledge(statistics, targets, scores, tables)


def mean_loss(own: Loss | None) -> Callable[[Any, Tensor], Tensor]:
    """Returns the mean loss of a batch: the user's own, or cross-entropy in float32."""
    return cross_entropy if own is None else own


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
    device = str(inputs.device)
    evidence = gather_evidence(network, Batches.of(batches), criteria, loss=loss, seed=seed, device=device)
    scores = weight_scores(evidence, criteria)
    targets = gather_targets(network, inputs, seed=seed)
    tables = weight_tables(evidence, groups, scores, pattern=network.pruning)
    return Knowledge(evidence.statistics, targets, scores, tables)
