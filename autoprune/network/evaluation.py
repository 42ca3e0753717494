"""How good and how fast a network is.

Decides what a task needs to be scored, how a network is scored on a split, and how BatchNorm statistics are
recalibrated. Must not know of policies or of training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from autoprune.errors import InputError
from autoprune.network.samples import Device, Split
from autoprune.network.timing import ieee

Loss = Callable[[Any, Tensor], Tensor]
"""A function of (what the network returns, targets) that gives the mean over the batch, a scalar tensor."""

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

Metric = Callable[[Any, Tensor], Tensor | float]
"""A function of (what the network returns, targets) of a whole split that gives one number; higher is better."""
WHOLE_BYTES = 2**30
"""Outputs of a split that an own metric sees at once, at most; above it is the mean over batches."""


class Labelled(Protocol):
    """Data that knows how many classes it has: `Splits`, and any `Split` of them."""

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where the targets are no classes."""
        ...


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


@dataclass(frozen=True, slots=True)
class Precision:
    """The number format in which a network runs: an autocast type (None: float32) and the memory format of images."""

    autocast_dtype: torch.dtype | None = None
    channels_last: bool = True

    def arrange(self, value: Tensor) -> Tensor:
        """Returns a 4-D tensor of real numbers in this memory format; any other tensor as it is."""
        if value.dim() != 4 or not value.is_floating_point():
            return value
        return value.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def arrange_model(self, model: nn.Module) -> None:
        """Brings the weights of `model` into this memory format, in place; their values stay."""
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = self.arrange(parameter.data)


def autocast(device: Device, dtype: torch.dtype | None) -> torch.autocast:
    """Returns the context in which a forward pass runs in `dtype`; None: in float32."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def logits_of(output: Any) -> Tensor:
    """Returns the logits `(N, classes)` of what a network returned.

    They are the tensor itself, what is named `logits` in an object or a dict, or the first element of a tuple.

    Raises:
        TypeError: It is none of these.
    """
    found = output if isinstance(output, Tensor) else _named_logits(output)
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(f"the network returned {type(output).__name__}, in which there are no logits")
    return found


def _named_logits(output: Any) -> Any:
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)


def first_tensor(output: Any) -> Tensor:
    """Returns the tensor that stands for what a network returned, where it need not be logits.

    It is the logits where they have that name, else the first tensor of real numbers in a tuple or a dict, however
    deep.

    Raises:
        TypeError: There is none.
    """
    found = _first_tensor(output)
    if found is None:
        raise TypeError(f"the network returned {type(output).__name__}, in which there is no tensor of real numbers")
    return found


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    named = _named_logits(output)
    if isinstance(named, Tensor):
        return named
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((found for found in map(_first_tensor, parts) if found is not None), None)


def widened(output: Any) -> Any:
    """Returns `output` with its real numbers in float32, within tuples, lists and dicts too; anything else as it is.

    An own loss gets this: many losses cannot be differentiated where output and target differ in type.
    """
    if isinstance(output, Tensor):
        return output.float() if output.is_floating_point() else output
    if isinstance(output, dict):
        twin = copy.copy(output)  # keeps the class of a dict that has attributes too
        for key, value in output.items():
            twin[key] = widened(value)
        return twin
    if isinstance(output, tuple | list):
        values = [widened(value) for value in output]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    return output


def check_task(data: Labelled, *, loss: Loss | None, metric: Metric | None) -> None:
    """Refuses data without classes where the loss or the metric would be that of classes.

    Raises:
        InputError: The data has no classes, and an own loss or an own metric is missing.
    """
    if data.num_classes:
        return
    missing = [name for name, function in (("loss", loss), ("metric", metric)) if function is None]
    if missing:
        raise InputError(
            "the targets are no classes (whole numbers from 0 up, of shape (N,)), so both a loss and a metric of your "
            f"own are needed: there is no {' and no '.join(missing)}"
        )


def check_output(output: Any, classes: int, *, loss: Loss | None, metric: Metric | None) -> None:
    """Refuses an output that would be scored as classes and is none: boxes, one logit, a map.

    Args:
        output: What the network gave for some samples.
        classes: Number of classes in the data; 0: the targets are none.
        loss: Own loss; None: cross-entropy of the output.
        metric: Own metric; None: the accuracy of the largest output.

    Raises:
        InputError: The output is not one number for each class.
    """
    if not classes or (loss is not None and metric is not None):
        return
    own = "or give both a `loss` and a `metric` of your own"
    try:
        logits = logits_of(output)
    except TypeError as error:
        raise InputError(f"{error}: return them as a tensor (N, {classes}) or by the name `logits`, {own}") from error
    shape = tuple(logits.shape)
    if len(shape) == 2 and shape[1] == classes:
        return
    among = "" if isinstance(output, Tensor) else ", the first of its outputs,"
    found = f"the network gives {shape[1]} numbers" if len(shape) == 2 else f"the network's output{among} has the shape"
    found += f" a sample{among}" if len(shape) == 2 else f" {shape}"
    if shape[1:] == (1,) and classes == 2:
        remedy = "let it give two logits, one for each class"
    elif not isinstance(output, Tensor):
        remedy = f"return the logits (N, {classes}) first, or by the name `logits`"
    else:
        remedy = f"classes are numbered from 0 to the largest that occurs: let it give {classes} logits a sample"
    raise InputError(f"{found}, but the data has {classes} classes: {remedy}, {own}")


def one_number(value: Any, what: str) -> Tensor:
    """Returns what an own function gave, a `loss` or a `metric`, as a scalar tensor.

    Raises:
        InputError: It is not one number.
    """
    number = torch.as_tensor(value)
    if number.numel() != 1:
        mean = " a batch, its mean" if what == "loss" else ""
        raise InputError(f"the {what} must be one number{mean}, not a tensor of shape {tuple(number.shape)}")
    return number.reshape(())


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


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Puts `model` into training or evaluation mode, and each of its modules back into its own at the end."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


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
            value = (
                F.cross_entropy(logits_of(output).float(), y) if loss is None else one_number(loss(output, y), "loss")
            )
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


def recalibrate(
    model: nn.Module, split: Split, *, batches: int = 10, batch_size: int = 128, device: Device = "cpu", seed: int = 0
) -> None:
    """Re-estimates the BatchNorm statistics of `model`, in place: the plain average over `batches` batches of `split`.

    Gradients, weights and every other module stay as they are; a network without BatchNorm is left alone. At most one
    pass over `split` is made, and a last batch that is smaller than the others is left out, as it would weigh too much.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms or batches < 1:
        return
    model.to(device)
    batch_size = min(batch_size, len(split))
    momenta = [norm.momentum for norm in norms]
    order = Generator().manual_seed(seed)
    calls = dict.fromkeys(norms, 0)

    def average(norm: nn.Module, args: tuple[Any, ...]) -> None:
        # What a momentum of None does, but for reading the number of calls back from the device at each of them.
        assert isinstance(norm, _BatchNorm)
        calls[norm] += 1
        norm.momentum = 1.0 / calls[norm]

    handles = [norm.register_forward_pre_hook(average) for norm in norms]
    with torch.no_grad(), mode(model, training=False), ieee(device):
        for norm in norms:
            norm.reset_running_stats()
            norm.training = True
        try:
            for number, (x, _) in enumerate(split.batches(batch_size, shuffle=order, device=device)):
                if number >= batches or len(x) < batch_size:
                    break
                model(x)
        finally:
            for norm, momentum, handle in zip(norms, momenta, handles, strict=True):
                norm.momentum = momentum
                handle.remove()
