"""Where evaluations run: in the script's own process, or in processes that a crash cannot leave."""

from __future__ import annotations

import pytest

from autoprune.coordinator.api import _place
from autoprune.coordinator.running.workers import Here, OnRay, Workers
from autoprune.errors import InputError


@pytest.mark.parametrize(
    ("workers", "ray", "place"),
    [
        (None, None, Here()),
        (1, None, Here()),
        (2, None, 2),
        (None, "auto", OnRay("auto")),
        (1, "auto", OnRay("auto", 1)),
    ],
)
def test_from_python_one_worker_is_the_script_itself_and_two_are_processes(
    workers: int | None, ray: str | None, place: Workers
) -> None:
    assert _place(workers, ray, cpus_per_trial=1.0, gpus_per_trial=None) == place


def test_no_worker_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="at least one worker, got 0"):
        _place(0, None, cpus_per_trial=1.0, gpus_per_trial=None)
