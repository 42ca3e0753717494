"""The one place where evidence is gathered: what the chosen criteria need on calibration samples, and no more.

Decides what is run for which need. Knows nothing of any one criterion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoprune.network.calibration.moments import Statistics, gather
from autoprune.network.calibration.targets import refittable_layers
from autoprune.network.criteria.channels import criterion_of
from autoprune.network.criteria.gradients import gather_fisher, gather_gradients, gather_weight_gradients
from autoprune.network.criteria.inputs import Criterion, Evidence
from autoprune.network.criteria.ranks import gather_ranks
from autoprune.network.criteria.weights import weight_criterion_of
from autoprune.network.graph.network import Network

FISHER_BATCH = 8
"""Samples whose gradients are squared together: 512 calibration images take 64 passes."""

Labelled = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Batches:
    """Calibration samples as evidence reads them.

    `inputs` are batches `(B, ...)`, of which statistics and ranks are taken. `labelled` returns the batches of inputs
    and targets that gradients are taken of; where it can, of the size that it is given (None: any).
    """

    inputs: Sequence[Tensor]
    labelled: Callable[[int | None], Labelled]

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor]]) -> Batches:
        """Returns batches of inputs and targets as they are, whatever size is asked for."""
        return cls([x for x, _ in pairs], lambda _: pairs)


def criterion_named(network: Network, name: str) -> Criterion[Any, Any]:
    """Returns the criterion of that name for what is pruned of the network: its channels or its single weights.

    Raises:
        PolicyError: There is none.
        InputError: A function of the user's own cannot be imported.
    """
    return weight_criterion_of(name) if network.masked else criterion_of(name)


def gather_evidence(
    network: Network,
    batches: Batches,
    criteria: Sequence[str],
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    statistics: Statistics | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Evidence:
    """Returns what the named criteria may look at: statistics always, the rest where one of them needs it.

    Where single weights are masked, `gradients` holds each weight's by itself, as `gather_weight_gradients` says.

    Args:
        network: The traced network.
        batches: Calibration samples; targets are read where a criterion needs gradients.
        criteria: The criteria that will be asked.
        loss: The mean loss of a batch.
        statistics: Those that are known; None: they are gathered, none where there are no inputs.
        seed: Draws patches of inputs.
        device: Where it runs.

    Raises:
        DataError: There is no labelled batch where one is needed, or an activation is not finite.
        PolicyError: A criterion is unknown.
        InputError: A criterion of the user's own cannot be imported.
    """
    chosen = [criterion_named(network, name) for name in criteria]
    if statistics is None:
        layers = refittable_layers(network) if network.masked else None
        inputs = batches.inputs
        statistics = gather(network, inputs, seed=seed, device=device, layers=layers) if inputs else {}
    gradients: dict[str, tuple[Tensor, ...]] = {}
    if any(criterion.gradients for criterion in chosen):
        of = gather_weight_gradients if network.masked else gather_gradients
        gradients = of(network, batches.labelled(None), loss, device=device)
    fisher: dict[str, Tensor] = {}
    if any(criterion.fisher for criterion in chosen):
        fisher = gather_fisher(network, batches.labelled(FISHER_BATCH), loss, device=device)
    ranked = any(criterion.ranks for criterion in chosen)
    ranks = gather_ranks(network, torch.cat(list(batches.inputs)), device=device) if ranked else {}
    return Evidence(network, statistics, gradients, seed, fisher, ranks)
