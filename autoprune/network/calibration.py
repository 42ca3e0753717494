"""Calibration statistics: second moments of what every layer reads, gathered once a study on the dense network.

Decides which layers can be refitted, how their inputs are sampled, and what is kept of them. For a layer with input
patches `x` of `d` entries these are the mean of `x` and the Gram matrix, the mean of `x xᵀ`. Knows nothing of policies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.errors import DataError
from autoprune.network.groups import Links
from autoprune.network.trace import Network, evaluating

MAX_ENTRIES = 8192
"""Largest `d`: a Gram matrix of this size takes 256 MiB in float32. A layer above it is not refitted."""


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
"""Module path → moments of its input."""


def refittable(network: Network) -> dict[str, Links]:
    """Returns the layers, by module path, whose weights can be refitted when their inputs shrink.

    These are convolutions and linear layers that mix prunable channels, whose weight belongs to a module that is
    called.
    """
    modules = dict(network.model.named_modules())
    found: dict[str, Links] = {}
    for links in network.links:
        if links.inputs is None or links.layer.kind not in ("conv", "linear") or not (links.inputs >= 0).any():
            continue
        module = modules.get(links.module)
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            entries = module.weight[0].numel()
            if entries <= MAX_ENTRIES:
                found[links.module] = links
    return found


def gather(
    network: Network,
    batches: Iterable[Tensor],
    *,
    max_rows: int = 65536,
    seed: int = 0,
    device: torch.device | str = "cpu",
    layers: Mapping[str, Links] | None = None,
) -> Statistics:
    """Runs `batches` of inputs `(B, ...)` through the dense network and returns the moments of every refittable layer.

    At most about `max_rows` patches a layer are used, drawn evenly over the batches. `layers` names other
    layers than the refittable ones, by module path.

    Raises:
        DataError: There is no batch, or an activation is not finite.
    """
    inputs = [batch.to(device) for batch in batches]
    if not inputs:
        raise DataError("there are no calibration images")
    layers = refittable(network) if layers is None else layers
    modules = dict(network.model.named_modules())
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    share = -(-max_rows // len(inputs))

    def hook(path: str) -> object:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = sample_patches(module, args[0], share, generator)  # (G, rows, d)
            gram = rows.transpose(1, 2) @ rows
            total = rows.sum(1)
            if path in sums:
                old_gram, old_total, count = sums[path]
                sums[path] = (old_gram.add_(gram), old_total.add_(total), count + rows.shape[1])
            else:
                sums[path] = (gram, total, rows.shape[1])

        return modules[path].register_forward_pre_hook(record)

    handles = [hook(path) for path in layers]
    try:
        with evaluating(network.model), torch.no_grad():
            for batch in inputs:
                network.model(batch)
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
    statistics: Statistics = {}
    for path, (gram, total, rows) in sums.items():
        module = modules[path]
        kernel = module.weight[0, 0].numel() if isinstance(module, nn.modules.conv._ConvNd) else 1
        moments = Moments(gram / rows, total / rows, rows, kernel)
        if not bool(torch.isfinite(moments.gram).all()):
            raise DataError(f"the input of {path} is not finite on the calibration images")
        statistics[path] = moments
    return statistics


def sample_patches(module: nn.Module, x: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Returns up to `limit` input patches of a layer as `(G, rows, d)` float32."""
    x = x.detach().float()
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])  # (B * ..., K)
        if rows.shape[0] > limit:
            rows = rows[torch.randperm(rows.shape[0], generator=generator)[:limit].to(x.device)]
        return rows.unsqueeze(0)
    assert isinstance(module, nn.modules.conv._ConvNd)
    kernel = module.kernel_size
    rank = len(kernel)
    padding = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, padding, mode=mode)
    for axis in range(rank):
        window = (kernel[axis] - 1) * module.dilation[axis] + 1
        x = x.unfold(2 + axis, window, module.stride[axis])
    for axis in range(rank):
        if module.dilation[axis] > 1:
            taps = torch.arange(0, x.shape[2 + rank + axis], module.dilation[axis], device=x.device)
            x = x.index_select(2 + rank + axis, taps)
    # x: (B, C, out..., k...), a view; only the drawn positions are copied.
    space = x.shape[2 : 2 + rank]
    sizes = (x.shape[0], *space)
    total = int(torch.tensor(sizes).prod())
    drawn = torch.arange(total) if total <= limit else torch.randperm(total, generator=generator)[:limit]
    index = torch.unravel_index(drawn.to(x.device), sizes)
    order = (0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank))
    rows = x.permute(order)[index]  # (rows, C, k...)
    rows = rows.reshape(rows.shape[0], module.groups, -1)  # (rows, G, d)
    return rows.transpose(0, 1)
