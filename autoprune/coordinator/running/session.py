"""A search from its settings to its front.

Decides the order: prepare the network, open the studies, run the ladder and the controls, record, show. The same call
resumes a search that was stopped at any moment.
"""

from __future__ import annotations

import datetime
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autoprune import report, studies, tracking
from autoprune.coordinator.recording.notes import write_notes
from autoprune.coordinator.recording.records import Records
from autoprune.coordinator.running.controls import controls_plan, scratch_plan
from autoprune.coordinator.running.ending import ending_text
from autoprune.coordinator.running.fidelity import fidelity_of_rung
from autoprune.coordinator.running.log import SearchLog
from autoprune.coordinator.running.measuring import measure_front
from autoprune.coordinator.running.workers import Workers, executor_of, threads
from autoprune.coordinator.stored.background import Background, curves_of, pack
from autoprune.coordinator.stored.display import view_of
from autoprune.coordinator.stored.places import make_home, models_path, storage_path
from autoprune.coordinator.stored.search import StoredSearch, facts_of, read_search
from autoprune.coordinator.stored.setup import setup_of
from autoprune.errors import DataError, LeaseError, StudyError
from autoprune.executors import Executor, Limits
from autoprune.network import preparing, settings
from autoprune.network.devices.device import device_name
from autoprune.network.devices.formats import precision_text
from autoprune.network.graph.network import Network
from autoprune.network.latency.cache import latency_table
from autoprune.network.latency.table import LatencyTable
from autoprune.network.models.checkpoints import file_digest
from autoprune.network.plausibility import doubts
from autoprune.network.workbench import Workbench
from autoprune.objective import objective_of
from autoprune.pareto import front_indices
from autoprune.policy import digest
from autoprune.report import SearchView
from autoprune.results import Fidelity, Problem, WarmStart
from autoprune.space import Space
from autoprune.studies import LadderPlan, RungPlan, RungStarted, TrialFinished
from autoprune.studies.warmstart import warm_starts

_WARM_STARTS = 24
"""Most warm starts, 15 of them additive solutions: more only delay what is learned from them (`make samplers`)."""
_FIRST = 5
"""Candidates that are screened before the dense network is scored: a front comes first, on 5,000 images by 6 s."""
_PATIENCE = 120.0
"""Seconds that the end of a search waits for MLflow."""


@dataclass(frozen=True)
class SearchOutcome:
    """A search that ended. `complete` is False where its deadline ended it; `text` is what a person reads."""

    name: str
    text: str
    view: SearchView
    stored: StoredSearch
    complete: bool

    @property
    def front(self) -> tuple[report.FrontPoint, ...]:
        """The trials that no other trial dominates, in order of rising cost."""
        return self.view.front

    def model_path(self, trial: int) -> Path:
        """Returns the folder of a trial's model, for `autoprune.load`.

        Raises:
            StudyError: There is no such trial, or its weights were not kept.
        """
        return self.stored.model_path(trial)


