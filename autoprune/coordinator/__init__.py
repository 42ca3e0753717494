"""The coordinator: composes network, search, tracking, report and executors into what the commands do.

Decides the order of things, and nothing else: each of the five parts knows only the core, and meets the others here.
What a command does not need is not imported: showing a front takes no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoprune.coordinator.api import search as search
    from autoprune.coordinator.commands import dashboard_command as dashboard_command
    from autoprune.coordinator.commands import export_trial as export_trial
    from autoprune.coordinator.commands import inspect_space as inspect_space
    from autoprune.coordinator.commands import latency_space as latency_space
    from autoprune.coordinator.commands import show_front as show_front
    from autoprune.coordinator.session import SearchOutcome as SearchOutcome
    from autoprune.coordinator.session import run_search as run_search

_HOMES = {
    "SearchOutcome": "session",
    "dashboard_command": "commands",
    "export_trial": "commands",
    "inspect_space": "commands",
    "latency_space": "commands",
    "run_search": "session",
    "search": "api",
    "show_front": "commands",
}
__all__ = [
    "SearchOutcome",
    "dashboard_command",
    "export_trial",
    "inspect_space",
    "latency_space",
    "run_search",
    "search",
    "show_front",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
