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
    from autoprune.coordinator.commands import inspect_space as inspect_space
    from autoprune.coordinator.commands import latency_space as latency_space
    from autoprune.coordinator.commands import show_front as show_front
    from autoprune.coordinator.explaining import compare_trials as compare_trials
    from autoprune.coordinator.explaining import explain_trial as explain_trial
    from autoprune.coordinator.exporting import ExportWish as ExportWish
    from autoprune.coordinator.exporting import export_models as export_models
    from autoprune.coordinator.finetuning import finetune_model as finetune_model
    from autoprune.coordinator.picking import Wish as Wish
    from autoprune.coordinator.picking import pick as pick
    from autoprune.coordinator.profiling import profile_space as profile_space
    from autoprune.coordinator.reporting import write_report as write_report
    from autoprune.coordinator.reproducing import reproduce_run as reproduce_run
    from autoprune.coordinator.session import SearchOutcome as SearchOutcome
    from autoprune.coordinator.session import run_search as run_search
    from autoprune.coordinator.syncing import sync_search as sync_search

_HOMES = {
    "ExportWish": "exporting",
    "SearchOutcome": "session",
    "Wish": "picking",
    "compare_trials": "explaining",
    "dashboard_command": "commands",
    "explain_trial": "explaining",
    "export_models": "exporting",
    "finetune_model": "finetuning",
    "inspect_space": "commands",
    "latency_space": "commands",
    "pick": "picking",
    "profile_space": "profiling",
    "reproduce_run": "reproducing",
    "run_search": "session",
    "search": "api",
    "show_front": "commands",
    "sync_search": "syncing",
    "write_report": "reporting",
}
__all__ = [
    "ExportWish",
    "SearchOutcome",
    "Wish",
    "compare_trials",
    "dashboard_command",
    "explain_trial",
    "export_models",
    "finetune_model",
    "inspect_space",
    "latency_space",
    "pick",
    "profile_space",
    "reproduce_run",
    "run_search",
    "search",
    "show_front",
    "sync_search",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
