"""A small `make chaos`: processes of a running search are killed at random moments, and nothing is lost or repeated."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_search_whose_processes_are_killed_ends_as_one_that_ran_alone(postgres_module: Any) -> None:
    if postgres_module.programs() is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="the extra autoprune[postgres] is not installed")
    path = Path(__file__).parents[1] / "benchmarks" / "chaos.py"
    spec = importlib.util.spec_from_file_location("chaos", path)
    assert spec is not None
    assert spec.loader is not None
    chaos = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = chaos  # its dataclasses look there
    spec.loader.exec_module(chaos)
    result = chaos.measure(40, 10, 3)
    assert chaos.faults(result) == []
    assert result["kills"] == 10
