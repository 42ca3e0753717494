"""One pruned network without a search: `autoprune.prune`.

Decides how ratios and a criterion become a smaller module outside of a study.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.errors import PolicyError, nearest
from autoprune.network.calibration import gather
from autoprune.network.compensation import compensate
from autoprune.network.criteria import (
    CRITERIA,
    NEEDS_GRADIENTS,
    NEEDS_STATISTICS,
    Evidence,
    choose,
    gather_gradients,
    score,
)
from autoprune.network.evaluation import logits_of
from autoprune.network.sequential import gather_targets, refit_sequentially
from autoprune.network.surgery import cut
from autoprune.network.trace import Network
from autoprune.policy import Choice, Group, feasible_widths

Batches = Iterable[Tensor | tuple[Tensor, Tensor]]


def prune(
    network: Network,
    ratios: float | Mapping[str, float],
    *,
    criterion: str = "l2",
    calibration: Batches | None = None,
    round_to: int = 1,
    seed: int = 0,
) -> nn.Module:
    """Returns a new, smaller module; the dense model is left as it is.

    Args:
        network: What `trace` returned.
        ratios: The fraction of channels that every group loses, or a fraction for some groups by name (the others
            stay whole).
        criterion: How channels are ranked, a name in `autoprune.network.criteria.CRITERIA`.
        calibration: Batches of inputs `(B, ...)` or of `(inputs, targets)`. With them the consumers of what went are
            refitted and batch norm statistics are taken anew; without them the network is only cut. `activation` and
            `obs` need inputs, `taylor` targets.
        round_to: Widths become multiples of this number.
        seed: For `random`, and for the patches that refits are solved on.

    Raises:
        PolicyError: A ratio is outside [0, 1), a group or the criterion is unknown, or the criterion needs batches it
            did not get.
    """
    names = [group.name for group in network.groups]
    wanted = dict(ratios) if isinstance(ratios, Mapping) else dict.fromkeys(names, ratios)
    for name in wanted:
        if name not in names:
            raise PolicyError(f"no pruning group {name!r}{nearest(name, names)}")
    if criterion not in CRITERIA:
        raise PolicyError(f"unknown criterion {criterion!r}{nearest(criterion, CRITERIA)}")
    widths = {
        group.name: Group(
            group.name, group.size, feasible_widths(group.size, max_ratio=0.999999, round_to=round_to)
        ).width(Choice(criterion, wanted.get(group.name, 0.0)).ratio)
        for group in network.groups
    }
    batches = [] if calibration is None else list(calibration)
    inputs = [batch if isinstance(batch, Tensor) else batch[0] for batch in batches]
    if criterion in NEEDS_STATISTICS and not inputs:
        raise PolicyError(f"the criterion {criterion} needs calibration batches")
    statistics = gather(network, inputs, seed=seed) if inputs else {}
    gradients = _gradients(network, batches) if criterion in NEEDS_GRADIENTS else {}
    scores = score(Evidence(network, statistics, gradients, seed), [criterion])[criterion]
    selection = {
        group.name: choose(scores[group.name], widths[group.name])
        for group in network.groups
        if widths[group.name] < group.size
    }
    model = cut(network, selection)
    if selection and inputs:
        compensate(network, model, selection, statistics)
        targets = gather_targets(network, torch.cat(inputs), seed=seed)
        refit_sequentially(network, model, selection, targets)
    return model


def _gradients(network: Network, batches: list[Any]) -> dict[str, tuple[Tensor, ...]]:
    pairs = [batch for batch in batches if not isinstance(batch, Tensor)]
    if not pairs:
        raise PolicyError("the criterion taylor needs calibration batches of (inputs, targets)")

    def loss(output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(output).float(), target)

    return gather_gradients(network, pairs, loss)
