"""What a search writes to MLflow, and when.

Decides which records a search makes: one run a trial, one a search with the front, the figures and the tables. MLflow
being away delays them and stops nothing; whatever is missing is found by comparing the studies with MLflow, and
recorded once.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import autoprune.search as studies
from autoprune import report, tracking
from autoprune.coordinator.views import CONTROLS, StoredSearch
from autoprune.report import SearchView
from autoprune.results import Problem, not_faster
from autoprune.search import StoredTrial


class Records:
    """Records one search. `runs` maps trial keys to the ids of their runs, as far as they are recorded."""

    def __init__(
        self,
        name: str,
        problem: Problem,
        *,
        home: Path,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        say: Callable[[str], None],
    ) -> None:
        self.name = name
        self.problem = problem
        self.uri = tracking.resolve_uri(home, os.environ)
        self.address = tracking.ui_address(self.uri)
        self.runs: dict[str, str] = {}
        self.charts: str | None = None
        self.search_run: str | None = None
        self._said: set[str] = set()
        self._tracker: tracking.Tracker | None = None
        self._lock = threading.Lock()
        self._dense = problem.cost_model.dense()
        self._scopes = {group.name: group.scope for group in problem.groups}
        self._recorder = tracking.Recorder(self._connect, say=say)

        self._params, self._tags = params, tags
        self._recorder.put(self._run_of, what="the search")

    def trial(self, rung: str, trial: StoredTrial, *, dense_metrics: Mapping[str, float] | None = None) -> None:
        """Queues a finished trial; one that was queued before is left alone.

        With the dense network's metrics a trial gets the tag `latency` = `no faster` where that is so.
        """
        study = studies.study_name(self.name, rung)
        key = tracking.trial_key(study, trial.number)
        if key in self._said or trial.state not in ("complete", "fail"):
            return
        self._said.add(key)
        result, dense = trial.result, dense_metrics or {}
        slow = result is not None and not_faster(
            result.costs, result.metrics, dense_costs=self._dense, dense_metrics=dense
        )
        record = tracking.TrialRecord(
            search=self.name,
            study=study,
            number=trial.number,
            rung=rung,
            policy=trial.policy,
            result=trial.result,
            dense=self._dense,
            origin=str(trial.origin),
            state="complete" if trial.state == "complete" else "fail",
            reason=trial.reason or "",
            scopes=self._scopes,
            tags={"source": trial.source} | ({"latency": "no faster"} if slow else {}),
            name=run_name(rung, trial),
        )

        def done(run_id: str) -> None:
            with self._lock:
                self.runs[key] = run_id

        self._recorder.record_trial(record, done=done)

    def publish(self, stored: StoredSearch, view: SearchView) -> None:
        """Queues the front: tags, figures, tables, models, and the numbers on the search's run."""
        on_front = {point.trial for point in view.front}
        members = [s for s in stored.shown() if s.number in on_front]
        study = studies.study_name(self.name, stored.shown_rung)
        keys = [tracking.trial_key(study, s.own) for s in members]
        folders = {key: stored.folder(member.result) for key, member in zip(keys, members, strict=True)}
        files = front_files(view)
        numbers = {"hypervolume": view.hypervolume, "front_size": float(len(view.front))}
        if view.controls:
            numbers["controls_hypervolume"] = view.controls_hypervolume
        numbers |= {f"dense_{name}": value for name, value in view.dense.metrics.items()}
        ratios = [f"ratio/{group}" for group in view.sizes][:12]

        def front(tracker: tracking.Tracker) -> None:
            run = self._run_of(tracker)
            tracker.mark_front(self.name, keys)
            for key, folder in folders.items():
                if key in self.runs and folder is not None:
                    tracker.log_model_folder(self.runs[key], folder)
            tracker.log_front(run, files, metrics=numbers)
            cost = tracking.FRACTIONS[view.primary]
            self.charts = tracker.write_chart_view(self.name, rung=stored.shown_rung, cost=cost, params=ratios)
            tracker.finish_search(run, numbers)

        self._recorder.put(front, what="the front")

    def stop(self, status: str) -> None:
        """Queues the end of a search that did not finish."""

        def end(tracker: tracking.Tracker) -> None:
            tracker.finish_search(self._run_of(tracker), {}, status=status)

        self._recorder.put(end, what="the end of the search")

    def close(self, timeout: float) -> int:
        """Waits for what is queued, for up to `timeout` seconds; returns how many records are left undone."""
        return self._recorder.close(timeout)

    def links(self, rung: str) -> dict[int, str]:
        """Returns the address of each recorded trial's run page, by the trial's number in its study."""
        study = studies.study_name(self.name, rung)
        with self._lock:
            runs = dict(self.runs)
        if self._tracker is None:
            return {}
        return {
            int(key.rpartition("/")[2]): self.address + self._tracker.run_link(run)
            for key, run in runs.items()
            if key.startswith(f"{study}/")
        }

    def _run_of(self, tracker: tracking.Tracker) -> str:
        """Returns the run of the search, made on first use."""
        if self.search_run is None:
            self.search_run = tracker.open_search(self.name, params=self._params, tags=self._tags)
        return self.search_run

    def _connect(self) -> tracking.Tracker:
        tracker = tracking.Tracker(
            self.uri,
            self.name,
            artifact_root=tracking.artifact_root(self.uri),
            description=(
                f"Pruning-policy search **{self.name}**. The run of kind `search` holds the front, its plot and its"
                " tables; every trial is a run of kind `trial`; those with the tag `pareto = true` are the front."
            ),
            environment=tracking.environment_tags(),
        )
        self._tracker = tracker
        return tracker


def run_name(rung: str, trial: StoredTrial) -> str:
    """Returns what a trial's run is called: trials of the rung that touches the test set go by the number that people
    use, that of the trial which they come from.
    """
    if rung == CONTROLS:
        return f"control {trial.origin} {trial.number}"
    tested = trial.result is not None and trial.result.fidelity.test
    return f"trial {trial.origin} {rung}" if tested and isinstance(trial.origin, int) else f"{rung} {trial.number}"


def front_files(view: SearchView) -> dict[str, str | bytes]:
    """Returns the files that tell a front: interactive figures, pictures and tables."""
    files: dict[str, str | bytes] = {
        "front.html": report.figure_html(report.front_figure(view)),
        "widths.html": report.figure_html(report.widths_figure(view)),
        "front.csv": report.front_table(view).to_csv(index=False),
        "groups.csv": report.group_table(view).to_csv(index=False),
        "controls.csv": report.controls_table(view).to_csv(index=False),
        "front.txt": report.render_front(view),
    }
    with tempfile.TemporaryDirectory(prefix="autoprune-") as scratch:
        for name, draw in {"front.png": report.front_png, "widths.png": report.widths_png}.items():
            path = Path(scratch) / name
            draw(view, path)
            files[name] = path.read_bytes()
    return files
