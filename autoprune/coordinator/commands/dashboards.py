"""The commands that start Optuna's dashboard and MLflow's pages.

Decides their arguments and their environment. Changes nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from autoprune import studies
from autoprune.coordinator.stored.places import open_existing, storage_path


def dashboard_command(home: Path, port: int) -> list[str]:
    """Returns the command that shows a home folder's studies in the Optuna dashboard, on this machine alone.

    A password goes to it by this process's environment, where other users of the machine do not see it.

    Raises:
        StudyError: There is no study yet, or the storage cannot be used.
    """
    place = storage_path(home)
    open_existing(home).engine.dispose()
    if isinstance(place, Path):
        url = f"sqlite:///{place.resolve()}"
    else:
        url, password = studies.split_password(place)
        os.environ.update({"PGPASSWORD": password} if password else {})
    beside = Path(sys.executable).with_name("optuna-dashboard")
    program = str(beside) if beside.is_file() else "optuna-dashboard"
    return [program, url, "--host", "127.0.0.1", "--port", str(port)]


def mlflow_command(home: Path) -> tuple[list[str], dict[str, str], str]:
    """Returns the command that serves MLflow's pages, its environment, and their address.

    Raises:
        InputError: Other machines could come in without a login, or a setting is wrong.
        TrackingError: `mlflow/server.env` cannot be read.
    """
    from autoprune import tracking

    plan = tracking.server_plan(home, os.environ)
    return list(plan.command), dict(plan.env), plan.address
