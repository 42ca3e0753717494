"""Pruning criteria: functions that score the channels of a group; higher means keep.

One literal table, `CRITERIA`. Scores are normalised to a mean of one within a group, so that a ranking over all
groups compares channels with their own layer (LAMP keeps its own normalisation, which is made for that). Knows
nothing of policies.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from autoprune.errors import DataError, PolicyError, nearest
from autoprune.network.calibration import Statistics
from autoprune.network.compensation import entries_of, layer_moments
from autoprune.network.groups import Links, PruningGroup, positions_in
from autoprune.network.trace import Network, evaluating

Scores = np.ndarray
"""`(n,)` float64: one score a channel of a group."""


@dataclass(frozen=True)
class Evidence:
    """What criteria may look at: the dense network, its calibration statistics and its gradients."""

    network: Network
    statistics: Statistics = field(default_factory=dict)
    gradients: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Parameter → `weight * gradient`, summed over everything but its output channels, one `(n,)` tensor a batch."""
    seed: int = 0

    def uses(self, group: PruningGroup, kinds: Iterable[str]) -> list[Links]:
        """Returns the layers of the given kinds that produce (or normalise) the group's channels, each weight once."""
        found: dict[str, Links] = {}
        for links in self.network.links:
            if links.layer.kind in kinds and _inside(links.outputs, group).any():
                found.setdefault(f"{links.layer.weight}:{links.layer.start}", links)
        return list(found.values())

    def consumers(self, group: PruningGroup) -> list[Links]:
        """Returns the refittable layers that read the group's channels and have statistics."""
        found: dict[str, Links] = {}
        for links in self.network.links:
            if links.inputs is not None and links.module in self.statistics and _inside(links.inputs, group).any():
                found.setdefault(links.module, links)
        return list(found.values())

    def parameter(self, name: str) -> Tensor:
        """Returns a parameter of the dense model, detached."""
        return self.network.model.get_parameter(name).detach()


Criterion = Callable[[Evidence, PruningGroup], Scores]
_PRODUCERS = ("conv", "transposed", "depthwise", "linear", "embedding", "recurrent", "computed", "product")


def _inside(units: np.ndarray, group: PruningGroup) -> np.ndarray:
    return positions_in(units, group) >= 0


def _rows(links: Links, weight: Tensor) -> Tensor:
    """Returns the rows of the weight that a layer uses as `(outputs, fan-in)` double."""
    rows = weight.movedim(links.layer.out_dim, 0).reshape(weight.shape[links.layer.out_dim], -1).double()
    return rows[links.layer.start : links.layer.start + len(links.outputs)]


def _by_unit(values: Tensor, units: np.ndarray, group: PruningGroup) -> Scores:
    """Adds up `values` `(m,)` of indices that belong to the same channel: `(n,)`."""
    positions = positions_in(units, group)
    inside = positions >= 0
    result = np.zeros(group.size)
    np.add.at(result, positions[inside], values.cpu().numpy()[inside])
    return result


def _relative(scores: Scores) -> Scores:
    mean = float(scores.mean())
    return scores / mean if mean != 0 else np.ones_like(scores)  # a NaN stays one, for `score` to refuse


def _norms(evidence: Evidence, group: PruningGroup, power: int) -> Scores:
    total = np.zeros(group.size)
    for links in evidence.uses(group, _PRODUCERS):
        rows = _rows(links, evidence.parameter(links.layer.weight))
        summed = _by_unit(rows.abs().pow(power).sum(1), links.outputs, group)
        total += _relative(summed ** (1.0 / power))
    return _relative(total)


def l1(evidence: Evidence, group: PruningGroup) -> Scores:
    """Sum of absolute weights of the filters that make the channel.

    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017.
    """
    return _norms(evidence, group, 1)


def l2(evidence: Evidence, group: PruningGroup) -> Scores:
    """Euclidean norm of the filters that make the channel."""
    return _norms(evidence, group, 2)


