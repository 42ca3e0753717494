"""The coordinator: composes network, search, tracking, report and executors into what the commands do.

Decides the order of things, and nothing else: each of the five parts knows only the core, and meets the others here.
"""

from autoprune.coordinator.api import search
from autoprune.coordinator.commands import dashboard_command, export_trial, inspect_space, show_front
from autoprune.coordinator.session import SearchOutcome, run_search

__all__ = [
    "SearchOutcome",
    "dashboard_command",
    "export_trial",
    "inspect_space",
    "run_search",
    "search",
    "show_front",
]
