"""The report of a search as one HTML page, put together from what is stored: no model and no data are read.

Decides what the page holds.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence

from autoprune import report
from autoprune.coordinator.stored.background import Background
from autoprune.coordinator.stored.explanations import explanation_of
from autoprune.coordinator.stored.search import CONTROLS, SCRATCH, Shown, StoredSearch, audits_of, results_of
from autoprune.errors import StudyError
from autoprune.prices import Explanation
from autoprune.report import PageData, RungPair, RungTime, SearchView, units

_MISSING = (
    "This search was made by a version that did not store this part. The same search, run again, repeats nothing and"
    " adds it."
)


def page_of(stored: StoredSearch, view: SearchView) -> str:
    """Returns the report of a search as the text of an HTML file."""
    background = stored.background
    chosen = [stored.find(p.trial) for _, p in report.chosen_points(view) if p.trial is not None]
    explanations, unexplained = _explained(stored, chosen)
    data = PageData(
        view=view,
        about=_about(stored, view),
        curves=background.curves if background is not None else {},
        explanations=explanations,
        unexplained=unexplained,
        policies={s.number: s.result.policy.id for s in chosen},
        pairs=_pairs(stored),
        times=_times(stored),
        failures=tuple(
            report.FailureRow(rung, failure.number, failure.source, failure.reason)
            for rung, failures in stored.failures.items()
            for failure in failures
        ),
        settings=background.setup.text if background is not None else "",
        commands=_commands(stored, [s.number for s in chosen]),
        missing=_MISSING if background is None else "",
    )
    return report.render_page(data)


def _explained(stored: StoredSearch, chosen: Sequence[Shown]) -> tuple[dict[int, Explanation], dict[int, str]]:
    """Returns the explanations of the chosen trials, and the reasons of those that have none."""
    found: dict[int, Explanation] = {}
    reasons: dict[int, str] = {}
    for shown in chosen:
        try:
            found[shown.number] = explanation_of(stored, shown)
        except StudyError as error:  # a report without this part is better than none; the page says why
            reasons[shown.number] = str(error)
    return found, reasons


def _about(stored: StoredSearch, view: SearchView) -> tuple[tuple[str, str], ...]:
    facts, background = stored.facts, stored.background
    limits = ", ".join(
        f"{units.LABELS[name]} ≤ {units.cost(name, limit)} ({limit / view.dense.costs[name]:.3g} of dense)"
        for name, limit in view.limits.items()
    )
    counts = ", ".join(f"{rung} {len(trials)}" for rung, trials in stored.rungs.items())
    spent = sum(sum(t.seconds.values()) for t in _times(stored))
    rungs = " → ".join(f"{rung['rung']} ({rung.get('epochs', 0):g} epochs)" for rung in facts["rungs"])
    pairs = [
        ("budget", limits or "none"),
        ("ladder", rungs),
        ("trials", counts),
        ("time", f"{units.seconds(spent)} of evaluations{_when(stored)}"),
    ]
    if background is None:
        return tuple(pairs)
    return (*_inputs(background), *pairs, *_machine(background))


def _inputs(background: Background) -> list[tuple[str, str]]:
    samples = ", ".join(f"{name} {count:,}" for name, count in background.samples.items())
    classes = f", {background.classes} classes" if background.classes else ""
    sizes = background.model.dense()
    model = f"{background.origin}, {units.quantity(sizes['macs'])} MACs, {units.quantity(sizes['params'])} parameters"
    return [("model", model), ("data", f"{background.data}{classes}"), ("samples", samples)]


def _machine(background: Background) -> list[tuple[str, str]]:
    tags = background.environment
    names = ("autoprune", "torch", "torchvision", "optuna", "mlflow", "python")
    versions = ", ".join(f"{name} {tags[f'version.{name}']}" for name in names if f"version.{name}" in tags)
    commit = tags.get("git_commit", "")[:12] + (" (changed)" if tags.get("git_dirty") == "true" else "")
    machine = f"{background.device}, {tags['platform']}" if "platform" in tags else background.device
    return [("device", machine), ("versions", versions), ("commit", commit)]


def _when(stored: StoredSearch) -> str:
    trials = [trial for trials in stored.rungs.values() for trial in trials]
    starts = [t.started for t in trials if t.started is not None]
    ends = [t.ended for t in trials if t.ended is not None]
    if not starts or not ends:
        return ""
    return f", from {min(starts):%Y-%m-%d %H:%M} to {max(ends):%Y-%m-%d %H:%M}"


def _pairs(stored: StoredSearch) -> tuple[RungPair, ...]:
    pairs = []
    for first, second, audit in audits_of(stored):
        if second not in stored.rungs:
            continue
        numbers = {t.identity: t.number for t in reversed(stored.rungs.get(first, ()))}
        before = {r.identity: r.metrics["val_accuracy"] for r in results_of(stored, first) if r.finite}
        after = {r.identity: r.metrics["val_accuracy"] for r in results_of(stored, second) if r.finite}
        points = tuple((numbers[i], before[i], after[i]) for i in before if i in after)
        pairs.append(RungPair(first, second, points, audit.tau, audit.regret, audit.warning, stored.objective))
    return tuple(pairs)


def _times(stored: StoredSearch) -> tuple[RungTime, ...]:
    order = [rung for rung in (*stored.order, CONTROLS, SCRATCH) if rung in stored.rungs]
    times = []
    for rung in order:
        evaluated = [t for t in stored.rungs[rung] if t.reused is None and t.result is not None]
        seconds: Counter[str] = Counter()
        for trial in evaluated:
            if trial.result is not None:
                seconds.update(trial.result.seconds)
        failed = len(stored.failures.get(rung, ()))
        span = _span([t.started for t in evaluated], [t.ended for t in evaluated])
        times.append(RungTime(rung, len(evaluated), failed, dict(seconds), span))
    return tuple(times)


def _span(starts: Sequence[datetime.datetime | None], ends: Sequence[datetime.datetime | None]) -> float | None:
    first, last = [s for s in starts if s is not None], [e for e in ends if e is not None]
    return (max(last) - min(first)).total_seconds() if first and last else None


def _commands(stored: StoredSearch, numbers: Sequence[int]) -> tuple[tuple[str, str], ...]:
    background = stored.background
    search = ("autoprune search space.yaml --workers 1", "with the settings below; one worker makes it repeatable")
    if background is not None and background.setup.at_hand:
        search = (f"autoprune.search(model, data=..., name={stored.name!r}, ...)", "in Python, with the settings below")
    commands = [search, (f"autoprune front {stored.name}", "the front")]
    if numbers:
        number = numbers[len(numbers) // 2]
        commands.append((f"autoprune explain {stored.name} --trial {number}", "why each group has its width"))
        commands.append((f"autoprune export {stored.name} --trial {number} --format onnx", "its model as a file"))
    return tuple(commands)
