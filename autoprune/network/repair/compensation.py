"""Compensation: refits the weights that consume kept channels so that they reproduce the dense layer's output.

Decides the closed form and its ridge. With the covariance `C` of a layer's input on calibration images, kept entries
`S` and dense weight `W`, the least-squares refit is `W' = W C[:,S] (C[S,S] + λI)⁻¹`, and the bias takes up the mean
of what went. A layer without bias that no batch norm follows uses second moments instead of covariances. No
gradients, no images: only the cached statistics.

Source: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017; GRAIL, arXiv:2602.23795.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.network.calibration.moments import Moments, Statistics
from autoprune.network.graph.groups import Links
from autoprune.network.graph.labels import Labels
from autoprune.network.graph.network import Network
from autoprune.network.surgery.cut import row_factors
from autoprune.network.surgery.narrowing import shifted
from autoprune.network.surgery.selection import Selection, kept_indices, unit_mask


def compensated_tensors(
    network: Network, selection: Selection, statistics: Statistics, *, ridge: float = 1e-3, recalibrated: bool = True
) -> dict[str, Tensor]:
    """Returns the refitted weights and biases by name, already cut to the channels that stay.

    Args:
        network: The traced dense network.
        selection: The channels that stay.
        statistics: Moments of the dense layers' inputs.
        ridge: λ relative to the mean of the diagonal of `C[S,S]`.
        recalibrated: Whether batch norm statistics are re-estimated afterwards; they then absorb constant shifts.
    """
    kept = unit_mask(network, selection)
    state = {**dict(network.model.named_parameters(remove_duplicate=False))}
    uses: dict[str, list[Links]] = {}
    by_site: dict[str, Links] = {}
    for links in network.links:
        uses.setdefault(links.layer.weight, []).append(links)
        by_site.setdefault(links.site, links)
    tensors: dict[str, Tensor] = {}

    def put(name: str, start: int, rows: Tensor) -> None:
        if name not in tensors:
            tensors[name] = _cut(network, name, state[name].detach(), kept)
        start = shifted(network, name, start, kept)
        tensors[name][start : start + len(rows)] = rows

    for site, moments in statistics.items():
        links = by_site[site]
        if links.called and len(uses[links.layer.weight]) > 1:
            continue  # one weight, several inputs: no single refit serves all
        assert links.inputs is not None
        stay = kept_indices(links.inputs, kept)
        if len(stay) == len(links.inputs):
            continue
        layer, count = links.layer, len(links.outputs)
        weight = state[layer.weight].detach()[layer.start : layer.start + count]
        refitted, shift = refit(weight, moments, stay, ridge=ridge, centred=_centred(links, recalibrated))
        rows = torch.from_numpy(kept_indices(links.outputs, kept)).to(weight.device)
        put(layer.weight, layer.start, refitted.index_select(0, rows))
        if layer.bias is not None:
            bias = state[layer.bias].detach()[layer.bias_start : layer.bias_start + count]
            put(layer.bias, layer.bias_start, (bias + shift).index_select(0, rows))
    for name, factors in row_factors(network, kept).items():
        if name in tensors:
            tensors[name] *= factors.to(tensors[name]).view(-1, *[1] * (tensors[name].ndim - 1))
    return tensors


def _cut(network: Network, name: str, tensor: Tensor, kept: np.ndarray) -> Tensor:
    """Returns a copy of a dense parameter that holds what stays."""
    for dim, units in network.index_map.get(name, {}).items():
        tensor = tensor.index_select(dim, torch.from_numpy(kept_indices(units, kept)).to(tensor.device))
    return tensor.clone()


def compensate(
    network: Network,
    model: nn.Module,
    selection: Selection,
    statistics: Statistics,
    *,
    ridge: float = 1e-3,
    recalibrated: bool = True,
) -> None:
    """Gives the pruned `model` its refitted weights, in place. See `compensated_tensors` for the arguments."""
    state = dict(model.named_parameters(remove_duplicate=False))
    tensors = compensated_tensors(network, selection, statistics, ridge=ridge, recalibrated=recalibrated)
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def _centred(links: Links, recalibrated: bool) -> bool:
    return links.layer.bias is not None or (links.layer.normalised and recalibrated)


def layer_moments(moments: Moments, links: Links, *, recalibrated: bool = True) -> Tensor:
    """Returns the `(G, d, d)` matrix in which a layer's refit is least squares: covariance or second moments."""
    return moments.covariance() if _centred(links, recalibrated) else moments.gram


