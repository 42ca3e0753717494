"""The device at hand: its name, its threads, its arithmetic.

Decides which device is used where a space asks for `auto`, and that float32 products are what they say.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from autoprune.errors import InputError
from autoprune.network.data.staging import Device


def resolve_device(wanted: str) -> str:
    """Returns the device to run on; `auto` takes a GPU where there is one.

    Raises:
        InputError: A GPU was asked for and there is none.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(wanted.partition(":")[2] or 0)
        if index >= count:
            raise InputError(f"device {wanted!r} was asked for, and {count} CUDA devices are usable here")
    return wanted


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets the number of threads of CPU operators, and puts it back at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_name(device: Device) -> str:
    """Returns the name of a device: that of the GPU, else the kind of device."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def synchronise(device: Device) -> None:
    """Waits until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def ieee(device: Device) -> Iterator[None]:
    """Keeps float32 products what they are on a GPU, where convolutions otherwise run in TF32, with 10 bits for 23.

    There are two number formats, float32 and bfloat16, and a probe tells which is faster. TF32 would be a third one
    that nobody asked for: scores would differ from a CPU's in the third digit, and Gram matrices lose definiteness.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    operators: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    named = [operator.fp32_precision for operator in operators]
    if named == ["ieee"] * len(operators):  # within another one
        yield
        return
    before = _without_tf32()
    if before is None or any(operator.fp32_precision == "tf32" for operator in operators):
        # This process has used torch's newer names, which are refused beside the older ones or hold against them.
        for operator in operators:
            operator.fp32_precision = "ieee"
    try:
        yield
    finally:
        if before is not None:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
        for operator, precision in zip(operators, named, strict=True):
            operator.fp32_precision = precision


def _without_tf32() -> tuple[bool, bool] | None:
    """Forbids TF32 by torch's older names, which any code may then read, and returns what they were; None: they cannot
    be read in this process.
    """
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        before = products.allow_tf32, convolutions.allow_tf32
    except RuntimeError:
        return None
    products.allow_tf32 = convolutions.allow_tf32 = False
    return before
