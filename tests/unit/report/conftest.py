"""A small search whose front is known by construction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from autoprune.report import FrontPoint, SearchView

DENSE = {"macs": 1_000_000, "params": 40_000, "size_bytes": 160_000, "activation_bytes": 8_192}
SIZES = {"layer1.conv": 16, "layer2.conv": 32}

MakePoint = Callable[..., FrontPoint]


def point(trial: int | None, fraction: float, accuracy: float, **more: Any) -> FrontPoint:
    costs = {name: int(value * fraction) for name, value in DENSE.items()}
    widths = {name: int(size * fraction) for name, size in SIZES.items()}
    return FrontPoint(trial, accuracy, costs, widths, criterion="obs", **{"origin": "tpe", **more})


@pytest.fixture
def make_point() -> MakePoint:
    return point


@pytest.fixture
def view() -> SearchView:
    trials = (
        point(0, 0.25, 0.80),
        point(1, 0.50, 0.93),
        point(2, 0.50, 0.90),
        point(3, 0.75, 0.95),
        point(4, 0.80, 0.94),
    )
    controls = (point(None, 0.5, 0.85, origin="uniform l2"), point(None, 0.2, 0.5, origin="global taylor"))
    dense = FrontPoint(None, 0.96, DENSE, SIZES, origin="dense")
    return SearchView(
        "digits",
        "tune",
        dense,
        trials,
        SIZES,
        controls,
        limits={"macs": 800_000, "activation_bytes": 8_000},
        notes=("A note.",),
    )
