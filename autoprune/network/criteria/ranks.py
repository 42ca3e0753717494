"""Ranks of feature maps on a few images, for the criterion that looks at them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.network.graph.modules import evaluating
from autoprune.network.graph.network import Network

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
