"""What a search writes to MLflow, and when.

Decides which records a search makes: one run a trial, one a search with the front, the figures and the tables. MLflow
being away delays them and stops nothing; whatever is missing is found by comparing the studies with MLflow, and
recorded once.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from autoprune import report, studies, tracking
from autoprune.coordinator.recording.registering import finetuned_registration, registration
from autoprune.coordinator.stored.report_page import page_of
from autoprune.coordinator.stored.search import CONTROLS, SCRATCH, StoredSearch
from autoprune.coordinator.stored.setup import Setup
from autoprune.objective import ACCURACY, Objective
from autoprune.policy import CHANNEL, caveat
from autoprune.report import SearchView
from autoprune.report.markdown import search_markdown
from autoprune.results import TrialResult, not_faster
from autoprune.studies import StoredTrial

SPACE_FILE = "space.json"
"""The artifact of a search's run that holds the space as run; `autoprune search space.json` runs it again."""
_COLUMNS = ("val_accuracy", "latency_ms", "size_bytes", "params_fraction", "macs_fraction")
"""What the list of runs shows beside the primary cost."""


class Records:
    """Records one search. `runs` maps trial keys to the ids of their runs, as far as they are recorded.

    `versions` maps the front's trial keys to the versions of the registered model, once they are registered.
    """

    def __init__(
        self,
        name: str,
        setup: Setup,
        *,
        home: Path,
        say: Callable[[str], None],
        opens: bool = True,
        watches: bool = False,
        objective: Objective = ACCURACY,
    ) -> None:
        """Starts recording; with `opens` the search's own run is made or set running, as a search does at once.

        With `watches` that run gets system metrics until it ends. `objective` is what the search maximises.
        """
        self.name = name
        self.objective = objective
        self.setup = setup
        self.caveat = caveat(str(setup.space.get("pruning", CHANNEL)))
        self.home = home
        self.uri = tracking.resolve_uri(home, os.environ)
        self.address = tracking.ui_address(self.uri)
        self.runs: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.charts: str | None = None
        self.search_run: str | None = None
        self._said: set[str] = set()
        self._tracker: tracking.Tracker | None = None
        self._lock = threading.Lock()
        self._unwatch: Callable[[], None] | None = None
        self._recorder = tracking.Recorder(self._connect, say=say)
        if opens:
            self._recorder.put(self._run_of, what="the search")
        if watches:
            self._recorder.put(self._watch, what="system metrics")

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
            result.costs, result.metrics, dense_costs=self.setup.dense, dense_metrics=dense
        )
        record = tracking.TrialRecord(
            search=self.name,
            study=study,
            number=trial.number,
            rung=rung,
            policy=trial.policy,
            result=trial.result,
            dense=self.setup.dense,
            origin=str(trial.origin),
            state="complete" if trial.state == "complete" else "fail",
            reason=trial.reason or "",
            scopes=self.setup.scopes,
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
        study = studies.study_name(self.name, stored.shown_rung)
        shown = {s.number: tracking.trial_key(study, s.own) for s in stored.shown()}
        keys = {number: key for number, key in shown.items() if number in on_front}
        files = front_files(view) | {"report.html": page_of(stored, view)}
        numbers = {"hypervolume": view.hypervolume, "front_size": float(len(view.front))}
        if view.controls:
            numbers["controls_hypervolume"] = view.controls_hypervolume
        numbers |= {f"dense_{name}": value for name, value in view.dense.metrics.items()}
        ratios = [f"ratio/{group}" for group in view.sizes][:12]
        register = registration(stored, view, export=self._export_command("--trial {trial}", "TRIAL={trial}"))

        def front(tracker: tracking.Tracker) -> None:
            run = self._run_of(tracker)
            if tracker.keep_one_run_each(self.name):
                known = tracker.known_trials(self.name)
                with self._lock:
                    self.runs.update({key: known[key] for key in self.runs if key in known})
            tracker.mark_front(self.name, list(keys.values()))
            with self._lock:
                runs = dict(self.runs)
            links = {number: tracker.run_link(runs[key]) for number, key in shown.items() if key in runs}
            page = report.figure_html(report.front_figure(view, links=links), address=self.address)
            tracker.log_front(run, files | {"front.html": page}, metrics=numbers)
            cost = tracking.FRACTIONS[view.primary]
            self.charts = tracker.write_chart_view(
                self.name, rung=stored.shown_rung, cost=cost, params=ratios, objective=view.objective
            )
            columns = [name for name in _COLUMNS if name != cost]
            listing = tracker.write_list_view(self.name, rung=stored.shown_rung, metrics=[*columns, cost])
            self.versions = register(tracker, runs)
            text = self._description(tracker, view, run=run, listing=listing, links=links)
            tracker.describe(text, run_id=run)
            tracker.describe(text)
            self._end_watch()
            tracker.finish_search(run, numbers)

        self._recorder.put(front, what="the front")

    def finetuned(self, number: int, folder: Path, result: TrialResult, *, origin: str) -> None:
        """Queues a model that was trained longer: a run of its own and a version with the alias `finetuned`.

        Args:
            number: Its number among the search's.
            folder: The model.
            result: What was measured.
            origin: Key of the trial that it comes from.
        """
        study = studies.study_name(self.name, result.fidelity.rung)
        record = tracking.TrialRecord(
            search=self.name,
            study=study,
            number=number,
            rung=result.fidelity.rung,
            policy=result.policy,
            result=result,
            dense=self.setup.dense,
            origin=origin,
            scopes=self.setup.scopes,
            tags={"finetuned_from": origin},
            name=f"finetune {number} of {origin.removeprefix(f'{self.name}.')}",
        )
        own, key = self.objective, record.key
        register = finetuned_registration(self.name, key, folder, result, origin=origin, objective=own)

        def finetuned(tracker: tracking.Tracker) -> None:
            run_id = tracker.record_trial(record)
            before = tracker.find_run(self.name, origin)
            tracker.set_tags(run_id, {"finetuned_from.run": before} if before else {})
            register(tracker, run_id)

        self._recorder.put(finetuned, what=f"the fine-tuned model {number}")

    def stop(self, status: str) -> None:
        """Queues the end of a search that did not finish."""

        def end(tracker: tracking.Tracker) -> None:
            self._end_watch()
            tracker.finish_search(self._run_of(tracker), {}, status=status)

        self._recorder.put(end, what="the end of the search")

    def close(self, timeout: float) -> int:
        """Waits for what is queued, for up to `timeout` seconds; returns how many records are left undone."""
        left = self._recorder.close(timeout)
        threading.Thread(target=self._end_watch, daemon=True).start()  # it may wait for a store that is away
        return left

    @property
    def refused(self) -> tuple[tracking.Refused, ...]:
        """What MLflow would not take, and why."""
        return self._recorder.refused

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

    def _watch(self, tracker: tracking.Tracker) -> None:
        self._unwatch = tracking.watch_machine(tracker.uri, self._run_of(tracker))

    def _end_watch(self) -> None:
        with self._lock:
            end, self._unwatch = self._unwatch, None
        if end is not None:
            end()

    def _run_of(self, tracker: tracking.Tracker) -> str:
        """Returns the run of the search, made on first use."""
        if self.search_run is None:
            run = tracker.open_search(self.name, params=self.setup.params, tags=self.setup.facts)
            tracker.log_files(run, {SPACE_FILE: json.dumps(self.setup.space, indent=1) + "\n"})
            self.search_run = run
        return self.search_run

    def _description(
        self, tracker: tracking.Tracker, view: SearchView, *, run: str, listing: str, links: Mapping[int, str]
    ) -> str:
        front, whole = (
            tracker.run_link(run).replace("?", f"/artifacts/front/{file}?") for file in ("front.html", "report.html")
        )
        pages = {"charts": self.charts or "", "list of runs": listing, "interactive front": front, "report": whole}
        if self.versions:
            pages["registered models"] = f"/#/models/{tracking.registered_name(self.name)}?{tracking.WORKFLOW}"
        return search_markdown(
            view,
            links=links,
            pages={name: page for name, page in pages.items() if page},
            picture=f"get-artifact?path=front/front.png&run_uuid={run}",
            commands=f"Then `{self._export_command()}` writes it to disk.",
        )

    def _export_command(self, options: str = "", variables: str = "") -> str:
        """Returns the command that exports: by make where its targets find this search."""
        if Path("mlflow/server.env").is_file():
            return f"make export NAME={self.name} {variables}".rstrip()
        return f"autoprune export {self.name} {options}".rstrip()

    @property
    def _says(self) -> str:
        """A sentence about a metric of the user's own, which MLflow holds under the keys of an accuracy."""
        note, name = self.objective.note, self.objective.name
        return f"{note} The metrics `val_accuracy` and `test_accuracy` hold {name}."

    def _connect(self) -> tracking.Tracker:
        tracker = tracking.Tracker(
            self.uri,
            self.name,
            artifact_root=tracking.artifact_root(self.uri, home=self.home),
            description=(
                f"Pruning-policy search **{self.name}**. The run of kind `search` holds the front, its plot and its"
                " tables; every trial is a run of kind `trial`; those with the tag `pareto = true` are the front."
                + (f" {self.caveat}" if self.caveat else "")
                + (f" {self._says}" if self.objective.note else "")
            ),
            environment=tracking.environment_tags(),
        )
        self._tracker = tracker
        return tracker


def run_name(rung: str, trial: StoredTrial) -> str:
    """Returns what a trial's run is called: trials of the rung that touches the test set go by the number that people
    use, that of the trial which they come from.
    """
    if rung in (CONTROLS, SCRATCH):
        return f"control {trial.origin} {trial.number}"
    tested = trial.result is not None and trial.result.fidelity.test
    return f"trial {trial.origin} {rung}" if tested and isinstance(trial.origin, int) else f"{rung} {trial.number}"


def front_files(view: SearchView) -> dict[str, str | bytes]:
    """Returns the files that tell a front, but for its interactive figure, which leads to runs: pictures and tables."""
    files: dict[str, str | bytes] = {
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
