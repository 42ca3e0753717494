"""Reading runs back: one run by its id, a text among its files, a trial's run by its key.

Decides how a run is found from its id alone, whatever experiment it belongs to. Writes nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.errors import InputError
from autoprune.redaction import hide_secrets
from autoprune.tracking import records
from autoprune.tracking.connection import connect, translated
from autoprune.tracking.registry import Registry, registered_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_PAGE = 1000


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """A run as MLflow holds it; of a metric the last value."""

    run_id: str
    name: str
    experiment_id: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]


class Reader:
    """Reads one store."""

    def __init__(self, client: MlflowClient, uri: str) -> None:
        self._client = client
        self._uri = uri

    def run(self, run_id: str) -> RecordedRun:
        """Returns a run.

        Raises:
            InputError: There is no such run.
            TrackingError: The store cannot be used.
        """
        from mlflow.exceptions import MlflowException

        with translated("read", self._uri):
            try:
                return _recorded(self._client.get_run(run_id))
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                raise InputError(hide_secrets(f"there is no run {run_id!r} in {self._uri}")) from error

    def search_run(self, run: RecordedRun) -> RecordedRun:
        """Returns the run of the search that a trial's run belongs to.

        Raises:
            InputError: The run is no trial of a search, or the search's own run is gone.
            TrackingError: The store cannot be used.
        """
        search = run.tags.get(records.SEARCH_TAG)
        if search is None or run.tags.get(records.KIND_TAG) != "trial":
            raise InputError(f"the run {run.run_id} is no trial of a search of autoprune")
        with translated("read", self._uri):
            text = f"tags.`{records.KIND_TAG}` = 'search'"
            page = list(self._client.search_runs([run.experiment_id], text, max_results=_PAGE))
        found = [_recorded(one) for one in page if one.data.tags.get(records.SEARCH_TAG) == search]
        if not found:
            raise InputError(f"the run of the search {search!r} is gone, and with it the settings of {run.run_id}")
        return found[-1]

    def text(self, run_id: str, path: str) -> str | None:
        """Returns a file of a run as text; `None` where the run has no such file.

        Raises:
            TrackingError: The store cannot be used.
        """
        folder, _, _ = path.rpartition("/")
        with translated("read a file of", self._uri), tempfile.TemporaryDirectory(prefix="autoprune-") as scratch:
            if path not in [file.path for file in self._client.list_artifacts(run_id, folder or None)]:
                return None
            return Path(self._client.download_artifacts(run_id, path, scratch)).read_text(encoding="utf-8")

    def trial_run(self, experiment: str, key: str) -> str | None:
        """Returns the id of the run of the trial with this key, or `None`.

        Raises:
            TrackingError: The store cannot be used.
        """
        with translated("read", self._uri):
            found = self._client.get_experiment_by_name(experiment)
            if found is None:
                return None
            text = f"tags.`{records.TRIAL_TAG}` = '{key}'"
            runs = self._client.search_runs([found.experiment_id], text, max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def registry(self, search: str) -> Registry:
        """Returns the registered model of a search."""
        return Registry(self._client, self._uri, registered_name(search))


def open_reader(uri: str) -> Reader:
    """Returns what reads the store at `uri`.

    Raises:
        TrackingError: The store cannot be opened.
    """
    with translated("open", uri):
        return Reader(connect(uri), uri)


def _recorded(run: Run) -> RecordedRun:
    return RecordedRun(
        run_id=str(run.info.run_id),
        name=str(run.info.run_name),
        experiment_id=str(run.info.experiment_id),
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        metrics=dict(run.data.metrics),
    )
