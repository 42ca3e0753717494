"""Optimal brain surgeon: what the consumers of a channel lose beyond repair, all channels at once or one after another.

Decides the ridge, the block of a channel (all its entries of a consumer's input: kernel positions, flattened
positions) and the order of a greedy removal. Knows nothing of the table of criteria or of policies.

For a consumer with weight `W` and regularised covariance `C` of its input, the removal of a block `c` under optimal
refit of everything else costs `tr(W_c ([C⁻¹]_cc)⁻¹ W_cᵀ)`. Afterwards, exactly, with `K = ([C⁻¹]_cc)⁻¹ C⁻¹_c:`:
`W ← W - W_c K` and `C⁻¹ ← C⁻¹ - C⁻¹_:c K`: no second inversion is needed.

Source: Hassibi & Stork, Optimal Brain Surgeon, NIPS 1992; blocks and downdates as in Frantar & Alistarh, Optimal
Brain Compression, NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from autoprune.network.criteria.inputs import Evidence, Scores, is_inside
from autoprune.network.criteria.inverses import Inverse, grouped_rows
from autoprune.network.graph.groups import Links, PruningGroup, positions_in
from autoprune.network.repair.compensation import entries_of

RIDGE = 1e-3
"""Added to the diagonal of `C`, relative to its mean."""

MAX_STEPS = 128
"""Downdates of a group's whole matrices. A group of n channels removes ⌈n / MAX_STEPS⌉ a step: up to 128 channels the
greedy order is exact."""

_POOL = 4
"""The channels of a step are taken in turn, exactly, from so many times as many that are cheapest when it begins."""

_COMPACT = 0.75
"""Matrices are cut to what is left when it is at most this fraction of them."""


def block_errors(evidence: Evidence, links: Links, group: PruningGroup) -> Tensor:
    """Returns what each input of a consumer costs when it goes alone, relative to the consumer's output power, `(m,)`;
    0 where it is none of the group's.
    """
    assert links.inputs is not None
    inverse = evidence.inverse(links, ridge=RIDGE)
    weight = _scaled_weight(evidence, links, inverse)
    inside = np.flatnonzero(is_inside(links.inputs, group))
    k = evidence.statistics[links.site].kernel
    values = torch.zeros(len(links.inputs), dtype=torch.float64)
    values[torch.from_numpy(inside)] = _costs(weight, inverse.matrix, entries_of(inside, k).reshape(-1, k)).cpu()
    return values


def removal_costs(evidence: Evidence, group: PruningGroup) -> Scores:
    """Returns scores `(n,)` whose order is the order of a greedy removal: the later a channel goes, the higher.

    A score is the error, relative to each consumer's output power and summed over consumers, that the removal of the
    channel adds when its turn comes, or that of the dearest one before it where that is more.

    In float64. Each consumer holds its inverse, `(G, d, d)`: 8·G·d² bytes, two to three times that for a moment. Time
    grows with d³ as that of an inversion does. For 512 channels of a 3x3 convolution (d = 4608), four channels a step:
    170 MB, and 9 s of one core where one-shot obs takes 5 s.
    """
    consumers = [_Consumer.of(evidence, links, group) for links in evidence.consumers(group)]
    step = -(-group.size // MAX_STEPS)
    order, costs = _in_turn(consumers, np.arange(group.size), group.size, step=step)
    rising = np.maximum.accumulate(costs)
    if not rising.any():
        rising = np.ones(group.size)
    scores = np.empty(group.size)
    # Equal costs keep their turn: channels are ranked by score alone.
    scores[order] = rising + 1e-9 * rising.mean() * np.arange(group.size)
    return scores


def _in_turn(
    consumers: Sequence[_Consumer], channels: np.ndarray, count: int, *, step: int
) -> tuple[list[int], list[float]]:
    """Removes `count` of the channels from the consumers (which it changes); returns them in order, and their costs."""
    left, order, costs = channels, list[int](), list[float]()
    while len(order) < count:
        each = np.sum([consumer.costs(left) for consumer in consumers], axis=0)  # (len(left),)
        if step == 1:
            cheapest = int(each.argmin())
            found, lost = [int(left[cheapest])], [float(each[cheapest])]
        else:
            # Costs change within a step (the twin of a channel that has gone is cheap no more), hence in turn here too.
            pool = left[np.argsort(each, kind="stable")[: _POOL * step]]
            few = [consumer.restricted(pool) for consumer in consumers]
            found, lost = _in_turn(few, pool, min(step, len(pool), count - len(order)), step=1)
        order += found
        costs += lost
        left = left[~np.isin(left, found)]
        if len(order) < count:
            consumers = [consumer.without(np.array(found), left) for consumer in consumers]
    return order, costs


class _Consumer:
    """The weight `(G, d, N/G)` and the inverse `(G, d, d)` of one consumer as the channels of a group go.

    `entries` `(n, e)` are the positions in the inverse of each of the group's channels, the first `lengths` `(n,)` of
    each row: a channel may stand at several inputs, or at none of this consumer.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, entries: np.ndarray, lengths: np.ndarray) -> None:
        self._weight, self._inverse, self._entries, self._lengths = weight, inverse, entries, lengths

    @classmethod
    def of(cls, evidence: Evidence, links: Links, group: PruningGroup) -> _Consumer:
        """Returns the consumer as it is in the dense network, without the inputs that are none of the group's: they
        stay, so that only their part in the inverse counts.
        """
        assert links.inputs is not None
        k = evidence.statistics[links.site].kernel
        places = positions_in(links.inputs, group)
        own = [entries_of(np.flatnonzero(places == c), k).numpy() for c in range(group.size)]
        lengths = np.array([len(entries) for entries in own])
        table = np.full((group.size, int(lengths.max())), -1)
        for row, entries in zip(table, own, strict=True):
            row[: len(entries)] = entries
        shared = evidence.inverse(links, ridge=RIDGE)
        weight = _scaled_weight(evidence, links, shared)
        if (places >= 0).all():
            return cls(weight, shared.matrix.clone(), table, lengths)  # a copy, because removals change it
        return cls(weight, shared.matrix, table, lengths).restricted(np.arange(group.size))

    def costs(self, channels: np.ndarray) -> np.ndarray:
        """Returns what each of the channels would cost now, `(len(channels),)`."""
        lengths = self._lengths[channels]
        found = np.zeros(len(channels))
        for length in np.unique(lengths[lengths > 0]):
            entries = torch.from_numpy(self._entries[channels[lengths == length], :length])
            found[lengths == length] = _costs(self._weight, self._inverse, entries).cpu().numpy()
        return found

    def without(self, gone: np.ndarray, left: np.ndarray) -> _Consumer:
        """Removes channels in place and refits the rest; returns what holds the channels that are left."""
        taken = self._of_channels(gone)
        rows = self._inverse[:, taken]  # (G, e, d)
        gain = torch.linalg.solve(rows[:, :, taken], rows)  # (G, e, d)
        self._weight.baddbmm_(gain.transpose(1, 2), self._weight[:, taken], alpha=-1)
        self._inverse.baddbmm_(rows.transpose(1, 2), gain, alpha=-1)
        return self.restricted(left) if self._lengths[left].sum() <= _COMPACT * self._inverse.shape[1] else self

    def restricted(self, channels: np.ndarray) -> _Consumer:
        """Returns a copy that can tell and remove these channels alone."""
        picked = self._of_channels(channels)
        place = np.full(self._inverse.shape[1] + 1, -1)  # the last one for the padding of `entries`
        place[picked.cpu().numpy()] = np.arange(len(picked))
        known = np.zeros(len(self._lengths), dtype=bool)
        known[channels] = True
        weight = self._weight[:, picked]
        inverse = self._inverse[:, picked.unsqueeze(1), picked]  # index_select took five times as long
        return _Consumer(weight, inverse, place[self._entries], np.where(known, self._lengths, 0))

    def _of_channels(self, channels: np.ndarray) -> Tensor:
        entries = self._entries[channels]
        used = np.arange(entries.shape[1]) < self._lengths[channels][:, None]
        return torch.from_numpy(entries[used]).to(self._inverse.device)


def _scaled_weight(evidence: Evidence, links: Links, inverse: Inverse) -> Tensor:
    """Returns a consumer's weight `(G, d, N/G)`, float64, scaled to an output power of one."""
    flat = grouped_rows(evidence.rows(links), inverse.matrix)
    scaled: Tensor = flat / max(inverse.power, 1e-12) ** 0.5
    return scaled.transpose(1, 2).contiguous()


def _costs(weight: Tensor, inverse: Tensor, entries: Tensor) -> Tensor:
    """Returns `tr(W_c ([C⁻¹]_cc)⁻¹ W_cᵀ)` of each block of `entries` `(m, e)`, over all convolution groups, `(m,)`."""
    entries = entries.to(inverse.device)
    blocks = inverse[:, entries.unsqueeze(2), entries.unsqueeze(1)]  # (G, m, e, e)
    columns = weight[:, entries]  # (G, m, e, N/G)
    solved = torch.linalg.solve(blocks, columns @ columns.transpose(2, 3))  # (G, m, e, e)
    costs: Tensor = solved.diagonal(dim1=2, dim2=3).sum((0, 2)).clamp_min(0.0)
    return costs
