"""The coordinator: composes network, studies, tracking, report and executors into what the commands do.

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
    from autoprune.coordinator.commands import mlflow_command as mlflow_command
    from autoprune.coordinator.commands import show_front as show_front
    from autoprune.coordinator.explaining import compare_trials as compare_trials
    from autoprune.coordinator.explaining import explain_trial as explain_trial
    from autoprune.coordinator.exporting import ExportWish as ExportWish
    from autoprune.coordinator.exporting import export_models as export_models
    from autoprune.coordinator.finetuning import finetune_model as finetune_model
    from autoprune.coordinator.overview import Wanted as Wanted
    from autoprune.coordinator.overview import cancel_search as cancel_search
    from autoprune.coordinator.overview import log_lines as log_lines
    from autoprune.coordinator.overview import show_status as show_status
    from autoprune.coordinator.overview import submit_space as submit_space
    from autoprune.coordinator.picking import Wish as Wish
    from autoprune.coordinator.picking import pick as pick
    from autoprune.coordinator.placing import OnRay as OnRay
    from autoprune.coordinator.profiling import profile_space as profile_space
    from autoprune.coordinator.reporting import write_report as write_report
    from autoprune.coordinator.reproducing import reproduce_run as reproduce_run
    from autoprune.coordinator.serving import ServeOptions as ServeOptions
    from autoprune.coordinator.serving import run_queue as run_queue
    from autoprune.coordinator.serving import serve as serve
    from autoprune.coordinator.session import SearchOutcome as SearchOutcome
    from autoprune.coordinator.session import run_search as run_search
    from autoprune.coordinator.syncing import sync_search as sync_search

_HOMES = {
    "ExportWish": "exporting",
    "OnRay": "placing",
    "SearchOutcome": "session",
    "ServeOptions": "serving",
    "Wanted": "overview",
    "Wish": "picking",
    "cancel_search": "overview",
    "compare_trials": "explaining",
    "dashboard_command": "commands",
    "explain_trial": "explaining",
    "export_models": "exporting",
    "finetune_model": "finetuning",
    "inspect_space": "commands",
    "latency_space": "commands",
    "mlflow_command": "commands",
    "log_lines": "overview",
    "pick": "picking",
    "profile_space": "profiling",
    "reproduce_run": "reproducing",
    "run_queue": "serving",
    "run_search": "session",
    "search": "api",
    "serve": "serving",
    "show_front": "commands",
    "show_status": "overview",
    "submit_space": "overview",
    "sync_search": "syncing",
    "write_report": "reporting",
}
__all__ = [
    "ExportWish",
    "OnRay",
    "SearchOutcome",
    "ServeOptions",
    "Wanted",
    "Wish",
    "cancel_search",
    "compare_trials",
    "dashboard_command",
    "explain_trial",
    "export_models",
    "finetune_model",
    "inspect_space",
    "latency_space",
    "log_lines",
    "mlflow_command",
    "pick",
    "profile_space",
    "reproduce_run",
    "run_queue",
    "run_search",
    "search",
    "serve",
    "show_front",
    "show_status",
    "submit_space",
    "sync_search",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
