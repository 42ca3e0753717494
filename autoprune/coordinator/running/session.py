"""A search from its settings to its front.

Decides the order: prepare the network, open the studies, run the ladder and the controls, record, show. The same call
resumes a search that was stopped at any moment.
"""

from __future__ import annotations

import datetime
import math
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
from autoprune.coordinator.running.preparation import Prepared, prepare
from autoprune.coordinator.running.workers import Workers, executor_of, threads
from autoprune.coordinator.stored.background import Background, curves_of, pack
from autoprune.coordinator.stored.display import view_of
from autoprune.coordinator.stored.places import make_home, models_path
from autoprune.coordinator.stored.search import StoredSearch, facts_of, read_search
from autoprune.coordinator.stored.setup import setup_of
from autoprune.errors import DataError, LeaseError
from autoprune.executors import Executor, Limits
from autoprune.network import preparing
from autoprune.network.devices.device import device_name
from autoprune.network.devices.formats import precision_text
from autoprune.network.models.checkpoints import file_digest
from autoprune.network.plausibility import doubts
from autoprune.pareto import front_indices
from autoprune.report import SearchView
from autoprune.results import WarmStart
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
        prepared = prepare(space, ingredients, sections=sections, home=home, note=progress.note)
        session = Session(prepared, progress=progress, log=log)
        return session.run(workers=workers, deadline=deadline, trials=trials, summary=summary)


class Session:
    """One call of a search that is prepared."""

    def __init__(self, prepared: Prepared, *, progress: report.Progress, log: SearchLog) -> None:
        self.prepared = prepared
        self.space = prepared.space
        self.home = prepared.home
        self.problem = prepared.problem
        self.storage = prepared.storage
        self.bench = prepared.bench
        self.progress = progress
        self.log = log
        progress.objective = log.objective = prepared.problem.objective
        self._studies: dict[str, Any] = {}

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
            watches=self.prepared.watches,
            objective=self.problem.objective,
        )
        try:
            kind = type(executor).__name__.removesuffix("Executor").lower()
            fingerprint = self.prepared.fingerprint
            self.log.started(executor=kind, workers=executor.workers, device=self.bench.device, fingerprint=fingerprint)
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
            fingerprint=self.prepared.fingerprint,
            settings=self.prepared.sections,
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
            "fingerprint": self.prepared.fingerprint,
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
            samples={name: len(split) for name, split in bench.splits.parts.items()},
            classes=bench.splits.num_classes,
            accuracy=self._counts,
            objective=self.problem.objective,
            origin=str(bench.origin.get("name") or bench.origin.get("factory") or bench.origin.get("class")),
            data="given in Python" if at_hand else str(data.name or data.factory),
            device=device_name(bench.device),
            environment=tracking.environment_tags(),
            began=datetime.datetime.now().astimezone(),
        )

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
                trial, result = event.trial, event.trial.result
                finished.append(trial.number)
                accuracy = result.metrics["val_accuracy"] if result else None
                cost = self._cost(result.costs) if result else None
                if trial.reused is None:
                    self.progress.trial_finished(val_accuracy=accuracy, cost=cost)
                if result:
                    self.progress.note_once(result.notes)
                if trial.reason:
                    self.progress.note(f"{event.rung} trial {trial.number} failed: {trial.reason}", passed_on=False)
                records.trial(event.rung, trial, dense_metrics=dense)
                if result is None or len(finished) >= _FIRST:
                    score_dense()
            else:
                self.progress.rung_finished()
                score_dense()

        def run(ladder: LadderPlan) -> bool:
            return studies.run_ladder(
                self.storage,
                ladder,
                submit=executor.submit,
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
        controls = controls_plan(plan, self.bench, count=self.space.search.controls)
        if controls is not None:
            complete &= run(controls)
        if (count := self.space.search.scratch) > 0:
            scratch = scratch_plan(plan, read_search(self.space.name, home=self.home), count=count)
            if scratch is not None:
                complete &= run(scratch)
        return complete

    def _mark(self, event: RungStarted) -> None:
        """Stores what `autoprune status` tells of a search that runs."""
        studies.write_total(self._study(event.rung), event.total)
        first = self._study(self.space.search.ladder[0].rung)
        studies.write_current(first, event.rung)
        studies.write_objective(first, self.problem.objective)
        studies.write_complete(first, False)

    def _cost(self, costs: Mapping[str, int]) -> float:
        return float(costs[self.problem.budget.primary])

    def _trials(self, rung: str) -> Sequence[studies.StoredTrial]:
        study = self._study(rung)
        return [t for t in studies.read_trials(study, self.problem) if not t.abandoned]

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
        stages = {group.name: group.stage for group in self.prepared.network.groups}
        conditions = self.bench.conditions
        latency = asdict(conditions) | {"device": device_name(conditions.device)}
        if self.prepared.table is not None:
            latency["error"] = self.prepared.table.error
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
        models = models_path(self.home, self.space.name)
        if not models.is_dir():
            return
        keep = {Path(s.result.model_path).name for s in stored.shown(stored.order[-1]) if s.result.model_path}
        picked = stored.shown(stored.picked_rung)
        points = [(s.result.val_error, self._cost(s.result.costs)) for s in picked]
        front = [picked[i] for i in front_indices(points)]
        keep |= {Path(s.result.model_path).name for s in front if s.result.model_path}
        for folder in models.iterdir():
            if folder.name not in keep:
                shutil.rmtree(folder, ignore_errors=True)
