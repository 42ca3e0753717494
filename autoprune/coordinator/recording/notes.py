"""What the Optuna dashboard says about a search: a note for every rung's study and for every trial.

Decides the words. A note that a person has edited is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoprune import studies
from autoprune.coordinator.recording.records import Records
from autoprune.coordinator.stored.search import CONTROLS, DENSE, SCRATCH, StoredSearch, model_key
from autoprune.objective import Objective
from autoprune.report import SearchView, point_of
from autoprune.report.markdown import front_markdown, table, widths_markdown
from autoprune.results import TrialResult, not_faster
from autoprune.studies import StoredTrial

NO_FASTER = "Its MACs fell, but its measured latency did not, beyond the spread of the measurement."


def write_notes(storage: Any, stored: StoredSearch, view: SearchView, records: Records) -> None:
    """Writes the notes of a search's studies and trials, with links to MLflow where the runs are recorded."""
    for rung in stored.rungs:
        links = records.links(rung)
        study = studies.load_rung(storage, stored.name, rung)
        trials = [trial for trial in stored.rungs[rung] if trial.result is not None]
        slow = no_faster(stored, rung)
        notes = {t.number: trial_note(t, view, links.get(t.number), slow=t.number in slow) for t in trials}
        studies.write_notes(study, notes)
        studies.write_study_note(study, study_note(stored, view, rung, records))


def no_faster(stored: StoredSearch, rung: str) -> list[int]:
    """Returns a rung's own numbers of trials whose MACs fell and whose measured latency did not."""
    metrics = {**stored.facts["dense_metrics"], **stored.measured.get(DENSE, {})}
    costs = stored.facts["dense_costs"]
    found = []
    for trial in stored.rungs[rung]:
        if trial.result is None:
            continue
        own = {**trial.result.metrics, **stored.measured.get(model_key(trial.result), {})}
        if not_faster(trial.result.costs, own, dense_costs=costs, dense_metrics=metrics):
            found.append(trial.number)
    return found


def trial_note(trial: StoredTrial, view: SearchView, link: str | None, *, slow: bool = False) -> str:
    """Returns a trial's note: its MLflow run, where it comes from, its costs, and what it keeps of every group.

    With `slow` it says that the network is no faster than the dense one.
    """
    result = trial.result
    assert result is not None
    origin = f"trial {trial.origin} of the rung before" if isinstance(trial.origin, int) else trial.origin
    point = point_of(result, trial=trial.number)
    costs = [[cost, f"{result.costs[cost]:,}", f"{100 * view.fraction(point, cost):.1f}%"] for cost in view.costs]
    criteria = {group: choice.criterion for group, choice in result.policy.choices.items()}
    scores = _scores(result, view.objective)
    parts = [
        " · ".join([*([f"[MLflow run]({link})"] if link else []), f"proposed by: {origin}", scores]),
        *([NO_FASTER] if slow else []),
        table(["cost", "pruned", "of dense"], costs),
        widths_markdown(view.sizes, result.widths, criteria),
    ]
    return "\n\n".join(parts)


def study_note(stored: StoredSearch, view: SearchView, rung: str, records: Records) -> str:
    """Returns the note of a rung's study: what it is for, the front, where MLflow is, and how to pick."""
    facts: Mapping[str, Any] = next((r for r in stored.facts["rungs"] if r["rung"] == rung), {})
    how = {0: "no fine-tuning"}.get(facts.get("epochs", 0), f"{facts.get('epochs', 0):g} epochs of fine-tuning")
    if rung == CONTROLS:
        how = "simple policies under the last rung's recipe, to compare with"
    elif rung == SCRATCH:
        how = "points of the front, trained from random weights by the last rung's recipe, to compare with"
    parts = [
        f"**{stored.name}**, rung `{rung}` of {' → '.join(stored.order)}: {how}. Objectives:"
        f" {view.objective.error} and {view.primary} as a fraction of dense, both as small as possible."
        + f" {view.objective.note}".rstrip(),
        front_markdown(view, {}),
        f"The front is that of the rung `{view.rung}`. Numbers are those of `{stored.picked_rung}`. Pick one in MLflow"
        f" (the alias `picked`), or by `autoprune pick {stored.name} --trial N`.",
    ]
    if records.charts:
        parts.append(f"[Charts in MLflow]({records.address}{records.charts})")
    return "\n\n".join(parts)


def _scores(result: TrialResult, objective: Objective) -> str:
    names = {
        "val_accuracy_pruned": "after surgery",
        "val_accuracy_recalibrated": "after repair",
        "val_accuracy": f"final {objective.long('val')}",
        "test_accuracy": "test",
    }
    metrics = result.metrics
    found = [f"{text} {objective.text(metrics[name], 2)}" for name, text in names.items() if name in metrics]
    return ", ".join(found) + objective.hint
