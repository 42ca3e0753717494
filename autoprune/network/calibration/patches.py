"""What a layer reads at drawn positions, for refits: fast, because a candidate's pruned layers are read once each.

Decides which positions are drawn, in which order the entries of a patch lie, and what is remembered between candidates:
all candidates draw the same positions, so where they lie in memory is worked out once for each geometry of a layer.
Entries are tap-major (every input channel of the first element of the kernel, then of the second, ...), as they lie
in channels-last memory; `moments` has them channel-major, as weights do. Knows nothing of what is solved with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

_GEOMETRIES = 32
"""Geometries whose positions are remembered: at 4,096 patches of 9 elements each takes 0.3 MB."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """What decides where the patches of a convolution's input lie; one number an axis but for `batch`."""

    batch: int
    space: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch and the convolution's output size."""
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        sides = zip(self.space, self.before, self.after, spans, self.stride, strict=True)
        return (self.batch, *((n + b + a - span) // s + 1 for n, b, a, span, s in sides))


@dataclass(frozen=True, slots=True)
class Places:
    """Where patches lie in an input `(B * space, C)`: `index` `(rows * taps,)`, and which of these are `outside`."""

    index: Tensor
    outside: Tensor


def patch_rows(module: nn.Module | None, x: Tensor, limit: int, seed: int) -> Tensor:
    """Returns up to `limit` input patches of a layer as `(G, rows, taps * C/G)`, in the type of `x`.

    Without a module it is a linear layer. The same seed draws the same positions, whatever the
    number of channels, and fewer are the first of more.
    """
    x = x.detach()
    if module is None or isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])  # (B * ..., K)
        return rows.index_select(0, drawn(rows.shape[0], limit, seed).to(x.device)).unsqueeze(0)
    assert isinstance(module, nn.modules.conv._ConvNd)
    x, geometry = laid_out(module, x)
    picked = entries_at(x, _places(geometry, limit, seed, x.device))
    taps, groups = math.prod(module.kernel_size), module.groups
    if groups == 1:
        return picked.view(1, -1, taps * x.shape[1])
    by_group = picked.view(-1, taps, groups, x.shape[1] // groups).permute(2, 0, 1, 3)
    return by_group.flatten(2)


def laid_out(module: nn.modules.conv._ConvNd, x: Tensor) -> tuple[Tensor, Geometry]:
    """Returns a convolution's input, padded where that is not by zeros, and where its patches lie in it."""
    rank = len(module.kernel_size)
    before = module._reversed_padding_repeated_twice[2 * rank - 2 :: -2]
    after = module._reversed_padding_repeated_twice[2 * rank - 1 :: -2]
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        before, after = [0] * rank, [0] * rank
    sides = (x.shape[2:], module.kernel_size, module.stride, module.dilation, before, after)
    return x, Geometry(x.shape[0], *(tuple(side) for side in sides))


def entries_at(x: Tensor, places: Places) -> Tensor:
    """Returns what an input `(B, C, space...)` holds at places, `(rows * taps, C)`; zeros outside."""
    picked = x.movedim(1, -1).reshape(-1, x.shape[1]).index_select(0, places.index)
    return picked.index_fill_(0, places.outside, 0.0)


def tap_major(weight: Tensor, groups: int) -> Tensor:
    """Returns a layer's weight `(N, C/G, k...)` as `(G, taps * C/G, N/G)`, its entries in the order of patches."""
    flat = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)  # (G, N/G, C/G, taps)
    return flat.permute(0, 3, 2, 1).flatten(1, 2)


def tap_entries(channels: np.ndarray, taps: int) -> Tensor:
    """Returns where the entries of `channels` lie in a channel-major patch of `taps` elements, in tap-major order."""
    return torch.from_numpy((np.asarray(channels)[None, :] * taps + np.arange(taps)[:, None]).reshape(-1))


def weight_of(solved: Tensor, shape: torch.Size) -> Tensor:
    """Returns what `tap_major` made of a weight, in its `shape` again."""
    groups, outputs = solved.shape[0], solved.shape[2]
    parts = solved.reshape(groups, -1, shape[1], outputs)  # (G, taps, C/G, N/G)
    return parts.permute(0, 3, 2, 1).reshape(shape)


def drawn(total: int, limit: int, seed: int) -> Tensor:
    """Returns up to `limit` of `total` positions; fewer of them are the first of more."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit]


@lru_cache(maxsize=_GEOMETRIES)
def _places(geometry: Geometry, limit: int, seed: int, device: torch.device) -> Places:
    found = places_of(geometry, drawn(math.prod(geometry.sizes), limit, seed))
    return Places(found.index.to(device), found.outside.to(device))


def places_of(geometry: Geometry, positions: Tensor) -> Places:
    """Returns where the patches of a convolution's outputs lie, which are numbered over the batch and its output."""
    place = torch.unravel_index(positions, geometry.sizes)
    index = place[0].unsqueeze(1)  # (rows, taps): positions in the flattened batch and space
    inside = torch.ones_like(index, dtype=torch.bool)
    for axis, space in enumerate(geometry.space):
        taps = torch.arange(geometry.kernel[axis], device=index.device) * geometry.dilation[axis]
        at = (place[1 + axis] * geometry.stride[axis] - geometry.before[axis]).unsqueeze(1) + taps  # (rows, k)
        inside = (inside.unsqueeze(2) & ((at >= 0) & (at < space)).unsqueeze(1)).flatten(1)
        at = at.clamp(0, space - 1)
        index = (index.unsqueeze(2) * space + at.unsqueeze(1)).flatten(1)
    return Places(index.flatten().contiguous(), (~inside).flatten().nonzero().squeeze(1))