def run_search(
    space: Space, *, home: Path, workers: Workers, timeout: float | None, trials: int | None, summary: bool
) -> SearchOutcome:
    """Searches as a space file says; shows its progress on stderr.

    Args:
        space: The settings.
        home: Folder of the studies, models and caches.
        workers: Processes that evaluate, so that none of them can take the search down with it. None: as many as suit
            the device. Or this process, or the Ray cluster that evaluates.
        timeout: Seconds after which nothing more is started.
        trials: Candidates on the first rung, instead of the space's.
        summary: Whether the outcome's text shows the knee's layers before and after.

    Raises:
        InputError: Something that the settings name cannot be used, the study belongs to other settings, or `home`
            cannot be written.
        TrialError: Too many trials fail.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    make_home(home)
    with SearchLog(home, space.name) as log, report.Progress(on_note=log.note) as progress:
        progress.note(f"search {space.name}: preparing")
        ingredients = preparing.ingredients_of(space, cache=home / "cache")
        sections = space.fingerprint_sections()
        if space.checkpoint is not None:
            sections["checkpoint"] = file_digest(space.checkpoint)
        return Session(space, ingredients, sections=sections, home=home, progress=progress, log=log).run(
            workers=workers, deadline=deadline, trials=trials, summary=summary
        )


class Session:
    """One call of a search."""

    def __init__(
        self,
        space: Space,
        ingredients: preparing.Ingredients,
        *,
        sections: Mapping[str, str],
        home: Path,
        progress: report.Progress,
        log: SearchLog,
    ) -> None:
        self.space = space
        self.log = log
        self.home = home
        self.progress = progress
        self.sections = dict(sections)
        self.network: Network = preparing.trace_ingredients(
            ingredients, space, cache=home / "cache", note=progress.note
        )
        groups = settings.searchable_groups(self.network, space)
        self.table: LatencyTable | None = None
        if space.budget.limits_latency:
            table = latency_table(self.network, space, cache=home / "cache", note=progress.note)
            self.network = self.network.with_latency(table.surfaces)
            self.sections["latency_table"] = digest([asdict(surface) for surface in table.surfaces])
            self.table = table
        objective = progress.objective = log.objective = objective_of(ingredients.metric)
        self.problem: Problem = replace(settings.problem_of(self.network, groups, space), objective=objective)
        self.models = models_path(home, space.name)
        _check_apart(home)
        self._studies: dict[str, Any] = {}
        self.storage = studies.open_storage(storage_path(home), say=progress.note)
        self._check()
        if objective.note:
            progress.note(objective.note)
        self.watches = tracking.watches_machine(os.environ)
        preparing.train_baseline(space, ingredients, cache=home / "cache", note=progress.note)
        self.bench: Workbench = preparing.workbench_of(
            space, ingredients, self.network, cache=home / "cache", models=self.models, note=progress.note
        )

    def run(self, *, workers: Workers, deadline: float | None, trials: int | None, summary: bool) -> SearchOutcome:
        """Runs the ladder and the controls, records and shows them. See `run_search` for the arguments.

        The lease of the search is held throughout, so that no other process takes one that measures its front, or waits
        for MLflow, for stopped.
        """
        limits = Limits(self.space.search.trial_timeout, self.space.search.hang_timeout)
        with executor_of(self.bench, workers, limits=limits, cache=self.home / "cache") as executor:
            plan = self._plan(executor.workers, trials or self.space.search.trials)
            self.background = self._background(executor.workers, threads(workers, executor.workers))
            with studies.hold_search(self.storage, plan):
                return self._run(plan, executor, deadline, summary=summary)

    def _run(self, plan: LadderPlan, executor: Executor, deadline: float | None, *, summary: bool) -> SearchOutcome:
        begun = time.monotonic()
        say = self.progress.note
        records = Records(
            self.space.name,
            self.background.setup,
            home=self.home,
            say=say,
            watches=self.watches,
            objective=self.problem.objective,
        )
        try:
            self._log_start(executor)
            complete = self._climb(plan, executor, records, deadline)
        except LeaseError:
            executor.close()
            records.close(0.0)  # what is left is the other process's to record
            raise
        except BaseException as error:
            executor.close()
            records.stop("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            records.close(10.0)
            raise
        executor.close()  # nothing runs beside the measurements
        stored = read_search(self.space.name, home=self.home)
        if measured := measure_front(self.bench, stored):
            study = studies.load_rung(self.storage, self.space.name, stored.order[0])
            studies.write_measured(study, measured)
            stored = replace(stored, measured={**measured, **stored.measured})
        self._forget_models(stored)
        studies.write_complete(self._study(stored.order[0]), complete)
        view = view_of(stored)
        if view.front:
            records.publish(stored, view)
        else:
            records.stop("FINISHED")
        left = records.close(_PATIENCE)
        write_notes(self.storage, stored, view, records)
        text = ending_text(stored, view, records, left=left, origin=self.bench.origin, layers=summary)
        if not complete:
            text += "\n\nThe time limit ended the search before its end; the same command goes on."
        self.progress.note(f"done in {time.monotonic() - begun:.0f} s")
        self.log.finished(complete=complete, front=len(view.front), hypervolume=view.hypervolume)
        return SearchOutcome(self.space.name, text, view, stored, complete)

    # --- before ---

    @property
    def fingerprint(self) -> str:
        """Stands for everything that decides a result."""
        return digest(self.sections)

    def _check(self) -> None:
        """Refuses a study of other settings before anything slow is done or written."""
        first = self.space.search.ladder[0].rung
        name = studies.study_name(self.space.name, first)
        if name in {study.study_name for study in self.storage.get_all_studies()}:
            studies.open_study(
                self.storage, name, self.problem, fingerprint=self.fingerprint, settings=self.sections, create=False
            )

    def _plan(self, workers: int, trials: int) -> LadderPlan:
        ladder = self.space.search.ladder
        rungs = tuple(RungPlan(fidelity_of_rung(rung), rung.trials if rung.trials else trials) for rung in ladder)
        starts: tuple[WarmStart, ...] = ()
        if self.space.search.warm_starts:
            tables, count = self.bench.knowledge.tables, max(1, min(_WARM_STARTS, trials // 2))
            starts = warm_starts(self.problem, self.bench.ranking(), tables, count=count)
        return LadderPlan(
            name=self.space.name,
            problem=self.problem,
            rungs=rungs,
            fingerprint=self.fingerprint,
            settings=self.sections,
            warm_starts=starts,
            sampler=self.space.search.sampler,
            seed=self.space.seed,
            workers=workers,
            tables=self.bench.knowledge.tables or None,
            samples=len(self.bench.splits.val) if self._counts else 0,
        )

    @property
    def _counts(self) -> bool:
        """Whether an accuracy is a fraction of samples, not a metric of the user's own."""
        return self.bench.metric is None and self.bench.splits.num_classes > 0

    def _background(self, workers: int, threads: int) -> Background:
        """Returns what is kept of this call; the setup's `facts` hold what its space leaves open and a number depends
        on.
        """
        bench, data = self.bench, self.space.data
        formats = {"precision": bench.precision, "training_precision": bench.training_precision}
        at_hand = not (bench.origin.get("name") or bench.origin.get("factory"))
        facts = {
            "fingerprint": self.fingerprint,
            "device": bench.device,
            "seed": str(self.space.seed),
            "workers": str(workers),
            "threads": str(threads),
            **{name: precision_text(precision) for name, precision in formats.items()},
            "at_hand": str(at_hand).lower(),
        }
        return Background(
            setup=setup_of(self.space, self.problem, at_hand=at_hand, facts=facts),
            groups=self.problem.groups,
            model=self.problem.cost_model,
            curves=curves_of(self.problem, bench.knowledge.tables),
            samples={name: len(getattr(bench.splits, name)) for name in ("train", "calibration", "val", "test")},
            classes=bench.splits.num_classes,
            accuracy=self._counts,
            objective=self.problem.objective,
            origin=str(bench.origin.get("name") or bench.origin.get("factory") or bench.origin.get("class")),
            data="given in Python" if at_hand else str(data.name or data.factory),
            device=device_name(bench.device),
            environment=tracking.environment_tags(),
            began=datetime.datetime.now().astimezone(),
        )

    def _log_start(self, executor: Executor) -> None:
        kind = type(executor).__name__.removesuffix("Executor").lower()
        device = self.bench.device
        self.log.started(executor=kind, workers=executor.workers, device=device, fingerprint=self.fingerprint)

    # --- during ---

    def _climb(self, plan: LadderPlan, executor: Executor, records: Records, deadline: float | None) -> bool:
        dense: dict[str, float] = {}
        finished: list[int] = []

        def score_dense() -> None:
            if not dense:
                dense.update(self._write_facts(plan))

        def told(event: studies.Event) -> None:
            self.log.told(event)
            if isinstance(event, RungStarted):
                self.progress.rung_started(event.rung, total=event.total, done=event.done)
                self._mark(event)
                if not dense:
                    self._write_background(plan)
                if event.done or plan.rungs[0].fidelity.epochs > 0:  # whose latencies are compared with the dense one
                    score_dense()
                for trial in self._trials(event.rung):
                    records.trial(event.rung, trial, dense_metrics=dense)
                    if trial.result is not None and trial.reused is None:
                        self.progress.trial_finished(
                            val_accuracy=trial.result.metrics["val_accuracy"],
                            cost=self._cost(trial.result.costs),
                            known=True,
                        )
            elif isinstance(event, TrialFinished):
                finished.append(event.number)
                accuracy = event.result.metrics["val_accuracy"] if event.result else None
                cost = self._cost(event.result.costs) if event.result else None
                if event.reused is None:
                    self.progress.trial_finished(val_accuracy=accuracy, cost=cost)
                if event.result:
                    self.progress.note_once(event.result.notes)
                if event.reason:
                    self.progress.note(f"{event.rung} trial {event.number} failed: {event.reason}", passed_on=False)
                records.trial(event.rung, self._trial(event), dense_metrics=dense)
                if event.result is None or len(finished) >= _FIRST:
                    score_dense()
            else:
                self.progress.rung_finished()
                score_dense()

        def submit(policy: Any, fidelity: Fidelity) -> Any:
            return executor.submit(policy, fidelity)

        def run(ladder: LadderPlan) -> bool:
            return studies.run_ladder(
                self.storage,
                ladder,
                submit=submit,
                identity=self.bench.identity,
                on_event=told,
                deadline=deadline,
                held=True,
            ).complete

        done = run(plan)
        score_dense()
        if not done:
            return False
        complete = True
        for beside in (self._controls, self._from_scratch):
            ladder = beside(plan)
            if ladder is not None:
                complete &= run(ladder)
        return complete

    def _mark(self, event: RungStarted) -> None:
        """Stores what `autoprune status` tells of a search that runs."""
        studies.write_total(self._study(event.rung), event.total)
        first = self._study(self.space.search.ladder[0].rung)
        studies.write_current(first, event.rung)
        studies.write_objective(first, self.problem.objective)
        studies.write_complete(first, False)

    def _controls(self, plan: LadderPlan) -> LadderPlan | None:
        return controls_plan(plan, self.bench, count=self.space.search.controls)

    def _from_scratch(self, plan: LadderPlan) -> LadderPlan | None:
        if self.space.search.scratch < 1:
            return None
        stored = read_search(self.space.name, home=self.home)
        return scratch_plan(plan, stored, count=self.space.search.scratch)

    def _cost(self, costs: Mapping[str, int]) -> float:
        return float(costs[self.problem.budget.primary])

    def _trials(self, rung: str) -> Sequence[studies.StoredTrial]:
        study = self._study(rung)
        return [t for t in studies.read_trials(study, self.problem) if not t.abandoned]

    def _trial(self, event: TrialFinished) -> studies.StoredTrial:
        return studies.read_trial(self._study(event.rung), event.number, self.problem)

    def _study(self, rung: str) -> Any:
        """Returns a rung's study; loading one reads what every study of the storage carries, so it is kept."""
        if rung not in self._studies:
            self._studies[rung] = studies.load_rung(self.storage, self.space.name, rung)
        return self._studies[rung]

    def _write_background(self, plan: LadderPlan) -> None:
        study = self._study(plan.rungs[0].fidelity.rung)
        studies.write_background(study, pack(self.background, before=studies.read_background(study)))

    def _write_facts(self, plan: LadderPlan) -> dict[str, float]:
        """Stores what readers need to know, once; returns the dense network's metrics."""
        study = self._study(plan.rungs[0].fidelity.rung)
        stored = studies.read_facts(study)
        if stored is not None:
            return dict(stored["dense_metrics"])
        last = plan.rungs[-1].fidelity
        dense = self.bench.dense_result(last)
        if not math.isfinite(dense["val_accuracy"]):
            raise DataError(f"the dense model scores {dense['val_accuracy']} on the validation data: it is not usable")
        if warning := self.problem.objective.warning(dense["val_accuracy"]):
            self.progress.note(warning)
        doubted = doubts(self.bench, dense, limit=last.images)
        for sentence in doubted:
            self.progress.note(f"warning: {sentence}")
        stages = {group.name: group.stage for group in self.network.groups}
        conditions = self.bench.conditions
        latency = asdict(conditions) | {"device": device_name(conditions.device)}
        if self.table is not None:
            latency["error"] = self.table.error
        facts = facts_of(
            self.problem,
            dense,
            [rung.fidelity for rung in plan.rungs],
            stages,
            latency=latency,
            pruning=self.space.pruning,
            warnings=doubted,
        )
        studies.write_facts(study, facts)
        return dense

    # --- after ---

    def _forget_models(self, stored: StoredSearch) -> None:
        """Deletes the weights of trials that no front needs; a point that is dominated never comes back."""
        if not self.models.is_dir():
            return
        keep = {Path(s.result.model_path).name for s in stored.shown(stored.order[-1]) if s.result.model_path}
        picked = stored.shown(stored.picked_rung)
        points = [(s.result.val_error, self._cost(s.result.costs)) for s in picked]
        front = [picked[i] for i in front_indices(points)]
        keep |= {Path(s.result.model_path).name for s in front if s.result.model_path}
        for folder in self.models.iterdir():
            if folder.name not in keep:
                shutil.rmtree(folder, ignore_errors=True)


def _check_apart(home: Path) -> None:
    """Refuses one database for both: Optuna and MLflow each keep a table `alembic_version` of their own."""
    tracked = tracking.resolve_uri(home, os.environ)
    if studies.same_database(str(storage_path(home)), tracked):
        raise StudyError(
            "the studies and MLflow need databases of their own (both keep a table of the same name): name another one"
            " by --storage or MLFLOW_BACKEND_STORE_URI"
        )
