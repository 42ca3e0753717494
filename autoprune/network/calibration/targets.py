"""Targets: the dense network's outputs at drawn positions, for refits to reproduce.

Decides which layers can be refitted, on how many images and positions, and within which memory. Knows nothing of a
pruned network.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from autoprune.network.calibration.layer_inputs import listening, multiplied, rows_of_site
from autoprune.network.calibration.moments import MAX_ENTRIES, Statistics, entries_in
from autoprune.network.calibration.patches import patch_rows, tap_major
from autoprune.network.graph.copies import channels_last
from autoprune.network.graph.groups import Links
from autoprune.network.graph.modules import device_of, evaluating
from autoprune.network.graph.network import Network

ROWS = 7168
"""Patches a layer is refitted on, at most.

Additive solutions at 0.3 and 0.4 of the MACs, three draws each, 5,000 images, with 8,192, 7,168 and 6,144 patches:
ResNet-20 75.5, 75.5 and 75.1 %, ResNet-56 82.2, 82.0 and 81.8 %; an eighth of them is an eighth of the refit's time.
"""
DEEP_ROWS = 8192
"""The same where a rung has its candidates repaired on more images: so many for as many images as are set aside."""
TARGET_BYTES = 512 * 2**20
"""Bound on the dense outputs that are kept for the refits; the number of patches shrinks to keep it."""
IMAGE_BYTES = 2 * 2**30
"""Bound on the activations of the one forward pass; the number of images shrinks to keep it."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The dense network's outputs that refits reproduce: site → `(G, N/G, rows)`, and the images behind them.

    A channel's outputs lie together, as candidates take some of the channels. `seed` drew the positions; a refit draws
    the same ones. `statistics` are moments of what the dense layers read, where these are to count too.
    """

    images: Tensor
    outputs: dict[str, Tensor]
    rows: int
    seed: int = 0
    statistics: Statistics = field(default_factory=dict)


def refittable_layers(network: Network) -> dict[str, Links]:
    """Returns every layer, by site, that mixes channels and whose weight is used once.

    It belongs to a module that is called, or is multiplied row by row by another module (see `layer_inputs`).
    """
    modules = dict(network.model.named_modules())
    # A depthwise layer mixes the positions of its kernel, which single weights can be masked of.
    kinds = ("conv", "linear") if not network.masked else ("conv", "linear", "depthwise")
    parts = {} if network.masked else multiplied(network)
    uses: dict[str, int] = {}
    for links in network.links:
        uses[links.layer.weight] = uses.get(links.layer.weight, 0) + 1
    found: dict[str, Links] = {}
    for links in network.links:
        plain = isinstance(modules.get(links.module), (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        called = plain and links.called and links.layer.kind in kinds and uses[links.layer.weight] == 1
        if (called or links.site in parts) and entries_in(network, links) <= MAX_ENTRIES:
            found[links.site] = links
    return found


def target_images(network: Network, count: int) -> int:
    """Returns how many of `count` images targets are gathered on, so that activations stay within `IMAGE_BYTES`."""
    memory = max(1, network.cost_model.dense()["activation_bytes"])
    return max(8, min(count, IMAGE_BYTES // memory))


def target_rows(network: Network, rows: int = ROWS) -> int:
    """Returns how many of `rows` positions a layer are kept, so that all layers' outputs stay within `TARGET_BYTES`."""
    outputs = sum(len(links.outputs) for links in refittable_layers(network).values())
    return max(512, min(rows, TARGET_BYTES // max(1, 4 * outputs)))


def gather_targets(network: Network, images: Tensor, *, rows: int = ROWS, seed: int = 0) -> Targets:
    """Runs `images` `(B, ...)` through the dense network and keeps what its layers give at drawn positions.

    Fewer images or rows are used where activations or targets would exceed `IMAGE_BYTES` or `TARGET_BYTES`. They are
    sent to where the network lies.
    """
    layers = refittable_layers(network)
    images = images[: target_images(network, len(images))].to(device_of(network.model))
    rows = target_rows(network, rows)
    modules = dict(network.model.named_modules())
    parts = {site: rows_of_site(network, links) for site, links in layers.items()}
    found: dict[str, Tensor] = {}

    def record(site: str, x: Tensor) -> None:
        weight, _ = parts[site].of(network.model)
        patches = patch_rows(modules.get(site), x, rows, seed).float()  # (G, rows, d)
        found[site] = (patches @ tap_major(weight, patches.shape[0]).float()).transpose(1, 2).contiguous()

    sites = {site: None if layers[site].called else part for site, part in parts.items()}
    with listening(network.model, sites, record), evaluating(network.model), torch.no_grad():
        network.model(arrange(network, images))
    return Targets(images, found, rows, seed)


def arrange(network: Network, x: Tensor) -> Tensor:
    """Returns images as they lie best: channels-last, where patches lie together, if the network runs so."""
    return channels_last(x) if network.channels_last else x.contiguous()
