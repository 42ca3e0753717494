"""Tells apart the ways in which an evaluation fails, and says in one line what happened.

Decides which errors mean that memory ran out. Must not know what is done about it.
"""

from __future__ import annotations

import errno
import gc
import re
import traceback
from contextlib import suppress

import torch

_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|_STATUS_ALLOC_FAILED"
    r"|unable to find an engine",  # cuDNN's words where no kernel's workspace has room
    re.IGNORECASE,
)
_LENGTH = 300


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that no memory could be had, on whatever device: some say so by their words alone."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _MEMORY.search(str(error)) is not None


def free_memory(device: str) -> None:
    """Gives back what a failed evaluation held: tensors may lie in reference cycles, and CUDA keeps what is free."""
    gc.collect()
    if torch.device(device).type == "cuda":
        with suppress(RuntimeError):  # torch 2.11 refuses where a capture has failed before
            torch.cuda.empty_cache()


def described(error: BaseException) -> str:
    """Returns kind, first line and place of an error that was raised in code that is not ours, such as a model's."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0][:_LENGTH]}" if lines else type(error).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _of_libraries(f.filename)]
    return f"{text} ({frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name})" if frames else text


def _of_libraries(filename: str) -> bool:
    return "site-packages" in filename or filename.startswith("<")
