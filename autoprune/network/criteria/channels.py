"""Pruning criteria: functions that score the channels of a group; higher means keep.

One literal table, `CRITERIA`, says what each of them needs and where it is from. Scores are normalised to a mean of
one within a group, so that a ranking over all groups compares channels with their own layer (LAMP keeps its own
normalisation, which is made for that). Knows nothing of policies.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np
import torch

from autoprune.errors import PolicyError, nearest
from autoprune.network.calibration.layer_inputs import rows_of
from autoprune.network.criteria.inputs import PRODUCERS, ChannelCriterion, Criterion, by_unit, is_inside, relative
from autoprune.network.criteria.inputs import Evidence as Evidence
from autoprune.network.criteria.inputs import Scores as Scores
from autoprune.network.criteria.obs import block_errors, removal_costs
from autoprune.network.criteria.own import own_criterion
from autoprune.network.graph.groups import PruningGroup


def _norms(evidence: Evidence, group: PruningGroup, power: int) -> Scores:
    total = np.zeros(group.size)
    for links in evidence.uses(group, PRODUCERS):
        rows = rows_of(links, evidence.parameter(links.layer.weight))
        summed = by_unit(rows.abs().pow(power).sum(1), links.outputs, group)
        total += relative(summed ** (1.0 / power))
    return relative(total)


def l1(evidence: Evidence, group: PruningGroup) -> Scores:
    """Sum of absolute weights of the filters that make the channel."""
    return _norms(evidence, group, 1)


def l2(evidence: Evidence, group: PruningGroup) -> Scores:
    """Euclidean norm of the filters that make the channel."""
    return _norms(evidence, group, 2)


def bn_scale(evidence: Evidence, group: PruningGroup) -> Scores:
    """Absolute scale of the normalisation behind the channel; `l2` where no normalisation follows."""
    norms = evidence.uses(group, ("norm",))
    if not norms:
        return l2(evidence, group)
    total = np.zeros(group.size)
    for links in norms:
        total += relative(by_unit(evidence.parameter(links.layer.weight).double().abs(), links.outputs, group))
    return relative(total)


def fpgm(evidence: Evidence, group: PruningGroup) -> Scores:
    """Sum of distances to the other filters: a filter near the geometric median is replaceable."""
    total = np.zeros(group.size)
    for links in evidence.uses(group, PRODUCERS):
        rows = rows_of(links, evidence.parameter(links.layer.weight))
        inside = np.flatnonzero(is_inside(links.outputs, group))
        picked = rows[torch.from_numpy(inside).to(rows.device)]
        distances = torch.cdist(picked, picked).sum(1)
        values = torch.zeros(rows.shape[0], dtype=torch.float64)
        values[torch.from_numpy(inside)] = distances.cpu()
        total += relative(by_unit(values, links.outputs, group))
    return relative(total)


def lamp(evidence: Evidence, group: PruningGroup) -> Scores:
    """Squared norm relative to that of all channels that are at least as large: comparable over layers as it is."""
    squared = l2(evidence, group) ** 2
    order = np.argsort(squared, kind="stable")
    rest = np.cumsum(squared[order][::-1])[::-1]
    scores = np.empty_like(squared)
    scores[order] = squared[order] / np.maximum(rest, 1e-300)
    return scores


def taylor(evidence: Evidence, group: PruningGroup) -> Scores:
    """Squared first-order change of the loss when the channel goes, averaged over calibration batches."""
    total = np.zeros(group.size)
    for links in evidence.uses(group, (*PRODUCERS, "norm")):
        names = [links.layer.weight] + ([links.layer.bias] if links.layer.kind == "norm" and links.layer.bias else [])
        batches = [sum(parts) for parts in zip(*(evidence.gradients[name] for name in names), strict=True)]
        for products in batches:
            used = torch.as_tensor(products).double()[links.layer.start : links.layer.start + len(links.outputs)]
            total += by_unit(used, links.outputs, group) ** 2
    return relative(total)


def activation(evidence: Evidence, group: PruningGroup) -> Scores:
    """Root mean square of the channel where it is consumed; `l2` where no consumer has statistics."""
    consumers = evidence.consumers(group)
    if not consumers:
        return l2(evidence, group)
    total = np.zeros(group.size)
    for links in consumers:
        assert links.inputs is not None
        moments = evidence.statistics[links.site]
        power = moments.gram.diagonal(dim1=1, dim2=2).sum(0).reshape(-1, moments.kernel).mean(1)  # (C/G,)
        total += relative(np.sqrt(by_unit(power.double(), links.inputs, group)))
    return relative(total)


def obs(evidence: Evidence, group: PruningGroup) -> Scores:
    """Increase of the consumers' output error when the channel goes and all others are refitted; `l2` without
    consumers.

    For the block `c` of a channel's entries: `tr(W_c ([C⁻¹]_cc)⁻¹ W_cᵀ)`, relative to the consumer's output power.
    """
    consumers = evidence.consumers(group)
    if not consumers:
        return l2(evidence, group)
    total = np.zeros(group.size)
    for links in consumers:
        assert links.inputs is not None
        total += by_unit(block_errors(evidence, links, group), links.inputs, group)
    return relative(total)


def obs_greedy(evidence: Evidence, group: PruningGroup) -> Scores:
    """The same when channels go one after another, each the one that then costs least; `l2` without consumers.

    The score rises in the order of removal, so a channel that others could replace counts once they have gone. In
    groups of more than 128 channels several go a step (see `obs`).
    """
    return relative(removal_costs(evidence, group)) if evidence.consumers(group) else l2(evidence, group)


def hessian(evidence: Evidence, group: PruningGroup) -> Scores:
    """Optimal brain damage with Fisher's diagonal for the Hessian: Σ (g·w)² over the weights that make the channel."""
    total = np.zeros(group.size)
    for links in evidence.uses(group, (*PRODUCERS, "norm")):
        names = [links.layer.weight] + ([links.layer.bias] if links.layer.kind == "norm" and links.layer.bias else [])
        for name in names:
            start = links.layer.start if name == links.layer.weight else links.layer.bias_start
            used = evidence.fisher[name].double()[start : start + len(links.outputs)]
            total += by_unit(used, links.outputs, group)
    return relative(total)


