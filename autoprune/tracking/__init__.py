"""Where results are kept for people to look at: one flat MLflow run a trial and one a search.

The only package that imports mlflow, and only once a `Tracker` is made, because that import takes seconds. It must not
know how trials are proposed or evaluated: it is handed finished records.
"""

from autoprune.tracking.client import Tracker
from autoprune.tracking.environment import environment_tags
from autoprune.tracking.location import artifact_root, resolve_uri, sqlite_path, ui_address
from autoprune.tracking.machine import watch_machine, watches_machine
from autoprune.tracking.pages import WORKFLOW
from autoprune.tracking.reading import Reader, RecordedRun, open_reader
from autoprune.tracking.recorder import Recorder, Refused
from autoprune.tracking.records import FRACTIONS, TrialRecord, safe_key, trial_key
from autoprune.tracking.registry import PICKED, Member, Registry, Version, registered_name
from autoprune.tracking.server import ServerPlan, is_loopback, local_address, prepare_store, server_plan

__all__ = [
    "FRACTIONS",
    "PICKED",
    "WORKFLOW",
    "Member",
    "Reader",
    "RecordedRun",
    "Recorder",
    "Refused",
    "Registry",
    "ServerPlan",
    "Tracker",
    "TrialRecord",
    "Version",
    "artifact_root",
    "environment_tags",
    "is_loopback",
    "local_address",
    "open_reader",
    "prepare_store",
    "registered_name",
    "resolve_uri",
    "safe_key",
    "server_plan",
    "sqlite_path",
    "trial_key",
    "ui_address",
    "watch_machine",
    "watches_machine",
]