def bn_scale(evidence: Evidence, group: PruningGroup) -> Scores:
    """Absolute scale of the normalisation behind the channel; `l2` where no normalisation follows.

    Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017.
    """
    norms = evidence.uses(group, ("norm",))
    if not norms:
        return l2(evidence, group)
    total = np.zeros(group.size)
    for links in norms:
        total += _relative(_by_unit(evidence.parameter(links.layer.weight).double().abs(), links.outputs, group))
    return _relative(total)


def fpgm(evidence: Evidence, group: PruningGroup) -> Scores:
    """Sum of distances to the other filters: a filter near the geometric median is replaceable.

    Source: He et al., Filter Pruning via Geometric Median, CVPR 2019.
    """
    total = np.zeros(group.size)
    for links in evidence.uses(group, _PRODUCERS):
        rows = _rows(links, evidence.parameter(links.layer.weight))
        inside = np.flatnonzero(_inside(links.outputs, group))
        picked = rows[torch.from_numpy(inside).to(rows.device)]
        distances = torch.cdist(picked, picked).sum(1)
        values = torch.zeros(rows.shape[0], dtype=torch.float64)
        values[torch.from_numpy(inside)] = distances.cpu()
        total += _relative(_by_unit(values, links.outputs, group))
    return _relative(total)


def lamp(evidence: Evidence, group: PruningGroup) -> Scores:
    """Squared norm relative to that of all channels that are at least as large: comparable over layers as it is.

    Source: Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021.
    """
    squared = l2(evidence, group) ** 2
    order = np.argsort(squared, kind="stable")
    rest = np.cumsum(squared[order][::-1])[::-1]
    scores = np.empty_like(squared)
    scores[order] = squared[order] / np.maximum(rest, 1e-300)
    return scores


def taylor(evidence: Evidence, group: PruningGroup) -> Scores:
    """Squared first-order change of the loss when the channel goes, averaged over calibration batches.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019.
    """
    if not evidence.gradients:
        raise PolicyError("the criterion taylor needs gradients on labelled calibration images")
    total = np.zeros(group.size)
    for links in evidence.uses(group, (*_PRODUCERS, "norm")):
        names = [links.layer.weight] + ([links.layer.bias] if links.layer.kind == "norm" and links.layer.bias else [])
        batches = [sum(parts) for parts in zip(*(evidence.gradients[name] for name in names), strict=True)]
        for products in batches:
            used = torch.as_tensor(products).double()[links.layer.start : links.layer.start + len(links.outputs)]
            total += _by_unit(used, links.outputs, group) ** 2
    return _relative(total)


def activation(evidence: Evidence, group: PruningGroup) -> Scores:
    """Root mean square of the channel where it is consumed; `l2` where no consumer has statistics."""
    consumers = evidence.consumers(group)
    if not consumers:
        return l2(evidence, group)
    total = np.zeros(group.size)
    for links in consumers:
        assert links.inputs is not None
        moments = evidence.statistics[links.module]
        power = moments.gram.diagonal(dim1=1, dim2=2).sum(0).reshape(-1, moments.kernel).mean(1)  # (C/G,)
        total += _relative(np.sqrt(_by_unit(power.double(), links.inputs, group)))
    return _relative(total)


def obs(evidence: Evidence, group: PruningGroup) -> Scores:
    """Increase of the consumers' output error when the channel goes and all others are refitted; `l2` without
    consumers.

    For the block `c` of a channel's entries: `tr(W_c ([C⁻¹]_cc)⁻¹ W_cᵀ)`, relative to the consumer's output power.

    Source: Hassibi & Stork, Optimal Brain Surgeon, NIPS 1992; in blocks as in Frantar & Alistarh, NeurIPS 2022.
    """
    consumers = evidence.consumers(group)
    if not consumers:
        return l2(evidence, group)
    total = np.zeros(group.size)
    for links in consumers:
        assert links.inputs is not None
        inside = np.flatnonzero(_inside(links.inputs, group))
        increase, power = _block_errors(evidence, links, inside)
        values = torch.zeros(len(links.inputs), dtype=torch.float64)
        values[torch.from_numpy(inside)] = increase / power
        total += _by_unit(values, links.inputs, group)
    return _relative(total)


