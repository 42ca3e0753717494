"""Sequential compensation: one forward pass that refits every layer to what it really reads, and recalibrates.

Decides how a pruned network is repaired as a whole. The cached refit (`compensation`) takes the dense network's inputs
for granted; in truth every layer reads what the layers before it have become. Here the calibration images run once
through the pruned network. Just before a layer runs, its weight is refitted so that from its actual input `X'` it
reproduces the dense layer's output `Y` at the same positions. Where the moments `C` of the dense layer's input are at
hand, what it would do on that input counts too, with the weight μ, and no cached refit is needed before:
`W' = (Y X'ᵀ + μ W C[:,S] + λW)(X' X'ᵀ + μ C[S,S] + λI)⁻¹`. Batch norms then see the refitted output and take its
statistics.

We chose this over the cached refit because on ResNet-20 / CIFAR-10 (JPEG copy, test half, no fine-tuning, same widths)
it gives 85.7 / 78.4 / 66.3 % instead of 85.2 / 76.1 / 58.2 % at 0.70 / 0.50 / 0.35 of the MACs, for about one second
more a candidate on one core.

Source: the asymmetric reconstruction of Zhang et al., Accelerating Very Deep Convolutional Networks, TPAMI 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.network.calibration.layer_inputs import listening, rows_of_site
from autoprune.network.calibration.moments import Moments, products
from autoprune.network.calibration.patches import patch_rows, tap_entries, tap_major, weight_of
from autoprune.network.calibration.targets import Targets, arrange, refittable_layers
from autoprune.network.devices.precision import autocast
from autoprune.network.graph.labels import Labels
from autoprune.network.graph.modules import evaluating
from autoprune.network.graph.network import Network
from autoprune.network.repair.masked_compensation import masked_solve
from autoprune.network.surgery.cut import row_factors
from autoprune.network.surgery.selection import Selection, kept_indices, unit_mask
from autoprune.network.surgery.stand_ins import emptied, set_constant

WIDE = 432
"""Entries of a patch from which a layer is refitted on fewer of the patches, in inverse proportion, down to a half.

ResNet-20, six policies from 0.65 to 0.35 of the MACs, 2,000 images, against 8,192 patches for every layer: from
288 entries on, a candidate takes 0.1 s less of 1.7 s and loses 0.4 points; from 144 on and down to a quarter, twice
that and 1.7 points. Half of the 512 images, with as many patches, would lose 2 points.
"""
DENSE_ROWS = 2500
"""The dense layer's own moments (of 65,536 patches, gathered once) count as so many patches, or as all that are drawn.

