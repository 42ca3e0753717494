"""Gradients that criteria look at: weight times gradient, and its square, of each output channel or each weight.

Decides how they are gathered on calibration batches. Knows nothing of any criterion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from autoprune.errors import DataError
from autoprune.network.devices.convolutions import gradients_of, safe_convolutions
from autoprune.network.graph.modules import evaluating
from autoprune.network.graph.network import Network
from autoprune.network.surgery.masks import mask_weights


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
    found: dict[str, list[Tensor]] = {}
    for name, product in _products(network, batches, loss, device=device):
        found.setdefault(name, []).append(product.sum(1).cpu())
    return {name: tuple(tensors) for name, tensors in found.items()}


def gather_fisher(
    network: Network,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Returns `(weight * gradient)²` summed over each output channel's weights and averaged over the batches, `(n,)`.

    Small batches bring it near to Fisher's diagonal, which squares the gradient of every sample by itself.

    Raises:
        DataError: There is no batch.
    """
    found: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for name, product in _products(network, batches, loss, device=device):
        squares = product.double().square().sum(1).cpu()
        found[name] = found[name] + squares if name in found else squares
        counts[name] = counts.get(name, 0) + 1
    return {name: total / counts[name] for name, total in found.items()}


def gather_weight_gradients(
    network: Network,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    device: torch.device | str = "cpu",
) -> dict[str, tuple[Tensor, ...]]:
    """Returns for every mask group's parameter the mean over batches of `(weight * gradient)²`, of the weight's shape.

    Raises:
        DataError: There is no batch.
    """
    names = [weight.parameter for weight in mask_weights(network).values()]
    parameters = [network.model.get_parameter(name) for name in names]
    trainable = [parameter.requires_grad for parameter in parameters]
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    count = 0
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with evaluating(network.model), torch.enable_grad():
            for x, y in batches:
                with safe_convolutions(network.model, device):
                    value = loss(network.model(x.to(device)), y.to(device))
                    gradients = gradients_of(value, parameters)
                for total, parameter, gradient in zip(sums, parameters, gradients, strict=True):
                    if gradient is not None:
                        total += (parameter.detach() * gradient).float().square()
                count += 1
    finally:
        for parameter, flag in zip(parameters, trainable, strict=True):
            parameter.requires_grad_(flag)
    if count == 0:
        raise DataError("there are no labelled calibration images")
    return {name: (total / count,) for name, total in zip(names, sums, strict=True)}


def _products(
    network: Network,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    device: torch.device | str,
) -> Iterator[tuple[str, Tensor]]:
    """Yields `weight * gradient` of every producer and norm as `(outputs, rest)`, for one batch after the other."""
    dims = {links.layer.weight: links.layer.out_dim for links in network.links}
    dims |= {links.layer.bias: 0 for links in network.links if links.layer.bias}
    parameters = {name: network.model.get_parameter(name) for name in dims if name}
    trainable = {name: p.requires_grad for name, p in parameters.items()}
    nothing = True
    try:
        for p in parameters.values():
            p.requires_grad_(True)
        with evaluating(network.model), torch.enable_grad():
            for x, y in batches:
                nothing = False
                with safe_convolutions(network.model, device):
                    value = loss(network.model(x.to(device)), y.to(device))
                    gradients = gradients_of(value, list(parameters.values()))
                for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
                    dim = dims[name]
                    product = (p.detach() * gradient) if gradient is not None else torch.zeros_like(p)
                    yield name, product.movedim(dim, 0).reshape(p.shape[dim], -1)
    finally:
        for name, p in parameters.items():
            p.requires_grad_(trainable[name])
    if nothing:
        raise DataError("there are no labelled calibration images")
