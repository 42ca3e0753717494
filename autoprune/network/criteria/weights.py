"""Criteria for single weights, and what a layer loses at each sparsity by each of them.

Decides how a weight's elements are scored (higher means keep) and the error tables of the additive warm start. One
literal table, `WEIGHT_CRITERIA`, says what each needs. Scores of `l1`, `l2` and `taylor` compare over layers as they
are, `lamp` by its own normalisation, `activation` and `obs` because they are relative to the layer's output. Knows
nothing of policies.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from autoprune.errors import PolicyError, nearest
from autoprune.network.calibration.moments import Moments
from autoprune.network.criteria.inputs import Criterion, Evidence, Scores
from autoprune.network.criteria.tables import Tables
from autoprune.network.graph.groups import Links
from autoprune.network.repair.compensation import layer_moments, regular_factor
from autoprune.network.repair.masked_compensation import refit_masked
from autoprune.network.surgery.masks import MaskWeight, keep, mask_weights
from autoprune.policy import Group

WeightCriterion = Criterion[MaskWeight, Tensor]

_TABLE_STEPS = 12
"""Steps of the solver an entry of a table: enough to rank sparsities, an eighth of a trial's."""
_TABLE_POINTS = 9
_TABLE_OUTPUTS = 64
"""Outputs of a layer that its table is measured on."""


def magnitude(evidence: Evidence, weight: MaskWeight) -> Tensor:
    """Absolute value."""
    return evidence.parameter(weight.parameter).double().abs()


def lamp(evidence: Evidence, weight: MaskWeight) -> Tensor:
    """Square relative to the sum of the squares that are at least as large: comparable over layers as it is."""
    squares = evidence.parameter(weight.parameter).double().square().reshape(-1)
    ordered, order = torch.sort(squares, stable=True)
    rest = ordered.flip(0).cumsum(0).flip(0).clamp_min(1e-300)
    scores: Tensor = torch.empty_like(squares)
    scores[order] = ordered / rest
    return scores.reshape(weight.shape)


def taylor(evidence: Evidence, weight: MaskWeight) -> Tensor:
    """Squared first-order change of the loss when the weight goes, averaged over calibration batches."""
    return evidence.gradients[weight.parameter][0].double()


def activation(evidence: Evidence, weight: MaskWeight) -> Tensor:
    """Absolute value times the root mean square of the input that it multiplies, relative to the layer's output.

    The absolute value relative to the weight's norm where the layer's input has no statistics (recurrent layers).
    """
    moments = evidence.statistics.get(weight.module)
    if moments is None:
        return _share(evidence, weight).sqrt()
    flat, power = _flat(evidence, weight, moments, moments.gram)
    size = moments.gram.double().diagonal(dim1=1, dim2=2).sqrt().unsqueeze(1)  # (G, 1, d)
    scores: Tensor = flat.abs() * size / power**0.5
    return scores.reshape(weight.shape)


def obs(evidence: Evidence, weight: MaskWeight) -> Tensor:
    """Increase of the layer's output error when the weight goes and its output's others are refitted.

    `w² / [C⁻¹]_jj`, relative to the power of the layer's output; the square relative to the weight's squared norm
    where the layer's input has no statistics (recurrent layers).
    """
    moments = evidence.statistics.get(weight.module)
    if moments is None:
        return _share(evidence, weight)
    matrix = layer_moments(moments, _links(evidence, weight)).double()
    flat, power = _flat(evidence, weight, moments, matrix)
    inverse = torch.cholesky_inverse(regular_factor(matrix, 1e-3))
    return (flat.square() / inverse.diagonal(dim1=1, dim2=2).unsqueeze(1) / power).reshape(weight.shape)


def random(evidence: Evidence, weight: MaskWeight) -> Tensor:
    """Numbers drawn from the seed and the weight's name: the control that every other criterion must beat."""
    rng = np.random.default_rng([evidence.seed, zlib.crc32(weight.name.encode())])
    return torch.from_numpy(rng.uniform(0.5, 1.5, weight.shape))


WEIGHT_CRITERIA: dict[str, WeightCriterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion(
            "l1",
            magnitude,
            weights_alone=True,
            source="Han et al., Learning both Weights and Connections for Efficient Neural Networks, NIPS 2015.",
        ),
        Criterion(
            "l2",
            magnitude,
            weights_alone=True,
            source="Han et al., Learning both Weights and Connections for Efficient Neural Networks, NIPS 2015.",
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
        Criterion(
            "activation",
            activation,
            statistics=True,
            source="Sun et al., A Simple and Effective Pruning Approach for Large Language Models (Wanda), ICLR 2024.",
        ),
        Criterion(
            "obs",
            obs,
            statistics=True,
            source="Hassibi & Stork, Optimal Brain Surgeon, NIPS 1992; Frantar & Alistarh, SparseGPT, ICML 2023.",
        ),
        Criterion("random", random),
    )
}
"""Criteria that rank single weights: those that compare whole filters, or read a normalisation behind them, do not."""


