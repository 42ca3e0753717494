"""Whether the score of a dense network can be what it seems: chance, and what is left when everything is pruned.

Decides which scores are doubted, in which words. A search maximises whatever it is given; these are the signs that it
was given the wrong thing. Knows nothing of trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from autoprune.network.criteria.channels import choose
from autoprune.network.surgery.masks import keep, mask_weights
from autoprune.network.surgery.selection import Selection
from autoprune.network.training.evaluation import Score
from autoprune.network.workbench import Workbench

_ERRORS = 2.0
"""Standard errors by which an accuracy has to be above chance."""


def doubts(bench: Workbench, dense: Mapping[str, float], *, limit: int | None = None) -> list[str]:
    """Returns sentences on why the score of the dense network may not mean what it seems to mean; usually none.

    Args:
        bench: What scores networks.
        dense: The metrics of the dense network.
        limit: Samples of the validation split that are scored; None: all.
    """
    found = dense["val_accuracy"]
    count = len(bench.splits.val) if limit is None else min(limit, len(bench.splits.val))
    if bench.metric is None:
        chance = 1.0 / bench.splits.num_classes
        spread = math.sqrt(chance * (1.0 - chance) / count)
        if found > chance + _ERRORS * spread:
            return []
        return [
            f"the dense network is right on {found:.1%} of {count:,} validation samples, where chance is {chance:.1%}:"
            " see whether its weights are trained, its inputs prepared as in training, and its outputs in the order of"
            " the classes"
        ]
    score = collapsed_score(bench, limit=limit)
    sentences = []
    if not score.whole:
        sentences.append(
            "the metric is the mean over batches: the outputs of all samples are too large to be held at once, or not"
            " of one form"
        )
    if score.accuracy > found:
        sentences.append(
            f"the metric is {score.accuracy:.4g} with almost everything pruned and {found:.4g} for the dense network:"
            " the search looks for the highest value; where lower is better, give the negative"
        )
    return sentences


def collapsed_score(bench: Workbench, *, limit: int | None = None) -> Score:
    """Returns the score of the network with every searched group at its smallest width, as cut, without any repair."""
    return bench.score(bench.pruned(_smallest(bench)).to(bench.device), "val", limit)


def _smallest(bench: Workbench) -> Selection:
    scores = next(iter(bench.knowledge.scores.values()))
    widths = {group.name: max(1, min(group.widths)) for group in bench.groups}
    if bench.network.masked:
        weights, pattern = mask_weights(bench.network), bench.network.pruning
        return {name: keep(weights[name], scores[name], width, pattern) for name, width in widths.items()}
    return {name: np.asarray(choose(scores[name], width)) for name, width in widths.items()}
