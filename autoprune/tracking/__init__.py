"""Where results are kept for people to look at: one flat MLflow run a trial and one a search.

The only package that imports mlflow, and only once a `Tracker` is made, because that import takes seconds. It must not
know how trials are proposed or evaluated: it is handed finished records.
"""

from autoprune.tracking.client import Tracker
from autoprune.tracking.environment import environment_tags
from autoprune.tracking.location import artifact_root, resolve_uri, ui_address
from autoprune.tracking.recorder import Recorder
from autoprune.tracking.records import FRACTIONS, TrialRecord, trial_key

__all__ = [
    "FRACTIONS",
    "Recorder",
    "Tracker",
    "TrialRecord",
    "artifact_root",
    "environment_tags",
    "resolve_uri",
    "trial_key",
    "ui_address",
]