def _block_errors(evidence: Evidence, links: Links, channels: np.ndarray) -> tuple[Tensor, float]:
    """Returns the error increase of each channel `(m,)` and the output power, summed over convolution groups."""
    moments = evidence.statistics[links.module]
    matrix = layer_moments(moments, links).double()
    groups, d = matrix.shape[0], matrix.shape[1]
    weight = evidence.parameter(links.layer.weight)
    flat = weight.reshape(groups, weight.shape[0] // groups, -1).double().to(matrix.device)  # (G, N/G, d)
    power = float(torch.einsum("gnd,gde,gne->", flat, matrix, flat).clamp_min(1e-12))
    scale = matrix.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    eye = torch.eye(d, dtype=torch.float64, device=matrix.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix + 1e-3 * scale.view(-1, 1, 1) * eye))
    k = moments.kernel
    entries = entries_of(channels, k).to(matrix.device).reshape(-1, k)  # (m, k)
    blocks = inverse[:, entries.unsqueeze(2), entries.unsqueeze(1)]  # (G, m, k, k)
    columns = flat[:, :, entries].permute(0, 2, 3, 1)  # (G, m, k, N/G)
    solved = torch.linalg.solve(blocks, columns)
    return (columns * solved).sum((0, 2, 3)).cpu(), power


def random(evidence: Evidence, group: PruningGroup) -> Scores:
    """Numbers drawn from the seed and the group's name: the control that every other criterion must beat."""
    rng = np.random.default_rng([evidence.seed, zlib.crc32(group.name.encode())])
    return rng.uniform(0.5, 1.5, group.size)


CRITERIA: dict[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "bn_scale": bn_scale,
    "fpgm": fpgm,
    "lamp": lamp,
    "taylor": taylor,
    "activation": activation,
    "obs": obs,
    "random": random,
}
NEEDS_STATISTICS = frozenset({"activation", "obs"})
NEEDS_GRADIENTS = frozenset({"taylor"})


def score(evidence: Evidence, criteria: Iterable[str]) -> dict[str, dict[str, Scores]]:
    """Returns criterion → group → scores.

    Raises:
        PolicyError: A criterion is unknown, needs what `evidence` lacks, or gives a score that is not finite.
    """
    result: dict[str, dict[str, Scores]] = {}
    for name in criteria:
        if name not in CRITERIA:
            raise PolicyError(f"unknown criterion {name!r}{nearest(name, CRITERIA)}")
        result[name] = {group.name: CRITERIA[name](evidence, group) for group in evidence.network.groups}
        for group, scores in result[name].items():
            if not np.isfinite(scores).all():
                raise PolicyError(f"criterion {name!r} gives scores that are not finite for group {group!r}")
    return result


def choose(scores: Scores, width: int) -> np.ndarray:
    """Returns the ascending positions of the `width` highest scores; of equal scores the first ones."""
    return np.sort(np.argsort(-scores, kind="stable")[:width])


def gather_gradients(
    network: Network,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    device: torch.device | str = "cpu",
) -> dict[str, tuple[Tensor, ...]]:
    """Returns `weight * gradient` summed over each output channel's weights, for every producer and norm, one tensor
    a batch.

    Raises:
        DataError: There is no batch.
    """
    dims = {links.layer.weight: links.layer.out_dim for links in network.links}
    dims |= {links.layer.bias: 0 for links in network.links if links.layer.bias}
    parameters = {name: network.model.get_parameter(name) for name in dims if name}
    trainable = {name: p.requires_grad for name, p in parameters.items()}
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    try:
        for p in parameters.values():
            p.requires_grad_(True)
        with evaluating(network.model), torch.enable_grad():
            for x, y in batches:
                value = loss(network.model(x.to(device)), y.to(device))
                gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
                for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
                    dim = dims[name]
                    product = (p.detach() * gradient) if gradient is not None else torch.zeros_like(p)
                    found[name].append(product.movedim(dim, 0).reshape(p.shape[dim], -1).sum(1).cpu())
    finally:
        for name, p in parameters.items():
            p.requires_grad_(trainable[name])
    if not any(found.values()):
        raise DataError("there are no labelled calibration images")
    return {name: tuple(tensors) for name, tensors in found.items()}
