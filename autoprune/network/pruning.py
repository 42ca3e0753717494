"""One pruned network without a search: `autoprune.prune`.

Decides how ratios and a criterion become a smaller module outside of a study.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import PolicyError, nearest
from autoprune.network.calibration.targets import gather_targets
from autoprune.network.criteria.channels import choose, score
from autoprune.network.criteria.gathering import Batches as Samples
from autoprune.network.criteria.gathering import criterion_named, gather_evidence
from autoprune.network.criteria.inputs import Evidence
from autoprune.network.criteria.weights import weight_scores
from autoprune.network.data.tasks import cross_entropy
from autoprune.network.graph.groups import PruningGroup
from autoprune.network.graph.modules import device_of
from autoprune.network.graph.network import Network
from autoprune.network.repair.masked import repair_masked
from autoprune.network.repair.sequential import refit_sequentially
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.masks import keep, mask_weights, masked
from autoprune.network.tracing.removable import with_removable
from autoprune.policy import SEMI_STRUCTURED, Choice, Group, feasible_widths

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
    """Returns a new, smaller module (with masks: one with zeros); the dense model is left as it is.

    Args:
        network: What `trace` returned; `trace(..., pruning="unstructured")` or `"2:4"` for masks.
        ratios: The fraction of channels (with masks: of weights; 2:4 takes 0.5 and 0) that every group loses, or a
            fraction for some groups by name (the others stay whole). A fraction of 1 removes a group of channels whole,
            where the network works without it.
        criterion: How channels are ranked, a name in `autoprune.network.criteria.channels.CRITERIA` or
            `package.module:function`, see `autoprune.network.criteria.own`; with masks a name in
            `autoprune.network.criteria.weights.WEIGHT_CRITERIA`.
        calibration: Batches of inputs `(B, ...)` or of `(inputs, targets)`. With them the consumers of what went are
            refitted and batch norm statistics are taken anew; without them the network is only cut. `activation`,
            `obs` and `hrank` need inputs, `taylor` and `hessian` targets.
            They are used where the network's parameters lie.
        round_to: Widths become multiples of this number.
        seed: For `random`, and for the patches that refits are solved on.

    Raises:
        PolicyError: A ratio is outside [0, 1], a group or the criterion is unknown, the network does not work without a
            group that is to be removed whole, or the criterion needs batches that it did not get.
    """
    names = [group.name for group in network.groups]
    wanted = dict(ratios) if isinstance(ratios, Mapping) else dict.fromkeys(names, ratios)
    for name in wanted:
        if name not in names:
            raise PolicyError(f"no pruning group {name!r}{nearest(name, names)}")
    needs = criterion_named(network, criterion)
    choices = {name: Choice(criterion, wanted.get(name, 0.0)) for name in names}
    network = _without(network, [name for name in names if choices[name].ratio == 1.0])
    widths = {group.name: _width(network, group, choices[group.name].ratio, round_to) for group in network.groups}
    narrowed = {group.name: widths[group.name] for group in network.groups if widths[group.name] < group.size}
    batches = [] if calibration is None else list(calibration)
    if needs.statistics and not batches:
        raise PolicyError(f"the criterion {criterion} needs calibration batches")
    device = str(device_of(network.model))
    if network.masked:
        return _masked(network, narrowed, criterion, batches=batches, seed=seed, device=device)
    inputs = [batch if isinstance(batch, Tensor) else batch[0] for batch in batches]
    pairs = _pairs(batches, criterion) if needs.labelled else []
    samples = Samples(inputs, lambda _: pairs)
    evidence = gather_evidence(network, samples, [criterion], loss=cross_entropy, seed=seed, device=device)
    scores = score(evidence, [criterion])[criterion]
    selection = {name: choose(scores[name], width) for name, width in narrowed.items()}
    model = cut(network, selection)
    if selection and inputs:
        targets = gather_targets(network, torch.cat(inputs), seed=seed)
        refit_sequentially(network, model, selection, replace(targets, statistics=evidence.statistics))
    return model


def _without(network: Network, names: list[str]) -> Network:
    """Returns the network with the named groups marked as removable.

    Raises:
        PolicyError: The network does not work without one of them.
    """
    if not names:
        return network
    if network.masked:
        raise PolicyError(f"masks keep at least one weight of {names[0]!r}: the ratio must be below 1, got 1")
    network, reasons = with_removable(network, names)
    if reasons:
        name, reason = next(iter(reasons.items()))
        raise PolicyError(f"group {name!r} cannot be removed whole: {reason}")
    return network


def _width(network: Network, group: PruningGroup, ratio: float, round_to: int) -> int:
    if ratio == 1.0:
        return 0
    if not network.masked:
        widths = feasible_widths(group.size, max_ratio=0.999999, round_to=round_to)
        return Group(group.name, group.size, widths).width(ratio)
    if round_to != 1:
        raise PolicyError(f"round_to counts channels; masks have none, got {round_to}")
    if network.pruning == SEMI_STRUCTURED and ratio not in (0.0, 0.5):
        raise PolicyError(f"2:4 removes half of a weight or nothing: the ratio is 0.5 or 0, got {ratio} ({group.name})")
    return max(1, round(group.size * (1.0 - ratio)))


def _masked(
    network: Network, widths: Mapping[str, int], criterion: str, *, batches: list[Any], seed: int, device: str
) -> nn.Module:
    """Returns the copy with zeros, refitted and recalibrated where there are batches."""
    pairs = [(batch, torch.empty(0)) if isinstance(batch, Tensor) else batch for batch in batches]
    if criterion_named(network, criterion).labelled:
        _pairs(batches, criterion)
    evidence = Evidence(network, seed=seed)
    if pairs:
        evidence = gather_evidence(
            network, Samples.of(pairs), [criterion], loss=cross_entropy, seed=seed, device=device
        )
    scores = weight_scores(evidence, [criterion])[criterion]
    weights = mask_weights(network)
    selection = {name: keep(weights[name], scores[name], width, network.pruning) for name, width in widths.items()}
    model = masked(network, selection)
    if selection and pairs:
        targets = gather_targets(network, torch.cat([x for x, _ in pairs]), seed=seed)
        repair_masked(network, model, selection, evidence.statistics, targets)
    return model


def _pairs(batches: list[Any], criterion: str) -> list[tuple[Tensor, Tensor]]:
    pairs = [batch for batch in batches if not isinstance(batch, Tensor)]
    if not pairs:
        raise PolicyError(f"the criterion {criterion} needs calibration batches of (inputs, targets)")
    return pairs