def hrank(evidence: Evidence, group: PruningGroup) -> Scores:
    """Mean rank of the channel's feature map where it is consumed; `l2` where no consumer reads images."""
    total = np.zeros(group.size)
    read = False
    for links in evidence.network.links:
        ranks = evidence.ranks.get(links.module)
        if ranks is not None and links.inputs is not None and len(ranks) == len(links.inputs):
            inside = is_inside(links.inputs, group)
            read |= bool(inside.any())
            total += by_unit(torch.from_numpy(ranks), links.inputs, group)
    return relative(total) if read else l2(evidence, group)


def random(evidence: Evidence, group: PruningGroup) -> Scores:
    """Numbers drawn from the seed and the group's name: the control that every other criterion must beat."""
    rng = np.random.default_rng([evidence.seed, zlib.crc32(group.name.encode())])
    return rng.uniform(0.5, 1.5, group.size)


CRITERIA: dict[str, ChannelCriterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("l1", l1, weights_alone=True, source="Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017."),
        Criterion("l2", l2, weights_alone=True),
        Criterion(
            "bn_scale",
            bn_scale,
            weights_alone=True,
            source="Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017.",
        ),
        Criterion(
            "fpgm", fpgm, weights_alone=True, source="He et al., Filter Pruning via Geometric Median, CVPR 2019."
        ),
        Criterion(
            "lamp",
            lamp,
            weights_alone=True,
            source="Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021.",
        ),
        Criterion(
            "taylor",
            taylor,
            gradients=True,
            source="Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019.",
        ),
        Criterion("activation", activation, statistics=True),
        Criterion(
            "obs",
            obs,
            statistics=True,
            source="Hassibi & Stork, Optimal Brain Surgeon, NIPS 1992; in blocks as in Frantar & Alistarh, NeurIPS "
            "2022.",
        ),
        Criterion(
            "obs_greedy",
            obs_greedy,
            statistics=True,
            source="Frantar & Alistarh, Optimal Brain Compression, NeurIPS 2022.",
        ),
        Criterion(
            "hessian",
            hessian,
            fisher=True,
            source="LeCun et al., Optimal Brain Damage, NIPS 1989; Theis et al., Faster Gaze Prediction with Dense "
            "Networks and Fisher Pruning, 2018.",
        ),
        Criterion(
            "hrank",
            hrank,
            statistics=True,
            ranks=True,
            source="Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020.",
        ),
        Criterion("random", random),
    )
}


def criterion_of(name: str) -> ChannelCriterion:
    """Returns the criterion of that name in `CRITERIA`, or the one behind `package.module:function`.

    Raises:
        PolicyError: There is no such criterion.
        InputError: A function of the user's own cannot be imported.
    """
    if ":" in name:
        return own_criterion(name)
    if name not in CRITERIA:
        raise PolicyError(f"unknown criterion {name!r}{nearest(name, CRITERIA)}")
    return CRITERIA[name]


def score(evidence: Evidence, criteria: Iterable[str]) -> dict[str, dict[str, Scores]]:
    """Returns criterion → group → scores.

    Raises:
        PolicyError: A criterion is unknown, needs what `evidence` lacks, or gives scores that are not finite or not one
            a channel.
        InputError: A criterion of the user's own cannot be imported.
    """
    chosen = {name: criterion_of(name) for name in criteria}
    result: dict[str, dict[str, Scores]] = {name: {} for name in chosen}
    for group in evidence.network.groups:  # one group after the other: its criteria share what they invert
        for name, criterion in chosen.items():
            result[name][group.name] = scores = criterion(evidence, group)
            if not np.isfinite(scores).all():
                raise PolicyError(f"criterion {name!r} gives scores that are not finite for group {group.name!r}")
    return result


def choose(scores: Scores, width: int) -> np.ndarray:
    """Returns the ascending positions of the `width` highest scores; of equal scores the first ones."""
    return np.sort(np.argsort(-scores, kind="stable")[:width])
