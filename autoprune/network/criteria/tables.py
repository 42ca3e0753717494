"""Error tables: how much each group's consumers lose at every width, by every criterion, without a forward pass.

Decides the additive model of a policy's error. For a ranking of the channels, a consumer with weight `W` and input
covariance `C = L Lᵀ` (entries in the order of the ranking) that keeps the first m entries and is refitted loses
`Σ_{j>m} ‖(W L)_j‖²`: one Cholesky factorisation gives the whole curve.

That is `d³/3 + N d²` operations for `d` entries and `N` outputs, and no less is possible for a ranking: the errors at
the nested widths are the pivots of one elimination. What does not depend on the ranking is done once for all of them:
equal rankings share a curve, and the inputs of a concatenation that are none of the group's are eliminated beforehand,
through the one inverse that all groups share: what is left of `C` is `([C⁻¹]_own,own)⁻¹`.

Memory: the moments of one consumer in float64 (8·G·d² bytes) twice while they are factorised, once in float32, and
strips of 1/8 of that, whatever the number of criteria; beside them the inverses that are kept (see `inverses`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from autoprune.network.criteria.inputs import Evidence, Scores
from autoprune.network.criteria.inverses import grouped_rows
from autoprune.network.graph.groups import Links, PruningGroup, positions_in
from autoprune.network.repair.compensation import entries_of, layer_moments, raised_factor

Tables = dict[str, dict[str, tuple[float, ...] | dict[int, float]]]
"""Group → criterion → relative error at each width from 0 to the group's size (of single weights: by width, at those
that the group may take); falls with width, 0 at full width."""

RIDGE = 1e-4
"""Added to the diagonal of `C`, relative to its mean."""
_ROUNDING = 1e-12
"""The same for what is left of a matrix that has had its ridge."""
_STRIPS = 8


def error_tables(evidence: Evidence, scores: Mapping[str, Mapping[str, Scores]]) -> Tables:
    """Returns the error curve of every group for every criterion in `scores`.

    A consumer's error is relative to its output power; a group's error is the sum over its consumers. A group without
    refittable consumers uses the fraction of its squared scores that goes.
    """
    return {
        group.name: {
            name: tuple(float(error) for error in np.minimum.accumulate(curve))
            for name, curve in _curves(evidence, group, {n: found[group.name] for n, found in scores.items()}).items()
        }
        for group in evidence.network.groups
    }


def _curves(evidence: Evidence, group: PruningGroup, scores: Mapping[str, Scores]) -> dict[str, np.ndarray]:
    """Returns the error of the group at widths 0 .. n, for each criterion."""
    orders = {name: np.argsort(-found, kind="stable") for name, found in scores.items()}
    consumers = evidence.consumers(group)
    if not consumers:
        return {name: _lost_share(scores[name][order]) for name, order in orders.items()}
    rankings = {order.tobytes(): order for order in orders.values()}
    found = {key: np.zeros(group.size + 1) for key in rankings}
    for links in consumers:
        for key, curve in zip(rankings, _consumer_curves(evidence, links, group, rankings.values()), strict=True):
            found[key] += curve
    return {name: found[order.tobytes()] for name, order in orders.items()}


def _lost_share(ordered: np.ndarray) -> np.ndarray:
    """Returns the fraction of the squared scores, highest first, that goes at widths 0 .. n."""
    squared = ordered**2
    return np.append(np.cumsum((squared / squared.sum())[::-1])[::-1], 0.0)


def _consumer_curves(
    evidence: Evidence, links: Links, group: PruningGroup, orders: Iterable[np.ndarray]
) -> list[np.ndarray]:
    """Returns the relative error of one consumer at widths 0 .. n, for each order of the group's channels."""
    assert links.inputs is not None
    moments = evidence.statistics[links.site]
    positions = positions_in(links.inputs, group)
    own = np.flatnonzero(positions >= 0)
    positions = positions[own]
    entries = entries_of(own, moments.kernel)
    whole = len(own) == len(links.inputs)
    if whole:
        matrix, ridge, power = layer_moments(moments, links), RIDGE, None
        weight = grouped_rows(evidence.rows(links), matrix)
    else:
        shared = evidence.inverse(links, ridge=RIDGE)
        weight = grouped_rows(evidence.rows(links), shared.matrix)[:, :, entries]
        matrix, ridge, power = _left_of(shared.matrix, entries), _ROUNDING, shared.regular_power
    curves = []
    for order in orders:
        rank = np.empty(group.size, dtype=np.int64)
        rank[order] = np.arange(group.size)
        turn = np.argsort(rank[positions], kind="stable")
        permutation = entries_of(turn, moments.kernel).to(matrix.device)
        columns, ridge = _column_powers(matrix, weight, permutation, ridge)
        # A channel may stand at several inputs (a flattened map): add up what its entries carry.
        lost = np.bincount(rank[positions[turn]], columns.reshape(len(own), -1).sum(1), minlength=group.size)
        total = max(float(columns.sum()) if power is None else power, 1e-30)
        curves.append(np.append(np.cumsum(lost[::-1])[::-1], 0.0) / total)
    return curves


def _left_of(inverse: Tensor, entries: Tensor) -> Tensor:
    """Returns `(G, e, e)` what is left of the matrix behind `inverse` once all but `entries` are eliminated."""
    block = inverse[:, entries.unsqueeze(1), entries]
    return torch.cholesky_inverse(raised_factor(lambda: block.clone(), _ROUNDING)[0])


def _column_powers(matrix: Tensor, weight: Tensor, permutation: Tensor, ridge: float) -> tuple[np.ndarray, float]:
    """Returns the squared norms of the columns of `W L`, `(d,)`, summed over convolution groups, and the ridge that was
    needed; `L` is the factor of the permuted `matrix` `(G, d, d)`, `weight` `(G, N/G, d)`.
    """
    groups, size, step = matrix.shape[0], matrix.shape[1], -(-matrix.shape[1] // _STRIPS)
    strips = [(start, min(start + step, size)) for start in range(0, size, step)]

    def permuted() -> Tensor:
        result = torch.empty(groups, size, size, dtype=torch.float64, device=matrix.device)
        for start, stop in strips:
            result[:, start:stop] = matrix.index_select(1, permutation[start:stop]).index_select(2, permutation)
        return result

    factor, ridge = raised_factor(permuted, ridge)
    weight = weight.index_select(2, permutation)
    columns = [(weight[:, :, a:] @ factor[:, a:, a:b]).square().sum((0, 1)) for a, b in strips]  # L is zero above
    return torch.cat(columns).cpu().numpy(), ridge
