"""Tasks: what a loss and a metric are given, and what stands for a network's output.

Decides what a task needs to be scored. Knows nothing of how a network is run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from autoprune.errors import InputError

Loss = Callable[[Any, Tensor], Tensor]
"""A function of (what the network returns, targets) that gives the mean over the batch, a scalar tensor."""
Metric = Callable[[Any, Tensor], Tensor | float]
"""A function of (what the network returns, targets) of a whole split that gives one number; higher is better."""


class Labelled(Protocol):
    """Data that knows how many classes it has: `Splits`, and any `Split` of them."""

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where the targets are no classes."""
        ...


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


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    """Returns the mean loss of a batch of classes, in float32: what is meant where there is no own loss."""
    return F.cross_entropy(logits_of(output).float(), target)


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
