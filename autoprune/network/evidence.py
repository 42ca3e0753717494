"""What criteria may look at: weights, calibration statistics, gradients, ranks of feature maps.

Decides how an index of a weight becomes a channel of a group. Knows nothing of policies or of any criterion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.errors import DataError
from autoprune.network.calibration import Statistics
from autoprune.network.convolutions import gradients_of, safe_convolutions
from autoprune.network.groups import Links, PruningGroup, positions_in
from autoprune.network.inverses import Inverse, Inverses
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
    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameter → `(weight * gradient)²`, each weight's by itself, summed like that and averaged over batches."""
    ranks: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Module path → mean rank of each input channel's feature map, for layers that read images."""
    inverses: Inverses = field(default_factory=Inverses, repr=False, compare=False)
    """Inverted moments that several criteria and tables share."""

    def uses(self, group: PruningGroup, kinds: Iterable[str]) -> list[Links]:
        """Returns the layers of the given kinds that produce (or normalise) the group's channels, each weight once."""
        found: dict[str, Links] = {}
        for links in self.network.links:
            if links.layer.kind in kinds and is_inside(links.outputs, group).any():
                found.setdefault(f"{links.layer.weight}:{links.layer.start}", links)
        return list(found.values())

    def consumers(self, group: PruningGroup) -> list[Links]:
        """Returns the refittable layers that read the group's channels and have statistics."""
        found: dict[str, Links] = {}
        for links in self.network.links:
            if links.inputs is not None and links.site in self.statistics and is_inside(links.inputs, group).any():
                found.setdefault(links.site, links)
        return list(found.values())

    def parameter(self, name: str) -> Tensor:
        """Returns a parameter of the dense model, detached."""
        return self.network.model.get_parameter(name).detach()

    def rows(self, links: Links) -> Tensor:
        """Returns the rows of a weight that a layer uses, detached, `(outputs, fan-in)` float64."""
        return rows_of(links, self.parameter(links.layer.weight))

    def inverse(self, links: Links, *, ridge: float) -> Inverse:
        """Returns the inverted moments of a consumer's input, which must not be changed. See `Inverses.of`."""
        return self.inverses.of(links, self.statistics[links.site], self.rows(links), ridge=ridge)


Criterion = Callable[[Evidence, PruningGroup], Scores]
PRODUCERS = ("conv", "transposed", "depthwise", "linear", "embedding", "recurrent", "computed", "product")


def is_inside(units: np.ndarray, group: PruningGroup) -> np.ndarray:
    """Returns which indices belong to a channel of the group: `units` `(n,)` or `(n, k)`, the result `(n,)`."""
    return positions_in(units, group) >= 0


def rows_of(links: Links, weight: Tensor) -> Tensor:
    """Returns the rows of the weight that a layer uses as `(outputs, fan-in)` double."""
    rows = weight.movedim(links.layer.out_dim, 0).reshape(weight.shape[links.layer.out_dim], -1).double()
    return rows[links.layer.start : links.layer.start + len(links.outputs)]


def by_unit(values: Tensor, units: np.ndarray, group: PruningGroup) -> Scores:
    """Adds up `values` `(m,)` of indices that belong to the same channel: `(n,)`."""
    positions = positions_in(units, group)
    inside = positions >= 0
    result = np.zeros(group.size)
    np.add.at(result, positions[inside], values.cpu().numpy()[inside])
    return result


def relative(scores: Scores) -> Scores:
    mean = float(scores.mean())
    return scores / mean if mean != 0 else np.ones_like(scores)  # a NaN stays one, for `score` to refuse


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


RANK_IMAGES = 16
RANK_SIZE = 32
"""Ranks are taken on so many images and on the middle of larger maps: an SVD takes the cube of the side."""


def gather_ranks(
    network: Network, images: Tensor, *, device: torch.device | str = "cpu", count: int = RANK_IMAGES
) -> dict[str, np.ndarray]:
    """Returns, for every layer that reads images `(B, C, H, W)`, the mean rank of each input channel's map `(C,)`."""
    modules = dict(network.model.named_modules())
    paths = {links.module for links in network.links if links.inputs is not None and (links.inputs >= 0).any()}
    found: dict[str, np.ndarray] = {}

    def hook(path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().float()
            if x.ndim == 4 and min(x.shape[2:]) > 1:
                h, w = (max(0, (n - RANK_SIZE) // 2) for n in x.shape[2:])
                maps = x[:, :, h : h + RANK_SIZE, w : w + RANK_SIZE]
                found[path] = torch.linalg.matrix_rank(maps).double().mean(0).cpu().numpy()

        return record

    handles = [modules[path].register_forward_pre_hook(hook(path)) for path in paths if path in modules]
    try:
        with evaluating(network.model), torch.no_grad():
            network.model(images[:count].to(device))
    finally:
        for handle in handles:
            handle.remove()
    return found
