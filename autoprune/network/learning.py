"""What is learnt about a dense network on calibration images before its channels are removed.

Decides the order: moments and dense outputs, gradients, ranks, scores, error tables, what branches carry. Knows nothing
of settings or of caches. `mask_learning` does the same for single weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from autoprune.errors import DataError
from autoprune.network.criteria import (
    NEEDS_FISHER,
    NEEDS_GRADIENTS,
    NEEDS_RANKS,
    Evidence,
    gather_fisher,
    gather_gradients,
    gather_ranks,
    score,
)
from autoprune.network.depth import removal_errors, with_depth
from autoprune.network.evaluation import Loss, logits_of
from autoprune.network.knowledge import Knowledge
from autoprune.network.samples import Split
from autoprune.network.tables import error_tables
from autoprune.network.targets import gather_both
from autoprune.network.trace import Network

_BATCH = 64
_FISHER_BATCH = 8
"""Samples whose gradients are squared together: 512 calibration images take 64 passes."""


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
    gradients: dict[str, tuple[Tensor, ...]] = {}
    if NEEDS_GRADIENTS & set(criteria):
        gradients = gather_gradients(network, calibration.batches(_BATCH, device=device), mean, device=device)
    fisher: dict[str, Tensor] = {}
    if NEEDS_FISHER & set(criteria):
        fisher = gather_fisher(network, calibration.batches(_FISHER_BATCH, device=device), mean, device=device)
    ranks = gather_ranks(network, targets.images, device=device) if NEEDS_RANKS & set(criteria) else {}
    evidence = Evidence(network, statistics, gradients, seed, fisher, ranks)
    scores = score(evidence, criteria)
    tables = with_depth(error_tables(evidence, scores), removal_errors(network, targets.images, statistics))
    return Knowledge(statistics, targets, scores, tables)


def mean_loss(own: Loss | None) -> Callable[[Any, Tensor], Tensor]:
    """Returns the mean loss of a batch: the user's own, or cross-entropy in float32."""

    def cross_entropy(output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(output).float(), target)

    return cross_entropy if own is None else own
