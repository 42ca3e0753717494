"""Compensation under masks: the weights that stay are refitted so that the layer gives the dense layer's output.

Decides the solver. For one output with weights `w` on the support of its mask this is the least-squares problem
`min (w - v) A (w - v)ᵀ` with the second moments `A` of the layer's input, whose normal equations `A_SS w = (A v)_S`
differ from output to output. All outputs are solved together by conjugate gradients that never leave the mask: two
products a step instead of a factorisation an output. Knows nothing of how the mask was chosen.

We chose this over SparseGPT's sweep through the columns because at the same masks it loses less: ResNet-20 / CIFAR-10
(JPEG copy, dense 88.0 %, 2,000 images, uniform magnitude masks of 70 %, batch norms recalibrated, no fine-tuning)
85.8 % instead of 79.7 %; with the masks that the sweep picks itself it reaches 81.4 %.

Source: the sweep is that of Frantar & Alistarh, SparseGPT, ICML 2023; the problem that of Hassibi & Stork, NIPS 1992.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoprune.network.calibration.moments import Moments, Statistics
from autoprune.network.graph.groups import Links
from autoprune.network.graph.network import Network
from autoprune.network.repair.compensation import layer_moments
from autoprune.network.surgery.masks import mask_tensors
from autoprune.network.surgery.selection import Selection

STEPS = 100
_TOLERANCE = 1e-4
_ASKED = 10
"""Steps on a GPU between two looks at whether they suffice."""


def masked_solve(matrix: Tensor, right: Tensor, mask: Tensor, start: Tensor, *, steps: int = STEPS) -> Tensor:
    """Returns `X` `(G, s, n)` that is zero where `mask` is false and solves `(matrix X)_S = right_S` on each column.

    Conjugate gradients, scaled by the diagonal; they end early once the residual has fallen by four digits.

    Args:
        matrix: `(G, s, s)`, symmetric and positive definite.
        right: `(G, s, n)`.
        mask: `(G, s, n)`, a column's support.
        start: `(G, s, n)`, where to start from.
        steps: Steps at most.
    """
    every = 1 if matrix.device.type == "cpu" else _ASKED  # on a GPU the host would wait for every step
    support = mask.to(matrix.dtype)
    scale = matrix.diagonal(dim1=1, dim2=2).unsqueeze(2)  # (G, s, 1)
    found = start * support
    rest = (right - matrix @ found) * support
    scaled = rest / scale
    direction = scaled
    power = (rest * scaled).sum(1, keepdim=True)  # (G, 1, n)
    goal = _TOLERANCE**2 * (right * support / scale * right).sum(1, keepdim=True)
    for step in range(steps):
        if step % every == 0 and bool((power <= goal).all()):
            break
        moved = (matrix @ direction) * support
        curve = (direction * moved).sum(1, keepdim=True)
        length = torch.where(curve > 0, power / curve.clamp_min(1e-30), 0.0)
        found = found + length * direction
        rest = rest - length * moved
        scaled = rest / scale
        after = (rest * scaled).sum(1, keepdim=True)
        direction = scaled + torch.where(power > 0, after / power.clamp_min(1e-30), 0.0) * direction
        power = after
    return found


def refit_masked(
    weight: Tensor,
    moments: Moments,
    links: Links,
    mask: Tensor,
    *,
    ridge: float,
    recalibrated: bool,
    steps: int = STEPS,
) -> Tensor:
    """Returns the weight, of its own shape, that is zero outside `mask` and nearest to the dense layer's output.

    Args:
        weight: The dense weight `(N, C/G, k...)`.
        moments: Of the dense layer's input.
        links: The layer.
        mask: Of the weight's shape.
        ridge: Relative to the mean of the diagonal of the moments.
        recalibrated: Whether batch norm statistics are re-estimated afterwards; they then absorb constant shifts.
        steps: Steps of the solver at most.
    """
    matrix = layer_moments(moments, links, recalibrated=recalibrated).to(weight.device)
    groups, d = matrix.shape[0], matrix.shape[1]
    dense = weight.detach().float().reshape(groups, -1, d).transpose(1, 2)  # (G, d, N/G)
    support = mask.to(weight.device).reshape(groups, -1, d).transpose(1, 2)
    strength = ridge * matrix.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    matrix = matrix + torch.diag_embed(strength.unsqueeze(1).expand(groups, d))
    solved = masked_solve(matrix, matrix @ dense, support, dense, steps=steps)
    return solved.transpose(1, 2).reshape(weight.shape).to(weight.dtype)


def compensate_masked(
    network: Network,
    model: nn.Module,
    selection: Selection,
    statistics: Statistics,
    *,
    ridge: float = 1e-3,
    recalibrated: bool = True,
) -> None:
    """Gives the masked `model` its refitted weights and biases, in place, as if every layer read what it read before.

    Args:
        network: The traced dense network.
        model: Its masked copy.
        selection: The weights that stay.
        statistics: Moments of the dense layers' inputs; a layer without them keeps its weights.
        ridge: Relative to the mean of the diagonal of the moments.
        recalibrated: Whether batch norm statistics are re-estimated afterwards.
    """
    masks = mask_tensors(network, selection)
    state = dict(model.named_parameters(remove_duplicate=False))
    for links in network.links:
        name, moments = links.layer.weight, statistics.get(links.module)
        if name not in masks or moments is None:
            continue
        weight = network.model.get_parameter(name).detach()
        refitted = refit_masked(weight, moments, links, masks[name], ridge=ridge, recalibrated=recalibrated)
        with torch.no_grad():
            state[name].copy_(refitted)
            if links.layer.bias is not None:
                groups = moments.mean.shape[0]
                gone = (weight - refitted).reshape(groups, -1, moments.mean.shape[1])  # (G, N/G, d)
                shift = (gone.float() @ moments.mean.to(weight.device).unsqueeze(2)).reshape(-1)
                bias = network.model.get_parameter(links.layer.bias).detach()
                state[links.layer.bias].copy_(bias + shift.to(bias.dtype))
