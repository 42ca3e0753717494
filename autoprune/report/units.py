"""How numbers are written for people."""

from __future__ import annotations

import math
from collections.abc import Mapping

LABELS = {
    "macs": "MACs",
    "params": "params",
    "size_bytes": "size",
    "activation_bytes": "memory",
    "latency_ns": "latency",
}
"""Short names of costs, for the heads of columns."""

AXES = {
    "macs": "multiply-accumulates",
    "params": "parameters",
    "size_bytes": "model size",
    "activation_bytes": "peak activation memory",
    "latency_ns": "predicted latency",
}
"""Long names of costs, for axes."""


def quantity(value: float) -> str:
    """Returns a count with three digits: `812`, `27.2k`, `40.8M`, `1.81G`."""
    return _scaled(value, 1000.0, ("", "k", "M", "G", "T"), gap="")


def size(value: float) -> str:
    """Returns bytes with three digits: `812 B`, `27.2 kB`, `1.09 MB`."""
    return _scaled(value, 1000.0, ("B", "kB", "MB", "GB", "TB"), gap=" ")


def cost(name: str, value: float) -> str:
    """Returns a cost in its own unit."""
    if name.endswith("_ns"):
        return milliseconds(value / 1e6)
    return size(value) if name.endswith("_bytes") else quantity(value)


def percent(fraction: float, digits: int = 1) -> str:
    """Returns `98.2%`; a dash for what is not a number."""
    return f"{fraction * 100:.{digits}f}%" if math.isfinite(fraction) else "–"


def share(fraction: float) -> str:
    """Returns a part of the dense network's cost: `60%`, `2.4%`; a dash for what is not a number."""
    return percent(fraction, 1 if fraction < 0.0995 else 0)


def points(difference: float) -> str:
    """Returns a difference of accuracies in percentage points, with its sign."""
    return f"{difference * 100:+.1f}"


def seconds(value: float) -> str:
    """Returns a span of time: `8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = max(0, round(value))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min" if whole % 3600 // 60 else f"{whole // 3600} h"


def milliseconds(value: float) -> str:
    """Returns a latency with three digits: `0.0812 ms`, `12.3 ms`, `1,180 ms`; a dash for what is not a number."""
    if not math.isfinite(value):
        return "–"
    digits = sum(abs(value) < limit for limit in (99.95, 9.995, 0.9995, 0.09995))
    return f"{value:,.{digits}f} ms"


def latency(metrics: Mapping[str, float]) -> str:
    """Returns the measured latency among `metrics`; a dash where there is none."""
    return milliseconds(metrics.get("latency_ms", math.nan))


def _scaled(value: float, step: float, units: tuple[str, ...], *, gap: str) -> str:
    if not math.isfinite(value):
        return "–"
    number, index = float(value), 0
    while abs(number) >= 999.5 and index < len(units) - 1:
        number, index = number / step, index + 1
    digits = 0 if index == 0 or abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{digits}f}{gap}{units[index]}"
