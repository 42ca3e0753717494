"""How good a network is on a split.

Decides how many samples a forward pass takes, and how a network is scored. Must not know of policies or of training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from autoprune.network.data.samples import Split
from autoprune.network.data.staging import Device
from autoprune.network.data.tasks import Loss, Metric, check_task, cross_entropy, logits_of, one_number, widened
from autoprune.network.devices.device import ieee
from autoprune.network.devices.precision import autocast
from autoprune.network.graph.modules import mode

SCORED = 500
"""Samples of a forward pass without gradients, at most."""
SCORED_A_THREAD = 64
"""The same for each thread of a CPU."""
FEWEST_SCORED = 8
"""Samples of a forward pass on a CPU, at least, however large they are: with fewer the last layers of a ResNet-50 wait
for their weights."""
_NEAR = 32 << 20
"""Bytes of activations that each thread of a CPU makes at a time. Much larger tensors come from the system for each
layer and cleared page by page (see `autoprune.memory.LARGEST`), and are out of the caches when the next layer reads
them: on 128 images of 224 px MobileNetV2 takes 2.0 s with 8 at a time and 4.6 s with 125, on 64 ResNet-50 7.3 s and
8.5 s (64 at a time), on 512 images of 56 px a ViT-B/16 of 6 layers and width 192 10.7 s and 13.5 s (16 and 128; one
thread, AVX2)."""
WHOLE_BYTES = 2**30
"""Outputs of a split that an own metric sees at once, at most; above it is the mean over batches."""


@dataclass(frozen=True, slots=True)
class Score:
    """How a network did on `count` samples.

    `accuracy` is a fraction, or the user's own metric, in whatever range; `loss` the mean loss (NaN stays
    NaN); `per_class` the accuracy of each class (NaN where the samples hold none of it), empty under an own metric.
    `whole` says whether an own metric saw all samples at once; else it is the mean over batches.
    """

    accuracy: float
    loss: float
    count: int
    per_class: tuple[float, ...]
    whole: bool = True


def samples_at_once(device: Device, metric: Metric | None, sample_bytes: int = 0) -> int:
    """Returns the samples of a forward pass without gradients.

    On a CPU they are as many as keep activations near, where one sample makes `sample_bytes` of them at once (0: not
    known). An own metric gets as many as it can, since it need not be a mean.
    """
    if metric is not None or torch.device(device).type != "cpu":
        return SCORED
    threads = torch.get_num_threads()
    near = threads * _NEAR // max(1, sample_bytes)
    return min(SCORED, threads * SCORED_A_THREAD, max(FEWEST_SCORED, near))


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int | None = None,
    limit: int | None = None,
    device: Device = "cpu",
    autocast_dtype: torch.dtype | None = None,
    loss: Loss | None = None,
    metric: Metric | None = None,
) -> Score:
    """Scores `model` on `split` in evaluation mode, without gradients. The model is moved to `device`.

    Under an own metric nothing is assumed about what the network returns. It is computed once, from the outputs and
    targets of all samples: the area under a curve, say, is no mean of parts. Where these would take more than
    `WHOLE_BYTES`, or cannot be joined along their first dimension, it is the mean over batches of nearly the same size.

    Args:
        model: The network.
        split: The samples.
        batch_size: Samples a forward pass, at most; None: see `samples_at_once`.
        limit: Only the first `limit` samples of the stored order.
        device: Where it runs.
        autocast_dtype: Type of the forward pass; None: float32.
        loss: Own loss, the mean over a batch; None: cross-entropy. It and an own metric get the output in float32.
        metric: Own metric, higher is better, in place of the accuracy; None: top-1 accuracy.

    Raises:
        ValueError: There is no sample to score.
        InputError: The split has no classes, and an own loss or metric is missing; or one does not give one number.
    """
    check_task(split, loss=loss, metric=metric)
    if batch_size is None:
        batch_size = samples_at_once(device, metric)
    model.to(device)
    hits = torch.zeros(0 if metric is not None else split.num_classes, dtype=torch.int64, device=device)
    seen = torch.zeros_like(hits)
    total_loss = torch.zeros((), device=device)
    count = 0
    own: _OwnMetric | None = None
    if metric is not None:
        whole = len(split) if limit is None else min(limit, len(split))
        own, batch_size = _OwnMetric(metric, whole), _even(batch_size, whole)
    with torch.inference_mode(), mode(model, training=False), ieee(device):
        for x, y in split.batches(batch_size, device=device, limit=limit):
            with autocast(device, autocast_dtype):
                output = model(x)
            if loss is not None or metric is not None:
                output = widened(output)
            value = cross_entropy(output, y) if loss is None else one_number(loss(output, y), "loss")
            total_loss += value.to(total_loss) * len(y)
            if own is None:
                right = logits_of(output).argmax(1) == y  # (n,)
                seen.scatter_add_(0, y, torch.ones_like(y))
                hits.scatter_add_(0, y, right.long())
            else:
                own.update(output, y)
            count += len(y)
        if count == 0:
            raise ValueError(f"there is no sample to score (limit {limit})")
        if own is not None:
            return Score(own.value(), float(total_loss) / count, count, (), own.sees_all)
    per_class = hits.double() / seen  # 0 / 0 is NaN
    return Score(int(hits.sum()) / count, float(total_loss) / count, count, tuple(per_class.tolist()))


class _OwnMetric:
    """Gathers outputs and targets for an own metric, or its mean over batches where they are too much to hold."""

    def __init__(self, metric: Metric, count: int) -> None:
        self._metric, self._count = metric, count
        self._kept: list[tuple[Any, Tensor]] = []
        self._total, self._seen = 0.0, 0
        self.sees_all = True
        """Whether the metric is computed once, from all samples."""

    def update(self, output: Any, y: Tensor) -> None:
        """Takes what the network gave for a batch with the targets `y` `(n, ...)`."""
        if not self._seen and not self._kept:
            bytes_here = sum(leaf.nbytes for leaf in tree_leaves((output, y)) if isinstance(leaf, Tensor))
            self.sees_all = bytes_here / len(y) * self._count <= WHOLE_BYTES
        if self.sees_all:
            self._kept.append((output, y))
        else:
            self._add(output, y)

    def value(self) -> float:
        """Returns the metric of everything that was taken."""
        if self.sees_all:
            joined = _joined([output for output, _ in self._kept], [len(y) for _, y in self._kept])
            if joined is not None:
                return float(one_number(self._metric(joined[0], torch.cat([y for _, y in self._kept])), "metric"))
            self.sees_all = False
            for output, y in self._kept:
                self._add(output, y)
        return self._total / self._seen

    def _add(self, output: Any, y: Tensor) -> None:
        self._total += float(one_number(self._metric(output, y), "metric")) * len(y)
        self._seen += len(y)


def _joined(outputs: list[Any], sizes: list[int]) -> tuple[Any] | None:
    """Returns the outputs of several batches as that of one batch, in a tuple; None where they are not of one form:
    tensors whose first dimension is the batch, and otherwise alike.
    """
    if len(outputs) == 1:
        return (outputs[0],)
    flat = [tree_flatten(output) for output in outputs]
    if any(spec != flat[0][1] for _, spec in flat):
        return None
    leaves: list[Any] = []
    for parts in zip(*(found for found, _ in flat), strict=True):
        if not isinstance(parts[0], Tensor):
            if any(part is not parts[0] and part != parts[0] for part in parts):
                return None
            leaves.append(parts[0])
            continue
        rest = {(tuple(part.shape[1:]), part.dtype) for part in parts if part.dim()}
        if len(rest) != 1 or any(not part.dim() or len(part) != n for part, n in zip(parts, sizes, strict=True)):
            return None
        leaves.append(torch.cat(parts))
    return (tree_unflatten(leaves, flat[0][1]),)


def _even(batch_size: int, count: int) -> int:
    """Returns the size of the batches when `count` samples are dealt into as few as hold `batch_size` at most."""
    return math.ceil(count / math.ceil(count / batch_size)) if count and batch_size > 0 else batch_size