def weight_criterion_of(name: str) -> WeightCriterion:
    """Returns the criterion for single weights that is called `name`.

    Raises:
        PolicyError: There is none, or it ranks whole channels.
    """
    if name not in WEIGHT_CRITERIA:
        raise PolicyError(f"the criterion {name!r} does not rank single weights{nearest(name, WEIGHT_CRITERIA)}")
    return WEIGHT_CRITERIA[name]


def weight_scores(evidence: Evidence, criteria: Iterable[str]) -> dict[str, dict[str, Scores]]:
    """Returns criterion → mask group → `(size,)` float32 scores in the order of the flattened weight.

    Raises:
        PolicyError: A criterion does not rank single weights, needs what `evidence` lacks, or gives a score that is
            not finite.
    """
    result: dict[str, dict[str, Scores]] = {}
    weights = mask_weights(evidence.network)
    for name in criteria:
        criterion = weight_criterion_of(name)
        result[name] = {}
        for group, weight in weights.items():
            scores = criterion(evidence, weight).reshape(-1).float().cpu()
            if not bool(torch.isfinite(scores).all()):
                raise PolicyError(f"criterion {name!r} gives scores that are not finite for group {group!r}")
            result[name][group] = scores.numpy()
    return result


# --- error tables -------------------------------------------------------------------------------------------------


def weight_tables(
    evidence: Evidence, groups: Sequence[Group], scores: Mapping[str, Mapping[str, Scores]], *, pattern: str
) -> Tables:
    """Returns group → criterion → kept weights → relative error of the layer's output under refit.

    The error falls with the number of weights and is 0 where all stay. It is measured at up to nine widths of a group,
    on up to 64 outputs, and interpolated at the others. A layer without statistics uses the fraction of its squared
    scores that goes.
    """
    weights = mask_weights(evidence.network)
    return {
        group.name: {
            name: _table(evidence, weights[group.name], group, by_group[group.name], pattern)
            for name, by_group in scores.items()
        }
        for group in groups
    }


def _table(evidence: Evidence, weight: MaskWeight, group: Group, scores: Scores, pattern: str) -> dict[int, float]:
    widths = sorted({*group.widths, weight.size})
    places = np.unique(np.linspace(0, len(widths) - 1, min(_TABLE_POINTS, len(widths))).round().astype(int))
    measured = [widths[place] for place in places]
    errors = np.array([_error(evidence, weight, scores, width, pattern) for width in measured])
    errors = np.maximum.accumulate(errors[::-1])[::-1]  # fewer weights never lose less
    # Errors span orders of magnitude: their roots are closer to straight lines.
    filled = np.interp(widths, measured, np.sqrt(errors)) ** 2
    return {width: float(error) for width, error in zip(widths, filled, strict=True)}


def _error(evidence: Evidence, weight: MaskWeight, scores: Scores, width: int, pattern: str) -> float:
    if width == weight.size:
        return 0.0
    kept = keep(weight, scores, width, pattern)
    moments = evidence.statistics.get(weight.module)
    if moments is None:
        squared = scores.astype(np.float64) ** 2
        return float(1.0 - squared[kept].sum() / max(squared.sum(), 1e-300))
    mask = torch.zeros(weight.size, dtype=torch.bool)
    mask[torch.from_numpy(kept)] = True
    dense = evidence.parameter(weight.parameter)
    mask = mask.reshape(weight.shape)
    groups = moments.gram.shape[0]
    if groups == 1 and dense.shape[0] > _TABLE_OUTPUTS:
        drawn = torch.linspace(0, dense.shape[0] - 1, _TABLE_OUTPUTS).round().long()
        dense, mask = dense[drawn.to(dense.device)], mask[drawn]
    links = _links(evidence, weight)
    matrix = layer_moments(moments, links)
    refitted = refit_masked(dense, moments, links, mask, ridge=1e-3, recalibrated=True, steps=_TABLE_STEPS)
    gone = (dense - refitted).reshape(groups, -1, matrix.shape[1]).float()
    flat = dense.reshape(groups, -1, matrix.shape[1]).float()
    lost, power = ((rows @ matrix * rows).sum() for rows in (gone, flat))
    return float(lost.clamp_min(0) / power.clamp_min(1e-30))


def _links(evidence: Evidence, weight: MaskWeight) -> Links:
    return next(links for links in evidence.network.links if links.layer.weight == weight.parameter)


def _flat(evidence: Evidence, weight: MaskWeight, moments: Moments, matrix: Tensor) -> tuple[Tensor, float]:
    """Returns the weight as `(G, N/G, d)` and the power of the layer's output."""
    groups, d = moments.gram.shape[0], moments.gram.shape[1]
    flat = evidence.parameter(weight.parameter).double().reshape(groups, -1, d).to(matrix.device)
    return flat, max(float((flat @ matrix.double() * flat).sum()), 1e-30)


def _share(evidence: Evidence, weight: MaskWeight) -> Tensor:
    squares = evidence.parameter(weight.parameter).double().square()
    return squares / squares.sum().clamp_min(1e-300)