def regular_factor(matrix: Tensor, ridge: float) -> Tensor:
    """Returns the lower Cholesky factor `(G, d, d)` of `matrix + λI` with λ = `ridge` times the mean of the diagonal.

    Moments are float32: where thousands of inputs follow from a few, rounding can outweigh a small λ, which is then
    raised tenfold until the matrix is positive definite.
    """
    return raised_factor(lambda: matrix.clone(), ridge)[0]


def raised_factor(made: Callable[[], Tensor], ridge: float) -> tuple[Tensor, float]:
    """Returns what `regular_factor` does, and the ridge that it took.

    `made` returns the matrix anew, contiguous, at each attempt: it is factorised in place.
    """
    while True:
        regular = made()
        diagonal = regular.diagonal(dim1=1, dim2=2)
        diagonal.add_(ridge * diagonal.mean(1, keepdim=True).clamp_min(1e-12))
        # Its transpose is itself, and laid out as LAPACK wants it: nothing is copied.
        columns, info = regular.mT, torch.empty(len(regular), dtype=torch.int32, device=regular.device)
        torch.linalg.cholesky_ex(columns, check_errors=ridge > 1.0, out=(columns, info))
        if not bool(info.any()):
            return columns, ridge
        del regular, diagonal, columns  # before it is made anew
        ridge *= 10.0


def refit(
    weight: Tensor, moments: Moments, stay: Labels, *, ridge: float = 1e-3, centred: bool = True
) -> tuple[Tensor, Tensor]:
    """Refits `weight` `(N, C/G, k...)` to the input channels `stay` (positions in one group).

    Returns:
        The weight `(N, len(stay), k...)` and the shift `(N,)` to add to the bias (zero where `centred` is false).
    """
    groups = moments.gram.shape[0]
    entries = entries_of(stay, moments.kernel).to(weight.device)
    if len(stay) == 0:
        return _without_inputs(weight, moments, centred=centred)
    matrix = moments.covariance() if centred else moments.gram
    flat = weight.reshape(groups, weight.shape[0] // groups, -1).double()  # (G, N/G, d)
    matrix = matrix.to(weight.device).double()
    inner = matrix[:, entries][:, :, entries]  # (G, s, s)
    outer = matrix[:, :, entries]  # (G, d, s)
    scale = inner.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    inner.diagonal(dim1=1, dim2=2).add_((ridge * scale).unsqueeze(1))
    # A channel that is constant zero on the calibration images must not be amplified: λ pulls its weight towards the
    # dense one.
    dense = flat[:, :, entries]
    right = (flat @ outer + ridge * scale.view(-1, 1, 1) * dense).transpose(1, 2)  # (G, s, N/G)
    factor = torch.linalg.cholesky(inner)
    solved = torch.cholesky_solve(right, factor).transpose(1, 2)  # (G, N/G, s)
    shift = torch.zeros(groups, flat.shape[1], dtype=torch.float64, device=weight.device)
    if centred:
        mean = moments.mean.to(weight.device).double().unsqueeze(2)
        shift = (flat @ mean - solved @ mean[:, entries]).squeeze(2)
    shape = (weight.shape[0], len(stay), *weight.shape[2:])
    return solved.reshape(shape).to(weight.dtype), shift.reshape(-1).to(weight.dtype)


def _without_inputs(weight: Tensor, moments: Moments, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Returns an empty weight `(N, 0, k...)` and the layer's mean output `(N,)`, which its bias takes over."""
    groups = moments.gram.shape[0]
    flat = weight.reshape(groups, weight.shape[0] // groups, -1).double()  # (G, N/G, d)
    mean = moments.mean.to(weight.device).double().unsqueeze(2)  # (G, d, 1)
    shift = (flat @ mean).reshape(-1) if centred else weight.new_zeros(weight.shape[0])
    return weight[:, :0], shift.to(weight.dtype)


def entries_of(channels: Labels, kernel: int) -> Tensor:
    """Returns the positions in a patch, channel-major, of the given channels."""
    return torch.from_numpy((np.asarray(channels)[:, None] * kernel + np.arange(kernel)[None, :]).reshape(-1))
