"""Error tables: how much each group's consumers lose at every width, by every criterion, without a forward pass.

Decides the additive model of a policy's error. For a ranking of the channels, a consumer with weight `W` and input
covariance `C = L Lᵀ` (entries in the order of the ranking) that keeps the first m entries and is refitted loses
`Σ_{j>m} ‖(W L)_j‖²`: one Cholesky factorisation gives the whole curve.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autoprune.network.compensation import entries_of, layer_moments, regular_factor
from autoprune.network.criteria import Evidence, Scores
from autoprune.network.evidence import rows_of
from autoprune.network.groups import Links, PruningGroup, positions_in

Tables = dict[str, dict[str, tuple[float, ...] | dict[int, float]]]
"""Group → criterion → relative error at each width from 0 to the group's size (of single weights: by width, at those
that the group may take); falls with width, 0 at full width."""


def error_tables(evidence: Evidence, scores: Mapping[str, Mapping[str, Scores]]) -> Tables:
    """Returns the error curve of every group for every criterion in `scores`.

    A consumer's error is relative to its output power; a group's error is the sum over its consumers. A group without
    refittable consumers uses the fraction of its squared scores that goes.
    """
    return {
        group.name: {name: _curve(evidence, group, by_group[group.name]) for name, by_group in scores.items()}
        for group in evidence.network.groups
    }


def _curve(evidence: Evidence, group: PruningGroup, scores: Scores) -> tuple[float, ...]:
    order = np.argsort(-scores, kind="stable")
    consumers = evidence.consumers(group)
    total = np.zeros(group.size + 1)
    for links in consumers:
        total += _consumer_curve(evidence, links, group, order)
    if not consumers:
        squared = scores[order] ** 2
        total[:-1] = np.cumsum((squared / squared.sum())[::-1])[::-1]
    return tuple(float(v) for v in np.minimum.accumulate(total))


def _consumer_curve(evidence: Evidence, links: Links, group: PruningGroup, order: np.ndarray) -> np.ndarray:
    """Returns the relative error of one consumer at widths 0 .. n."""
    assert links.inputs is not None
    moments = evidence.statistics[links.site]
    position = positions_in(links.inputs, group)
    inside = position >= 0
    rank = np.empty(group.size, dtype=np.int64)
    rank[order] = np.arange(group.size)
    own = np.flatnonzero(inside)
    own = own[np.argsort(rank[position[own]], kind="stable")]
    others = np.flatnonzero(~inside)
    k = moments.kernel
    permutation = entries_of(np.concatenate([others, own]), k)
    matrix = layer_moments(moments, links).double()[:, permutation][:, :, permutation]
    groups = matrix.shape[0]
    weight = rows_of(links, evidence.parameter(links.layer.weight))
    flat = weight.reshape(groups, weight.shape[0] // groups, -1).double().to(matrix.device)[:, :, permutation]
    columns = (flat @ regular_factor(matrix, 1e-4)).square().sum((0, 1)).cpu().numpy()  # (d,)
    power = max(float(columns.sum()), 1e-30)
    lost = columns[len(others) * k :].reshape(len(own), k).sum(1)
    # A channel may stand at several inputs (a flattened map): add up what its entries carry.
    by_rank = np.zeros(group.size)
    np.add.at(by_rank, rank[position[own]], lost)
    return np.concatenate([np.cumsum(by_rank[::-1])[::-1], [0.0]]) / power
