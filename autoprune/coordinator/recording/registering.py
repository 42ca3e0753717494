"""Which models of a search are registered in MLflow, under which aliases, and what is said about them.

Decides the members (the front's kept models), their tags and descriptions, and which of them `smallest`,
`most-accurate` and `knee` name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune import studies, tracking
from autoprune.coordinator.stored.search import Shown, StoredSearch
from autoprune.cost import COSTS, LATENCY
from autoprune.objective import Objective
from autoprune.report import FrontPoint, SearchView
from autoprune.report.markdown import version_markdown
from autoprune.results import TrialResult

LOADER = "autoprune.network.serving"
"""The module by which MLflow loads a registered model."""
ALIASES = ("smallest", "most-accurate", "knee")
"""The aliases that a search sets; `picked` is the person's."""

FINETUNE = "finetune"
"""The rung of models that were trained longer after their search."""
FINETUNED = "finetuned"
"""The alias of the newest of them."""
_DESCRIPTION = (
    "The front of the pruning-policy search **{name}**: a version a network. Set the alias `picked` on the version"
    " that you want (type it, press Enter, save; the page shows it when it is loaded again), then export it."
)


@dataclass(frozen=True)
class Candidate:
    """A member of the front whose model was kept."""

    key: str
    folder: Path
    point: FrontPoint
    shown: Shown


def candidates(stored: StoredSearch, view: SearchView) -> list[Candidate]:
    """Returns the members of the front whose models were kept, in order of rising cost."""
    shown = {s.number: s for s in stored.shown()}
    study = studies.study_name(stored.name, stored.shown_rung)
    found = []
    for point in view.front:
        member = shown[point.trial] if point.trial is not None else None
        folder = stored.folder(member.result) if member is not None else None
        if member is not None and folder is not None:
            found.append(Candidate(tracking.trial_key(study, member.own), folder, point, member))
    return found


def aliases_of(view: SearchView, members: list[Candidate]) -> dict[str, str | None]:
    """Returns the key of the trial that each alias names; None where there is no such trial.

    There is no knee in a front of fewer than three points.
    """
    keys = {member.point.trial: member.key for member in members}
    named = {"smallest": view.front[:1], "most-accurate": view.front[-1:], "knee": [view.knee] if view.knee else []}
    return {alias: next((keys.get(p.trial) for p in named[alias]), None) for alias in ALIASES}


def version_tags(view: SearchView, member: Candidate) -> dict[str, str]:
    """Returns the numbers that the registry's table shows beside a version."""
    point, plain = member.point, view.objective.plain
    tags = {"trial": point.name, "rung": member.shown.rung, "val_accuracy": plain(point.val_accuracy)}
    if point.test_accuracy is not None:
        tags["test_accuracy"] = plain(point.test_accuracy)
    for cost in (c for c in view.costs if c in (*COSTS[:3], LATENCY)):
        tags[tracking.FRACTIONS[cost]] = f"{view.fraction(point, cost):.4f}"
    if "latency_ms" in point.metrics:
        tags["latency_ms"] = f"{point.metrics['latency_ms']:.4g}"
    return {**tags, "pareto": "true"}


def registration(stored: StoredSearch, view: SearchView, *, export: str) -> Callable[..., dict[str, str]]:
    """Returns the job that registers a front: a function of the tracker and of the runs of its trials.

    It makes a version for each member that has none, lets the aliases follow the front, and returns the number of every
    member's version by its trial's key. What is read from the disk is read now.

    Args:
        stored: The search.
        view: The same as the report sees it.
        export: The command that exports the trial `{trial}`.
    """
    members = candidates(stored, view)
    shapes = {member.key: _shapes(member.folder) for member in members}
    named = aliases_of(view, members)

    def register(tracker: tracking.Tracker, runs: Mapping[str, str]) -> dict[str, str]:
        recorded = [member for member in members if member.key in runs]
        if not recorded:
            return {}
        registry = tracker.registry(stored.name)
        registry.open(
            description=_DESCRIPTION.format(name=stored.name),
            tags={"autoprune.search": stored.name},
        )
        versions = registry.add(
            [
                tracking.Member(
                    key=member.key,
                    run_id=runs[member.key],
                    folder=member.folder,
                    tags=version_tags(view, member),
                    description=version_markdown(
                        view,
                        member.point,
                        address=f"runs:/{runs[member.key]}/model",
                        export=export.format(trial=member.point.name),
                    ),
                    input_shape=shapes[member.key][0],
                    outputs=shapes[member.key][1],
                )
                for member in recorded
            ],
            loader=LOADER,
        )
        registry.mark([member.key for member in members])
        registry.point({alias: versions.get(key) if key else None for alias, key in named.items()})
        return versions

    return register


def finetuned_registration(
    name: str, key: str, folder: Path, result: TrialResult, *, origin: str, objective: Objective
) -> Callable[[tracking.Tracker, str], None]:
    """Returns the job that registers a model that was trained longer: a function of the tracker and of its run.

    Args:
        name: The search.
        key: The model's own trial key.
        folder: The model.
        result: What was measured.
        origin: Key of the trial that it comes from.
        objective: What the search maximises.
    """
    shape, outputs = _shapes(folder)
    tags = {"rung": FINETUNE, "finetuned_from": origin, "epochs": f"{result.fidelity.epochs:g}"}
    names = ("val_accuracy", "test_accuracy", "latency_ms")
    tags |= {name: f"{result.metrics[name]:.4g}" for name in names if name in result.metrics}
    scores = (result.metrics[key] for key in ("val_accuracy_before", "val_accuracy", "test_accuracy"))
    before, after, test = (objective.text(score, 2) for score in scores)
    text = f"`{origin}` trained for {result.fidelity.epochs:g} epochs longer: {before} → {after}"
    text += f" {objective.long('val')}, {test} {objective.long('test')}{objective.hint}."

    def register(tracker: tracking.Tracker, run_id: str) -> None:
        registry = tracker.registry(name)
        registry.open(description=_DESCRIPTION.format(name=name), tags={"autoprune.search": name})
        member = tracking.Member(key, run_id, folder, tags, text, shape, outputs)
        registry.point({FINETUNED: registry.add([member], loader=LOADER)[key]})

    return register


def _shapes(folder: Path) -> tuple[list[int], int | None]:
    """Returns the shape of a saved model's samples and the number of its classes (None: it does not classify)."""
    document: dict[str, Any] = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
    classes = (document.get("origin") or {}).get("num_classes")
    return [int(n) for n in document["input_shape"]], int(classes) if classes else None