They steady the solution: 4,096 patches without them lose 0.5 to 1.2 points. Anything from 2,500 to 8,192 does.
"""
_STILL = 1e-6
"""Variance of an entry, relative to its squared mean, below which the rounding of its mean matters."""


def refit_sequentially(
    network: Network,
    model: nn.Module,
    selection: Selection,
    targets: Targets,
    *,
    ridge: float = 1e-3,
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    """Refits the layers of the pruned `model`, in place, and takes its batch norms' statistics, in one forward pass.

    The pass runs in the type of the autocast context that it is called in; the refits are solved in float32 and double
    whatever that is.

    Args:
        network: The traced dense network that `model` was cut from.
        model: The pruned network; its weights are the starting point that the ridge pulls towards.
        selection: The channels that stayed.
        targets: What `gather_targets` found.
        ridge: λ relative to the mean of the diagonal of `X' X'ᵀ`.
        masks: Parameter → boolean tensor of its shape; what is false in it is zero and stays so.
    """
    kept = unit_mask(network, selection)
    layers = refittable_layers(network)
    modules = dict(model.named_modules())
    scales = row_factors(network, kept)
    dense = {site: rows_of_site(network, layers[site]) for site in targets.outputs}
    parts = {site: rows_of_site(network, layers[site], kept) for site in targets.outputs}

    def heard(site: str, x: Tensor) -> None:
        with autocast(x.device, None):
            refit_site(site, x)

    def refit_site(site: str, x: Tensor) -> None:
        links, module = layers[site], modules.get(site)
        wanted = targets.outputs[site]  # (G, N/G, rows)
        index = torch.from_numpy(kept_indices(links.outputs, kept)).to(wanted.device)
        groups, per_group, _ = wanted.shape
        if len(index) < per_group * groups:
            # Groups of a convolution shrink alike, so the first group's positions serve all.
            wanted = wanted.index_select(1, index[: len(index) // groups] % per_group)
        weight, shift = parts[site].of(model)
        whole, bias = dense[site].of(network.model)
        bias = None if bias is None else bias.index_select(0, index)
        scale = scales.get(links.layer.weight)
        if scale is not None:  # the queries of an attention are wanted in the scale of their new width
            scale = scale[parts[site].start : parts[site].start + len(index)]
            wanted = wanted * scale.to(wanted).view(groups, -1, 1)
            bias = None if bias is None else bias * scale.to(bias)
        if module is not None and emptied(module):
            if bias is not None:
                set_constant(module, bias + wanted.mean(2).reshape(-1))
            return
        centred = links.layer.normalised or bias is not None
        fit = _equations(module, x, weight, wanted, targets, centred=centred)
        if site in targets.statistics:
            assert links.inputs is not None  # moments are those of layers that mix prunable channels
            stay, flat = kept_indices(links.inputs, kept), whole.index_select(0, index).float()
            flat = flat if scale is None else flat * scale.to(flat).view(-1, *[1] * (flat.ndim - 1))
            _add_moments(fit, targets.statistics[site], stay, flat)
        mask = masks.get(links.layer.weight) if masks is not None else None
        solved = _solved(weight, fit, ridge=ridge, mask=mask)
        if solved is not None:
            weight.copy_(solved[0])
            if bias is not None and shift is not None:
                shift.copy_(bias + solved[1])

    sites = {site: None if layers[site].called else part for site, part in parts.items()}
    with listening(model, sites, heard):
        _run_collecting(model, lambda: model(arrange(network, targets.images)))


@dataclass(frozen=True, slots=True)
class _Equations:
    """Normal equations `gram W = cross` of a layer over `rows` patches, in double, entries tap-major; and the
    means that were taken off where they are `centred`.

    `gram` `(G, s, s)`, `cross` `(G, s, n)`, `mean_in` `(G, 1, s)`, `mean_out` `(G, 1, n)`.
    """

    gram: Tensor
    cross: Tensor
    mean_in: Tensor
    mean_out: Tensor
    rows: int
    centred: bool


def _equations(
    module: nn.Module | None, x: Tensor, weight: Tensor, wanted: Tensor, targets: Targets, *, centred: bool
) -> _Equations:
    """Returns the equations of a layer's `weight` from its actual input and its wanted outputs `(G, n, rows)`."""
    share = min(1.0, max(0.5, WIDE / weight[0].numel()))
    rows = min(wanted.shape[2], math.ceil(share * targets.rows))
    wanted = wanted[:, :, :rows]  # the first of positions that are drawn at random are a random sample too
    inputs = patch_rows(module, x, rows, targets.seed).float()  # (G, rows, s), its own
    mean_in, mean_out = inputs.mean(1, keepdim=True), wanted.mean(2).unsqueeze(1)
    if not centred:
        mean_in, mean_out = torch.zeros_like(mean_in), torch.zeros_like(mean_out)
    else:
        inputs.sub_(mean_in)
    gram = (products(inputs) / rows).double()
    cross = (wanted @ inputs).transpose(1, 2)  # of centred inputs: the means of what is wanted add nothing
    if inputs.is_cuda or bool((gram.diagonal(dim1=1, dim2=2) < _STILL * mean_in.squeeze(1).square()).any()):
        cross = cross - inputs.sum(1).unsqueeze(2) * mean_out  # but for what rounding leaves of them
    cross = cross.double() / rows
    return _Equations(gram, cross, mean_in, mean_out, rows, centred)


def _add_moments(fit: _Equations, moments: Moments, stay: Labels, dense: Tensor) -> None:
    """Adds the equations of what the `dense` rows `(n, C/G, k...)` read, of which the channels `stay`, in place."""
    entries = tap_entries(stay, moments.kernel).to(fit.gram.device)
    flat = dense.reshape(fit.gram.shape[0], -1, moments.gram.shape[1])  # (G, n/G, d)
    matrix = moments.gram.to(fit.gram.device)[:, entries]  # (G, s, d)
    if fit.centred:
        mean = moments.mean.to(matrix.device)
        matrix = matrix - mean[:, entries].unsqueeze(2) * mean.unsqueeze(1)
    weight = min(1.0, DENSE_ROWS / fit.rows)
    fit.gram.add_(matrix[:, :, entries].double(), alpha=weight)
    fit.cross.add_((matrix @ flat.transpose(1, 2)).double(), alpha=weight)


def _solved(weight: Tensor, fit: _Equations, *, ridge: float, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Returns a layer's new weight and the shift `(N,)` of its bias; None where its equations have no solution."""
    groups = fit.gram.shape[0]
    strength = ridge * fit.gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12).view(-1, 1, 1)
    start = tap_major(weight, groups).double()  # (G, s, n)
    gram, right = fit.gram, fit.cross + strength * start
    gram.diagonal(dim1=1, dim2=2).add_(strength.view(-1, 1))
    if not bool(torch.isfinite(right).all()):
        return None  # degenerate inputs (a dead layer): the weight that it came with is kept
    if mask is not None:
        solved = masked_solve(gram, right, tap_major(mask.to(right.device), groups), start)
    else:
        factor, failed = torch.linalg.cholesky_ex(gram)
        if bool(failed.any()):
            return None
        solved = torch.cholesky_solve(right, factor)
    shift = fit.mean_out - fit.mean_in @ solved.to(fit.mean_in.dtype)  # (G, 1, n)
    return weight_of(solved, weight.shape).to(weight.dtype), shift.reshape(-1)


def _run_collecting(model: nn.Module, run: Callable[[], object]) -> None:
    """Runs the model in eval mode but for its batch norms, which take the statistics of this very pass."""
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    momenta = [norm.momentum for norm in norms]
    with evaluating(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.training = True
        try:
            run()
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
