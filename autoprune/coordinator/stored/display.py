"""A stored search as the report sees it: its view, its points, its layers, and notes on how far numbers hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from autoprune import report, studies
from autoprune.coordinator.stored.background import Background
from autoprune.coordinator.stored.search import CONTROLS, DENSE, SCRATCH, Shown, StoredSearch, audits_of, model_key
from autoprune.policy import CHANNEL
from autoprune.report import FrontPoint, SearchView


def layer_rows(stored: StoredSearch, trial: int) -> list[report.LayerRow]:
    """Returns a trial's layers before and after, as its saved model tells.

    Raises:
        StudyError: There is no such trial, or its model was not kept.
    """
    from autoprune.network.artifacts.saved import read_document

    document = read_document(stored.model_path(trial))
    return [report.LayerRow(**row) for row in document["layers"]]


def view_of(stored: StoredSearch, *, notes: Sequence[str] = ()) -> SearchView:
    """Returns the view of a search's shown rung, controls included where they ran the same recipe."""
    facts, background = stored.facts, stored.background
    metrics = dict(facts["dense_metrics"]) | dict(stored.measured.get(DENSE, {}))
    shown = stored.shown()
    dense = FrontPoint(
        trial=None,
        val_accuracy=metrics.get("val_accuracy", float("nan")),
        costs=facts["dense_costs"],
        widths=facts["sizes"],
        test_accuracy=metrics.get("test_accuracy") if any("test_accuracy" in s.result.metrics for s in shown) else None,
        origin="dense",
        metrics=metrics,
    )
    rung: Mapping[str, Any] = next((r for r in facts["rungs"] if r["rung"] == stored.shown_rung), {})
    last = stored.shown_rung == stored.order[-1]
    beside = (CONTROLS, SCRATCH) if last else ()
    controls = [t for rung in beside for t in studies.distinct(stored.rungs.get(rung, ()))]
    return SearchView(
        name=stored.name,
        rung=stored.shown_rung,
        dense=dense,
        trials=tuple(point_in(stored, s) for s in shown),
        sizes=facts["sizes"],
        controls=tuple(
            report.point_of(t.result, trial=None, origin=t.source) for t in controls if t.result is not None
        ),
        primary=facts["primary"],
        reference=(float(facts["reference"][0]), float(facts["reference"][1])),
        limits=facts["limits"],
        samples=_samples(background, rung.get("images")),
        notes=(
            *filter(None, [stored.objective.note]),
            *doubt_notes(facts),
            *latency_notes(facts),
            *audit_notes(stored),
            *notes,
        ),
        pruning=facts.get("pruning", CHANNEL),
        seeds=rung.get("seeds", 1),
        objective=stored.objective,
    )


def _samples(background: Background | None, images: int | None) -> dict[str, int]:
    """Returns how many samples of each split the shown accuracies are fractions of; nothing where nobody knows."""
    if background is None or not background.accuracy:
        return {}
    samples = dict(background.samples)
    if images is not None and "val" in samples:
        samples["val"] = min(samples["val"], images)
    return samples


def point_in(stored: StoredSearch, shown: Shown) -> FrontPoint:
    """Returns a trial as the report sees it, with what was measured of it after the search."""
    point = report.point_of(shown.result, trial=shown.number, origin=shown.source)
    return replace(point, metrics={**point.metrics, **stored.measured.get(model_key(shown.result), {})})


def latency_notes(facts: Mapping[str, Any]) -> list[str]:
    """Returns a sentence on how latency was measured, and one on how well the table predicts it."""
    known = facts.get("latency")
    if known is None:
        return []
    threads = f", {known['threads']} thread{'s' if known['threads'] > 1 else ''}" if known["device"] == "cpu" else ""
    notes = [f"Latency: batch {known['batch']}, {known['dtype']}, {known['device']}{threads}."]
    if "error" in known:
        notes.append(f"The latency table's median error on networks that it had not seen is {known['error']:.1%}.")
    return notes


def doubt_notes(facts: Mapping[str, Any]) -> list[str]:
    """Returns why the dense network's score may not mean what it seems to mean."""
    return [f"Warning: {sentence}." for sentence in facts.get("warnings", ())]


def audit_notes(stored: StoredSearch) -> list[str]:
    """Returns a sentence for every two rungs in a row: how well the first one ranks what the second one measured."""
    notes = []
    for first, second, audit in audits_of(stored):
        if audit.tau is None or audit.regret is None:
            continue
        notes.append(
            f"Proxy audit {first} → {second}: Kendall τ {audit.tau:.2f} over {audit.pairs} policies,"
            f" regret {stored.objective.regret(audit.regret)}."
        )
        if audit.warning:
            notes.append(f"Warning: {audit.warning}")
    return notes
