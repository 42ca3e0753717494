"""The criteria that a space file may name, with what is said of them there.

One literal table, `NAMED_CRITERIA`. How a criterion scores, and what it needs for that, stands beside its function in
`autoprune.network.criteria` (a test compares the names): this part must not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True, slots=True)
class NamedCriterion:
    """A criterion as a space file knows it.

    `ranks` says by what it ranks; `not_weights` why it cannot rank single weights, None where it can.
    """

    ranks: str = ""
    not_weights: str | None = None


NAMED_CRITERIA: dict[str, NamedCriterion] = {
    "l1": NamedCriterion("norm of a channel's weights"),
    "l2": NamedCriterion("norm of a channel's weights"),
    "bn_scale": NamedCriterion(
        "BatchNorm scale", "reads the scale of a whole channel's batch norm, which says nothing about single weights"
    ),
    "fpgm": NamedCriterion(
        "distance to the geometric median",
        "compares whole filters with each other, which says nothing about single weights",
    ),
    "lamp": NamedCriterion("layer-adaptive magnitude"),
    "taylor": NamedCriterion("first-order change of the loss"),
    "activation": NamedCriterion("mean activation"),
    "obs": NamedCriterion("error increase under refit"),
    "obs_greedy": NamedCriterion(
        "the same, one channel after another",
        "removes whole channels one after another; for single weights take obs",
    ),
    "hessian": NamedCriterion(
        "optimal brain damage with Fisher's diagonal",
        "adds up what all weights of a channel matter; for single weights it is what taylor is",
    ),
    "hrank": NamedCriterion(
        "rank of feature maps", "reads the feature map of a whole channel, which says nothing about single weights"
    ),
    "random": NamedCriterion(),
}


def described() -> str:
    """Returns all criteria in one line, those of one meaning together: `l1, l2: norm of ...; bn_scale: ...`."""
    parts = []
    for ranks, names in groupby(NAMED_CRITERIA, key=lambda name: NAMED_CRITERIA[name].ranks):
        parts.append(", ".join(names) + (f": {ranks}" if ranks else ""))
    return "; ".join(parts)


def of_weights() -> list[str]:
    """Returns the names of the criteria that rank single weights."""
    return [name for name, criterion in NAMED_CRITERIA.items() if criterion.not_weights is None]
