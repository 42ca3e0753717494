"""The tracker: writes searches and trials to an MLflow store, each once.

Decides how runs are made, found again and marked. Runs are flat, because MLflow's UI shows nested runs collapsed and
uncharted. Everything goes through `MlflowClient.log_batch` (163 ms a trial over HTTP; the fluent calls cost six times
that). Must not know Optuna or torch.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from autoprune.errors import TrackingError
from autoprune.objective import ACCURACY, Objective
from autoprune.tracking import records
from autoprune.tracking.connection import connect, translated
from autoprune.tracking.pages import SHARED_VIEW_TAG, WORKFLOW, chart_view, encode_view, list_view, view_link
from autoprune.tracking.records import TrialRecord
from autoprune.tracking.registry import Registry, registered_name

if TYPE_CHECKING:
    from mlflow.entities import Run

_STATUS = {"complete": "FINISHED", "fail": "FAILED", "stopped": "KILLED"}
_OPEN = ("RUNNING", "SCHEDULED")
_PAGE = 1000


class Tracker:
    """One experiment of an MLflow store.

    Making a tracker imports mlflow (about 3 s) and, on a new SQLite file, makes its tables (about 10 s). A tracker
    may be used from one thread at a time.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        *,
        artifact_root: Path | None = None,
        description: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Connects and finds or makes the experiment.

        Args:
            uri: The tracking address, as `resolve_uri` gives it.
            experiment: The experiment's name: the name of the space. One that was deleted in the UI is restored.
            artifact_root: The folder for the experiment's files; `None` leaves it to the server.
            description: What the UI shows above the runs, in Markdown.
            environment: Tags that every run gets, as `environment_tags` finds them.

        Raises:
            TrackingError: The store cannot be reached or is not MLflow's.
        """
        self.uri = uri
        self.experiment = experiment
        self._environment = dict(environment or {})
        self._known: dict[str, dict[str, str]] = {}
        self._begun: dict[str, dict[str, str]] = {}
        with self._translated("open"):
            self._client = connect(uri)
            self.experiment_id = self._open_experiment(artifact_root)
            tags = {"mlflow.experimentKind": "custom_model_development"}  # else the UI opens on its pages for agents
            if description and records.NOTE_TAG not in self._client.get_experiment(self.experiment_id).tags:
                tags[records.NOTE_TAG] = records.clip(description, records.NOTE_LIMIT)
            for key, value in tags.items():
                self._client.set_experiment_tag(self.experiment_id, key, value)

    def ping(self) -> None:
        """Asks the store for the experiment.

        Raises:
            TrackingError: The store cannot be reached.
        """
        with self._translated("reach"):
            self._client.get_experiment(self.experiment_id)

    def open_search(self, search: str, *, params: Mapping[str, object], tags: Mapping[str, str]) -> str:
        """Finds or makes the run of kind `search`, sets it running and returns its id.

        MLflow's parameters cannot change: where a resumed search has another value, the first one stays and the tag
        `resumed.<key>` holds the newest.

        Raises:
            TrackingError: The store cannot be used.
        """
        from mlflow.entities import Param, RunTag

        wanted = records.clean_params(params)
        written = records.search_tags(search, {**self._environment, **tags})
        with self._translated("record the search in"):
            found = self._search_run(search)
            if found is None:
                run = self._client.create_run(self.experiment_id, tags=written, run_name=f"search {search}")
                have: dict[str, str] = {}
            else:
                run, have = found, dict(found.data.params)
                self._client.update_run(run.info.run_id, status="RUNNING")
                written |= {f"resumed.{k}": v for k, v in wanted.items() if have.get(k, v) != v}
            self._client.log_batch(
                run.info.run_id,
                params=[Param(key, value) for key, value in wanted.items() if key not in have],
                tags=[RunTag(key, value) for key, value in written.items()],
            )
        return str(run.info.run_id)

    def record_trial(self, record: TrialRecord) -> str:
        """Records a trial, once however often it is called, and returns its run's id.

        A run that a killed process left unfinished is completed instead of repeated.

        Raises:
            TrackingError: The store cannot be used; the next call looks again at what it holds.
        """
        from mlflow.entities import Metric, Param

        try:
            known = self._finished(record.search)
            if record.key in known:
                return known[record.key]
            start, end = record.milliseconds
            metrics = [Metric(key, value, end, 0) for key, value in records.trial_metrics(record).items()]
            for key, series in records.trial_curves(record).items():
                metrics += [Metric(key, value, end, step) for step, value in enumerate(series, start=1)]
            with self._translated("record a trial in"):
                run_id = self._begun[record.search].get(record.key)
                if run_id is None:
                    tags = {**records.clean_tags(self._environment), **records.trial_tags(record)}
                    name = record.name or f"{record.rung} {record.number}"
                    run = self._client.create_run(self.experiment_id, start_time=start, tags=tags, run_name=name)
                    run_id = str(run.info.run_id)
                params = [Param(key, value) for key, value in records.trial_params(record).items()]
                self._client.log_batch(run_id, metrics=metrics, params=params)
                self._client.set_terminated(run_id, _STATUS[record.state], end)
        except TrackingError:
            self._known.pop(record.search, None)
            raise
        known[record.key] = run_id
        return run_id

    def known_trials(self, search: str) -> dict[str, str]:
        """Returns the run's id of every trial of `search` that is completely recorded, by the trial's key.

        A run that somebody deleted in the UI counts: it is not recorded again.

        Raises:
            TrackingError: The store cannot be used.
        """
        with self._translated("read"):
            runs = list(self._runs(search, "trial", deleted=True))
        runs.sort(key=_precedence, reverse=True)  # the run that counts comes last
        known = [run for run in runs if run.info.status not in _OPEN]
        begun = [run for run in runs if run.info.status in _OPEN and not _is_deleted(run)]
        self._known[search] = {_tag(run, records.TRIAL_TAG): str(run.info.run_id) for run in known}
        self._begun[search] = {_tag(run, records.TRIAL_TAG): str(run.info.run_id) for run in begun}
        return dict(self._known[search])

    def keep_one_run_each(self, search: str) -> int:
        """Deletes runs of trials that another run records already; MLflow keeps them among the deleted ones.

        They come about where a request arrived although its answer was lost, or where two processes recorded the same
        search. The first finished run stays.

        Returns:
            How many were deleted.

        Raises:
            TrackingError: The store cannot be used.
        """
        surplus = 0
        with self._translated("delete surplus runs of"):
            seen: set[str] = set()
            for run in sorted(self._runs(search, "trial"), key=_precedence):
                key = _tag(run, records.TRIAL_TAG)
                if key in seen:
                    self._client.delete_run(run.info.run_id)
                    surplus += 1
                seen.add(key)
        if surplus:
            self._known.pop(search, None)
        return surplus

    def find_run(self, search: str, trial: str | None = None) -> str | None:
        """Returns the id of a search's own run or, given a trial's key, of that trial's finished run; else `None`.

        Raises:
            TrackingError: The store cannot be used.
        """
        if trial is not None:
            return self._finished(search).get(trial)
        with self._translated("read"):
            run = self._search_run(search)
        return None if run is None else str(run.info.run_id)

    def mark_front(self, search: str, front: Collection[str]) -> int:
        """Tags the runs of the trials `front` with `pareto = true`, the search's other trials with `false`.

        Args:
            search: The search.
            front: Keys of trials, as `trial_key` makes them.

        Returns:
            How many runs changed; only those are written.

        Raises:
            TrackingError: The store cannot be used.
        """
        from mlflow.entities import RunTag

        changed = 0
        wanted = set(front)
        with self._translated("mark the front in"):
            for run in self._runs(search, "trial"):
                value = "true" if _tag(run, records.TRIAL_TAG) in wanted else "false"
                if _tag(run, records.PARETO_TAG) != value:
                    color = records.FRONT_COLOR if value == "true" else records.PLAIN_COLOR
                    tags = [RunTag(records.PARETO_TAG, value), RunTag(records.COLOR_TAG, color)]
                    self._client.log_batch(run.info.run_id, tags=tags)
                    changed += 1
        return changed

    def log_files(self, run_id: str, files: Mapping[str, str | bytes | Path], *, folder: str = "") -> None:
        """Stores files with a run; a file of the same name is replaced.

        The UI shows `.html` as a page, `.png` as a picture and `.csv` as a table.

        Args:
            run_id: The run.
            files: Content (text, bytes, or a file to copy) by its path within the run.
            folder: A folder that is put before every path.

        Raises:
            ValueError: A path is absolute or leaves the run's folder.
            TrackingError: The store cannot be used, or a file to copy cannot be read.
        """
        with tempfile.TemporaryDirectory(prefix="autoprune-") as scratch, self._translated("store files in"):
            for name, content in files.items():
                target = Path(scratch) / _inner_path(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, str):
                    target.write_text(content, encoding="utf-8")
                else:
                    target.write_bytes(content.read_bytes() if isinstance(content, Path) else content)
            self._client.log_artifacts(run_id, scratch, artifact_path=folder or None)

    def log_front(self, run_id: str, files: Mapping[str, str | bytes | Path], *, metrics: Mapping[str, float]) -> None:
        """Stores the front on the search's run: its figures and tables under `front/`, its numbers as metrics.

        Raises:
            ValueError: A path is absolute or leaves the run's folder.
            TrackingError: The store cannot be used.
        """
        self.log_files(run_id, files, folder="front")
        self._log_metrics(run_id, metrics)

    def registry(self, search: str) -> Registry:
        """Returns the registered model of a search, in the same store."""
        return Registry(self._client, self.uri, registered_name(search))

    def describe(self, text: str, *, run_id: str | None = None) -> None:
        """Writes the description (Markdown) of a run or of the experiment; what a person put around ours stays.

        Raises:
            TrackingError: The store cannot be used.
        """
        with self._translated("describe a search in"):
            if run_id is None:
                old = self._client.get_experiment(self.experiment_id).tags.get(records.NOTE_TAG, "")
                self._client.set_experiment_tag(self.experiment_id, records.NOTE_TAG, records.merged_note(old, text))
            else:
                old = self._client.get_run(run_id).data.tags.get(records.NOTE_TAG, "")
                self._client.set_tag(run_id, records.NOTE_TAG, records.merged_note(old, text))

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Sets tags of a run.

        Raises:
            TrackingError: The store cannot be used.
        """
        from mlflow.entities import RunTag

        with self._translated("tag a run in"):
            self._client.log_batch(run_id, tags=[RunTag(k, v) for k, v in records.clean_tags(tags).items()])

    def finish_search(self, run_id: str, metrics: Mapping[str, float], *, status: str = "FINISHED") -> None:
        """Writes the search's last numbers and ends its run as `FINISHED`, `FAILED` or `KILLED`.

        Raises:
            TrackingError: The store cannot be used.
        """
        self._log_metrics(run_id, metrics)
        with self._translated("finish the search in"):
            self._client.set_terminated(run_id, status)

    def write_chart_view(
        self, search: str, *, rung: str, cost: str, params: Sequence[str], objective: Objective = ACCURACY
    ) -> str:
        """Prepares the UI's chart page for one rung of a search.

        Args:
            search: The search.
            rung: Whose trials are drawn.
            cost: The metric on the x axis, such as `macs_fraction`.
            params: Parameters for the parallel coordinates, such as `ratio/layer1`, most telling first.
            objective: What the metric `val_accuracy` is, for the charts' titles.

        Returns:
            The page's address after the server's own: put `ui_address` before it.

        Raises:
            TrackingError: The store cannot be used.
        """
        state = chart_view(
            filter_text=_trials_of(search, rung),
            cost=records.safe_key(cost),
            params=[records.safe_key(name) for name in params],
            objective=objective,
        )
        return self._write_view(f"{search}-{rung}", state, mode="CHART")

    def write_list_view(self, search: str, *, rung: str, metrics: Sequence[str]) -> str:
        """Prepares the UI's list of the runs of one rung of a search.

        Args:
            search: The search.
            rung: Whose trials are listed.
            metrics: The columns; the last one, a cost, orders the rows, lowest first.

        Returns:
            The page's address after the server's own: put `ui_address` before it.

        Raises:
            TrackingError: The store cannot be used.
        """
        keys = [records.safe_key(name) for name in metrics]
        state = list_view(filter_text=_trials_of(search, rung), order_by=keys[-1], metrics=keys)
        return self._write_view(f"{search}-{rung}-list", state, mode="TABLE")

    def _write_view(self, name: str, state: dict[str, Any], *, mode: str) -> str:
        key = re.sub(r"[^A-Za-z0-9_-]", "-", f"autoprune-{name}")[:100]
        with self._translated("prepare the charts in"):
            self._client.set_experiment_tag(self.experiment_id, SHARED_VIEW_TAG + key, encode_view(state))
        return view_link(self.experiment_id, key, mode=mode)

    def run_link(self, run_id: str) -> str:
        """Returns the address of a run's page after the server's own."""
        return f"/#/experiments/{self.experiment_id}/runs/{run_id}?{WORKFLOW}"

    def _open_experiment(self, artifact_root: Path | None) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            root = artifact_root.resolve().as_uri() if artifact_root is not None else None
            place = f"{root}/{_folder_name(self.experiment)}" if root else None
            return str(self._client.create_experiment(self.experiment, artifact_location=place))
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _finished(self, search: str) -> dict[str, str]:
        if search not in self._known:
            self.known_trials(search)
        return self._known[search]

    def _search_run(self, search: str) -> Run | None:
        runs = sorted(self._runs(search, "search"), key=lambda run: int(run.info.start_time or 0))
        return runs[0] if runs else None

    def _runs(self, search: str, kind: str, *, deleted: bool = False) -> Iterator[Run]:
        from mlflow.entities import ViewType

        parts = [_equals(records.KIND_TAG, kind), _equals(records.SEARCH_TAG, search)]
        text = " and ".join(part for part in parts if part)
        view = ViewType.ALL if deleted else ViewType.ACTIVE_ONLY
        token: str | None = None
        while True:
            page = self._client.search_runs([self.experiment_id], text, view, _PAGE, page_token=token)
            yield from (run for run in page if _tag(run, records.SEARCH_TAG) == search)
            token = page.token
            if not token:
                return

    def _log_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        with self._translated("record numbers in"):
            self._client.log_batch(
                run_id,
                metrics=[Metric(records.safe_key(k), records.finite(v), now, 0) for k, v in metrics.items()],
            )

    def _translated(self, verb: str) -> contextlib.AbstractContextManager[None]:
        return translated(verb, self.uri)


def _tag(run: Run, key: str) -> str:
    tags: dict[str, Any] = run.data.tags
    return str(tags.get(key, ""))


def _is_deleted(run: Run) -> bool:
    return bool(run.info.lifecycle_stage == "deleted")


def _precedence(run: Run) -> tuple[bool, bool, int, str]:
    """Orders runs of the same trial: those that are there and finished first, then by age."""
    return _is_deleted(run), run.info.status in _OPEN, int(run.info.start_time or 0), str(run.info.run_id)


def _trials_of(search: str, rung: str) -> str:
    clauses = [_equals(records.KIND_TAG, "trial"), _equals("rung", rung), _equals(records.SEARCH_TAG, search)]
    return " and ".join(clause for clause in clauses if clause)


def _equals(key: str, value: str) -> str:
    """Returns a clause of MLflow's search language, or nothing for a value that it cannot quote."""
    return f"tags.`{key}` = '{value}'" if re.fullmatch(r"[\w.:/ +@-]+", value, re.ASCII) else ""


def _inner_path(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is no path within a run")
    return path


def _folder_name(experiment: str) -> str:
    return records.safe_key(re.sub(r"[/: ]", "_", experiment))
