"""The coordinator: composes network, studies, tracking, report and executors into what the commands do.

Decides the order of things, and nothing else: each of the five parts knows only the core, and meets the others here.
What a command does not need is not imported: showing a front takes no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoprune.coordinator.api import search as search
    from autoprune.coordinator.commands.dashboards import dashboard_command as dashboard_command
    from autoprune.coordinator.commands.dashboards import mlflow_command as mlflow_command
    from autoprune.coordinator.commands.explaining import compare_trials as compare_trials
    from autoprune.coordinator.commands.explaining import explain_trial as explain_trial
    from autoprune.coordinator.commands.exporting import ExportWish as ExportWish
    from autoprune.coordinator.commands.exporting import export_models as export_models
    from autoprune.coordinator.commands.finetuning import finetune_model as finetune_model
    from autoprune.coordinator.commands.front import show_front as show_front
    from autoprune.coordinator.commands.inspecting import inspect_space as inspect_space
    from autoprune.coordinator.commands.inspecting import latency_space as latency_space
    from autoprune.coordinator.commands.picking import Wish as Wish
    from autoprune.coordinator.commands.picking import pick as pick
    from autoprune.coordinator.commands.profiling import profile_space as profile_space
    from autoprune.coordinator.commands.queueing import Wanted as Wanted
    from autoprune.coordinator.commands.queueing import cancel_search as cancel_search
    from autoprune.coordinator.commands.queueing import log_lines as log_lines
    from autoprune.coordinator.commands.queueing import show_status as show_status
    from autoprune.coordinator.commands.queueing import submit_space as submit_space
    from autoprune.coordinator.commands.reporting import write_report as write_report
    from autoprune.coordinator.commands.reproducing import reproduce_run as reproduce_run
    from autoprune.coordinator.commands.syncing import sync_search as sync_search
    from autoprune.coordinator.running.session import SearchOutcome as SearchOutcome
    from autoprune.coordinator.running.session import run_search as run_search
    from autoprune.coordinator.running.workers import OnRay as OnRay
    from autoprune.coordinator.service.serving import ServeOptions as ServeOptions
    from autoprune.coordinator.service.serving import run_queue as run_queue
    from autoprune.coordinator.service.serving import serve as serve

_HOMES = {
    "ExportWish": "commands.exporting",
    "OnRay": "running.workers",
    "SearchOutcome": "running.session",
    "ServeOptions": "service.serving",
    "Wanted": "commands.queueing",
    "Wish": "commands.picking",
    "cancel_search": "commands.queueing",
    "compare_trials": "commands.explaining",
    "dashboard_command": "commands.dashboards",
    "explain_trial": "commands.explaining",
    "export_models": "commands.exporting",
    "finetune_model": "commands.finetuning",
    "inspect_space": "commands.inspecting",
    "latency_space": "commands.inspecting",
    "mlflow_command": "commands.dashboards",
    "log_lines": "commands.queueing",
    "pick": "commands.picking",
    "profile_space": "commands.profiling",
    "reproduce_run": "commands.reproducing",
    "run_queue": "service.serving",
    "run_search": "running.session",
    "search": "api",
    "serve": "service.serving",
    "show_front": "commands.front",
    "show_status": "commands.queueing",
    "submit_space": "commands.queueing",
    "sync_search": "commands.syncing",
    "write_report": "commands.reporting",
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
