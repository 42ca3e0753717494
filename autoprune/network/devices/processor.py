"""What the processor at hand can do in bfloat16.

Decides from what it and oneDNN's settings say, and by small products timed where it cannot be told. Must not know of
networks.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from autoprune.network.data.staging import Device
from autoprune.network.devices.device import device_name, threads

_CPUINFO = Path("/proc/cpuinfo")
_ARITHMETIC = frozenset({"avx512bf16", "amxbf16", "bf16", "svebf16"})
"""Abilities, without underscores, under which a processor multiplies in bfloat16. AVX-NE-CONVERT only converts it."""
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Where oneDNN is told to use less of a processor than it has, the first that is set. ATEN_CPU_CAPABILITY takes nothing
away here: with `avx2` and `default` a convolution in bfloat16 takes 0.24 and 0.28 ms, as with `avx512` (float32 0.38 to
0.43, torch 2.13, AVX-512 with bfloat16)."""
_WITHOUT = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"})
"""Limits under which oneDNN emulates bfloat16: the same convolution takes 27 ms for 0.65 at AVX2, 1.0 for 0.36 at
AVX512_CORE."""
_KINDS = (
    ("amxbf16", "AMX"),
    ("avx512bf16", "AVX-512 with bfloat16"),
    ("avx512f", "AVX-512"),
    ("avx2", "AVX2"),
    ("avx", "AVX"),
    ("svebf16", "SVE with bfloat16"),
    ("bf16", "NEON with bfloat16"),
    ("sve", "SVE"),
    ("neon", "NEON"),
    ("asimd", "NEON"),
)
"""The first ability that a processor has names its kind."""
_READINGS = 9
"""Odd, so that the median is a reading."""


@dataclass(frozen=True, slots=True)
class Processor:
    """A processor: its name, the kind of its arithmetic, and whether that includes bfloat16 (None: it does not say)."""

    name: str
    kind: str
    bfloat16: bool | None

    def __str__(self) -> str:
        return f"{self.name} ({self.kind})" if self.kind else self.name


def this_processor() -> Processor:
    """Returns what is known of the processor at hand, under oneDNN's limit where one is set."""
    abilities = _abilities()
    limited = next((name for name in _LIMITS if os.environ.get(name)), None)
    limit = os.environ[limited].upper() if limited else ""
    kind = next((name for ability, name in _KINDS if ability in abilities), "")
    can: bool | None = None
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if abilities and has_onednn:  # without it nothing here says how products are made
        can = not abilities.isdisjoint(_ARITHMETIC)
        if can and limit in _WITHOUT:
            can, kind = False, f"{kind}, limited to {limit} by {limited}"
    return Processor(_name(), kind, can)


def without_bfloat16(device: Device) -> str | None:
    """Returns why bfloat16 is no choice on a device, in words; None: the device has arithmetic for it.

    Emulated, a training step took 3.64 s for 0.31 s in float32 (AVX2).
    """
    device = torch.device(device)
    if device.type == "cuda":
        can = torch.cuda.is_bf16_supported(including_emulation=False)
        return None if can else f"this GPU ({device_name(device)}) only emulates bfloat16"
    if device.type != "cpu":
        return None
    processor = this_processor()
    if processor.bfloat16 is None:
        return "this processor takes more than twice as long for products in bfloat16" if _is_slow() else None
    return None if processor.bfloat16 else f"this processor ({processor.kind or processor.name}) only emulates bfloat16"


def processor_text(device: Device) -> str:
    """Returns a text that is the same for devices on which a measured choice holds."""
    device = torch.device(device)
    if device.type != "cpu":
        return device_name(device)
    # As torch's own operators use it, by ATEN_CPU_CAPABILITY.
    return f"{this_processor()}, {torch.backends.cpu.get_cpu_capability()}"


def _abilities() -> frozenset[str]:
    """Returns what the processor can do, in lower case without underscores; empty where nothing tells."""
    told: Callable[[], Mapping[str, object]] | None = getattr(torch.cpu, "get_capabilities", None)  # from torch 2.12 on
    found = _named(name for name, can in told().items() if can is True) if told is not None else frozenset[str]()
    if found:
        return found
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    lines = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return _named(lines[1].split()) if lines else frozenset()


def _named(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name.lower().replace("_", "") for name in names)


def _name() -> str:
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


@cache
def _is_slow() -> bool:
    """Whether small products in bfloat16 take more than twice as long as in float32."""
    half, single = _small_products(torch.bfloat16, torch.float32)
    return half > 2.0 * single


def _small_products(*dtypes: torch.dtype) -> tuple[float, ...]:
    """Returns the median processor time in seconds of a small convolution and a small matrix product in each format.

    The formats take turns. By one reading each a format that is emulated was the faster one once in twenty times on a
    busy machine.
    """
    shapes = ((256, 256), (2, 64, 14, 14), (64, 64, 3, 3))
    operands = {dtype: [torch.ones(*shape, dtype=dtype) for shape in shapes] for dtype in dtypes}
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
    with torch.no_grad(), threads(1):
        for number in range(_READINGS + 1):
            for dtype in dtypes:
                took = _timed(*operands[dtype])
                if number > 0:  # the first one prepares kernels
                    times[dtype].append(took)
    return tuple(statistics.median(times[dtype]) for dtype in dtypes)


def _timed(table: Tensor, image: Tensor, kernel: Tensor) -> float:
    start = time.thread_time()
    F.conv2d(image, kernel, padding=1)
    table.mm(table)
    return time.thread_time() - start
