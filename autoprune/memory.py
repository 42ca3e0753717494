"""What this process does with memory that it frees.

Decides that a process of our own keeps it for the next tensors. Must not be asked for in a process that is the
user's: the setting holds for all of it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

KEPT = 1 << 30
"""Bytes: about so much free memory a process keeps at most."""
LARGEST = 64 << 20
"""Bytes: what is larger still comes from the system and goes back to it. On the heap it would leave holes (a search of
ResNet-50 at 224 px with batch 64 holds 5.4 GB; a limit of 256 MiB took 0.7 GB more)."""

_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_OLD_LIMIT = 32 << 20
"""Older versions of glibc refuse a higher threshold for what comes from the system itself."""
_lowest: list[int] = []
"""Bytes that this process held when nothing was kept unused; empty: it does not keep what it frees."""
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed(environment: Mapping[str, str] = os.environ) -> bool:
    """Lets this process keep what it frees, where its allocator is glibc's, and tells whether it does.

    By itself glibc gives the activations of a layer back to the system when the next one has them, and takes the same
    memory again, cleared page by page, for the layer after: an eighth to a third of the time in which a CPU screens a
    candidate (ResNet-56 the one, a reduced ViT-B/16 the other; one thread, AVX2). At most `KEPT` bytes are kept unused.
    Settings of the allocator that `environment` makes stand.
    """
    chosen = any(name in environment for name in _CHOSEN) or "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
    set_option = None if chosen else _from_libc("mallopt")
    if set_option is None:
        return False
    large = set_option(_MMAP_THRESHOLD, LARGEST) or set_option(_MMAP_THRESHOLD, _OLD_LIMIT)
    if not (large and set_option(_TRIM_THRESHOLD, KEPT)):
        return False
    _lowest[:] = [_resident()]
    return True


def tidy() -> None:
    """Gives back what is unused where this process keeps what it frees and holds `KEPT` bytes more than it once did.

    To be called between evaluations. Tensors of ever other sizes leave holes in the heap: twenty candidates of a
    transformer made 3.2 GB of 1.0 GB.
    """
    if _lowest and _resident() - _lowest[0] > KEPT:
        give_back()
        _lowest[:] = [_resident()]


def give_back() -> None:
    """Gives the system what this process keeps unused, where its allocator is glibc's."""
    trim = _from_libc("malloc_trim")
    if trim is not None:
        trim(0)


def _resident() -> int:
    """Returns the bytes of memory that this process holds now; on Linux alone."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _from_libc(name: str) -> ctypes._NamedFuncPointer | None:
    """Returns a function of the C library that is loaded; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
