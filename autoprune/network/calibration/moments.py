"""Calibration statistics: second moments of what every layer reads, gathered once a study on the dense network.

Decides which layers can be refitted, how their inputs are sampled, and what is kept of them. For a layer with input
patches `x` of `d` entries these are the mean of `x` and the Gram matrix, the mean of `x xᵀ`. Knows nothing of policies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

from autoprune.errors import DataError
from autoprune.network.calibration.layer_inputs import listening, multiplied, rows_of_site
from autoprune.network.calibration.patches import entries_at, laid_out, places_of
from autoprune.network.graph.groups import Links
from autoprune.network.graph.modules import evaluating
from autoprune.network.graph.network import Network

MAX_ENTRIES = 8192
"""Largest `d`: a Gram matrix of this size takes 256 MiB in float32. A layer above it is not refitted."""

PATCH_BYTES = 256 * 2**20
"""Bound on the patches that are held at once while moments are gathered; their Gram matrices are added up."""
_STRIPS_FROM = 256
"""Entries from which a Gram matrix is computed in strips."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of a layer's input: `gram` `(G, d, d)` and `mean` `(G, d)`, in float32, over `rows` patches.

    `G` is the number of convolution groups; `d` is input channels of one group times kernel elements, channel-major.
    """

    gram: Tensor
    mean: Tensor
    rows: int
    kernel: int

    def covariance(self) -> Tensor:
        """Returns the centred Gram matrix, `(G, d, d)`."""
        return self.gram - self.mean.unsqueeze(2) * self.mean.unsqueeze(1)


Statistics = dict[str, Moments]
"""Site (a module's path, or the rows of a parameter) → moments of its input."""


def refittable(network: Network) -> dict[str, Links]:
    """Returns the layers, by site, whose weights can be refitted when their inputs shrink.

    These are convolutions and linear layers that mix prunable channels: modules that are called, and parameters that
    another module multiplies (see `layer_inputs`).
    """
    modules = dict(network.model.named_modules())
    parts = multiplied(network)
    found: dict[str, Links] = {}
    for links in network.links:
        if links.inputs is None or links.layer.kind not in ("conv", "linear") or not (links.inputs >= 0).any():
            continue
        called = links.called and isinstance(modules.get(links.module), (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        if (called or links.site in parts) and entries_in(network, links) <= MAX_ENTRIES:
            found[links.site] = links
    return found


def entries_in(network: Network, links: Links) -> int:
    """Returns how many inputs an output of a layer has, kernel elements included."""
    return network.model.get_parameter(links.layer.weight)[0].numel()


def gather(
    network: Network,
    batches: Iterable[Tensor],
    *,
    max_rows: int = 65536,
    seed: int = 0,
    device: torch.device | str = "cpu",
    layers: Mapping[str, Links] | None = None,
    number: int | None = None,
) -> Statistics:
    """Runs `batches` of inputs `(B, ...)` through the dense network and returns the moments of every refittable layer.

    At most about `max_rows` patches a layer are used, drawn evenly over the batches. `layers` names other
    layers than the refittable ones, by site. Where the `number` of batches is given, one is held at a time.

    Raises:
        DataError: There is no batch, or an activation is not finite.
    """
    if number is None:
        batches = list(batches)
        number = len(batches)
    if not number:
        raise DataError("there are no calibration images")
    layers = refittable(network) if layers is None else layers
    modules = dict(network.model.named_modules())
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    share = -(-max_rows // number)

    def record(site: str, x: Tensor) -> None:
        for rows in _patches(modules.get(site), x, share, generator, most=PATCH_BYTES):  # (G, rows, d)
            gram = products(rows)
            total = rows.sum(1)
            if site in sums:
                old_gram, old_total, count = sums[site]
                sums[site] = (old_gram.add_(gram), old_total.add_(total), count + rows.shape[1])
            else:
                sums[site] = (gram, total, rows.shape[1])

    sites = {site: rows_of_site(network, links) if site not in modules else None for site, links in layers.items()}
    with listening(network.model, sites, record), evaluating(network.model), torch.no_grad():
        for batch in batches:
            network.model(batch.to(device))
    statistics: Statistics = {}
    for path, (gram, total, rows) in sums.items():
        module = modules.get(path)
        kernel = module.weight[0, 0].numel() if isinstance(module, nn.modules.conv._ConvNd) else 1
        moments = Moments(gram.div_(rows), total.div_(rows), rows, kernel)
        if not bool(torch.isfinite(moments.gram).all()):
            raise DataError(f"the input of {path} is not finite on the calibration images")
        statistics[path] = moments
    return statistics


def sample_patches(module: nn.Module | None, x: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Returns up to `limit` input patches of a layer as `(G, rows, d)` float32; without a module it is a linear one.

    Only the drawn patches are read, channel by channel where the input is channels-last in memory: unfolding the input
    and picking from it took five times as long.
    """
    return next(_patches(module, x, limit, generator))


def _patches(
    module: nn.Module | None, x: Tensor, limit: int, generator: torch.Generator, *, most: int | None = None
) -> Iterator[Tensor]:
    """Yields what `sample_patches` returns, in parts of at most `most` bytes where that is given."""
    x = x.detach()
    if module is None or isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])  # (B * ..., K)
        if rows.shape[0] > limit:
            rows = rows[torch.randperm(rows.shape[0], generator=generator)[:limit].to(x.device)]
        for part in torch.split(rows, len(rows) if most is None else max(1, most // (4 * x.shape[-1]))):
            yield part.float().unsqueeze(0)
        return
    assert isinstance(module, nn.modules.conv._ConvNd)
    x, geometry = laid_out(module, x)
    total = math.prod(geometry.sizes)
    drawn = torch.arange(total) if total <= limit else torch.randperm(total, generator=generator)[:limit]
    taps = math.prod(module.kernel_size)
    step = len(drawn) if most is None else max(1, most // (4 * x.shape[1] * taps))
    for part in torch.split(drawn.to(x.device), max(1, step)):
        picked = entries_at(x, places_of(geometry, part))  # (rows * taps, C)
        by_group = picked.view(len(part), taps, module.groups, x.shape[1] // module.groups).permute(2, 0, 3, 1)
        patches = torch.empty(
            by_group.shape, dtype=torch.float32, device=x.device
        )  # converted and laid out in one pass
        yield patches.copy_(by_group).flatten(2)  # (G, rows, d), channel-major


def products(rows: Tensor) -> Tensor:
    """Returns `xᵀ x` `(G, d, d)` of `rows` `(G, n, d)`.

    It is symmetric. One thread leaves it to NumPy, whose product of a matrix with itself is BLAS's `syrk`: 0.6 to 0.75
    of the time. Several threads would be one pool beside another: there, and on a GPU, strips of it leave out what lies
    below the diagonal, in 0.6 to 0.8 of the time.
    """
    size = rows.shape[2]
    if rows.device.type == "cpu" and torch.get_num_threads() == 1 and len(rows) == 1:
        with _blas().limit(limits=1, user_api="blas"):
            matrix = rows[0].numpy(force=True)
            return torch.from_numpy(matrix.T @ matrix).unsqueeze(0)
    if size < _STRIPS_FROM:
        return rows.transpose(1, 2) @ rows
    gram = rows.new_empty(rows.shape[0], size, size)
    step = -(-size // (4 if size < 8 * _STRIPS_FROM else 8))
    for start in range(0, size, step):
        stop = min(size, start + step)
        strip = rows[:, :, start:stop].transpose(1, 2) @ rows[:, :, start:]
        gram[:, start:stop, start:] = strip
        gram[:, stop:, start:stop] = strip[:, :, stop - start :].transpose(1, 2)
    return gram


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    return ThreadpoolController()
