"""Evaluates a recorded trial again from what its MLflow run and its search's run hold, and compares the numbers.

Decides what a run must hold for that, which numbers are compared (scores and costs, not what the device measures), and
what is said where versions or devices differ.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autoprune import tracking
from autoprune.coordinator.commands.picking import Say
from autoprune.coordinator.recording.records import SPACE_FILE
from autoprune.coordinator.recording.registering import FINETUNE
from autoprune.coordinator.running.fidelity import fidelity_of_rung
from autoprune.coordinator.stored.search import CONTROLS, SCRATCH
from autoprune.errors import InputError
from autoprune.policy import Choice, Group, Policy
from autoprune.results import Fidelity, TrialResult
from autoprune.space import Space
from autoprune.space.code import check_mapping

_TIMES = ("latency_", "peak_memory_", "seconds/")
_SAME = ("version.torch", "version.torchvision", "version.python", "version.autoprune", "platform", "git_commit")


@dataclass(frozen=True)
class Reproduction:
    """A trial evaluated again: rows of (number, recorded, now), what differs in the surroundings, and the result."""

    run_id: str
    name: str
    rows: tuple[tuple[str, float, float], ...]
    surroundings: tuple[str, ...]
    same_channels: bool

    @property
    def equal(self) -> bool:
        """Whether the very same channels were kept and every number is exactly as recorded."""
        return self.same_channels and all(_equal(a, b) for _, a, b in self.rows)

    @property
    def text(self) -> str:
        """What a person reads."""
        lines = [f"{self.name} ({self.run_id})"]
        width = max((len(name) for name, _, _ in self.rows), default=0)
        for name, before, now in self.rows:
            mark = "equal" if _equal(before, now) else f"differs by {now - before:+.3g}"
            lines.append(f"  {name:<{width}}  recorded {before:<12.8g} now {now:<12.8g} {mark}")
        lines.append("  the same channels are kept" if self.same_channels else "  other channels are kept")
        lines += [f"  {line}" for line in self.surroundings]
        return "\n".join([*lines, "reproduced exactly" if self.equal else "not reproduced exactly"])


def reproduce_run(run_id: str, *, home: Path, say: Say, allow_code: bool = False) -> Reproduction:
    """Evaluates the trial of an MLflow run again and compares.

    Raises:
        InputError: There is no such run, it is no trial of a search, it does not hold what is needed, or its settings
            name code that is not of the working directory and `allow_code` is not set.
        TrackingError: MLflow cannot be used.
        TrialError: The evaluation failed.
    """
    from autoprune.network import afterwards

    reader = tracking.open_reader(tracking.resolve_uri(home, os.environ))
    run = reader.run(run_id)
    search = reader.search_run(run)
    text = reader.text(search.run_id, SPACE_FILE)
    if text is None:
        raise InputError(f"the run of the search {search.name!r} holds no {SPACE_FILE}: an earlier version recorded it")
    if run.tags.get("rung") == FINETUNE:
        raise InputError(f"{run.name!r} is no trial: run `autoprune finetune` again with the same epochs and seed")
    if search.tags.get("at_hand") == "true":
        raise InputError(f"model and data of {search.name!r} were Python objects: search again with the same ones")
    settings = json.loads(text)
    check_mapping(settings, allow=allow_code, source="the run's settings")
    space = Space.from_mapping(settings)
    say(f"evaluating {run.name} of {space.name} again")
    result = afterwards.evaluate_again(
        space,
        lambda groups: recorded_policy(run.params, groups),
        fidelity_of(space, run.tags.get("rung", "")),
        facts=search.tags,
        cache=home / "cache",
        note=say,
    )
    return Reproduction(
        run_id=run.run_id,
        name=f"{space.name}, {run.name}",
        rows=compared(run.metrics, result),
        surroundings=tuple(_surroundings({**search.tags, **run.tags}, result)),
        same_channels=run.tags.get("identity") == result.identity,
    )


def recorded_policy(params: Mapping[str, str], groups: Sequence[Group]) -> Policy:
    """Returns the policy that a run's parameters tell: the width of every group and the criterion of every scope.

    Raises:
        InputError: A width or a criterion is missing, or no width that the group may take.
    """
    choices = {}
    for group in groups:
        keys = [tracking.safe_key(key) for key in (f"width/{group.name}", f"criterion/{group.scope}")]
        missing = [key for key in keys if key not in params]
        if missing:
            raise InputError(f"the run has no parameter {missing[0]!r}: it does not tell its policy")
        width = int(params[keys[0]])
        if width not in group.widths and width != group.size:
            raise InputError(f"the run keeps {width} channels of {group.name!r}, which takes {group.widths}")
        choices[group.name] = Choice(params[keys[1]], group.ratio(width))
    return Policy(choices)


def fidelity_of(space: Space, rung: str) -> Fidelity:
    """Returns how much of the recipe a rung of a space runs; the controls run as much as the last rung.

    Raises:
        InputError: The space has no such rung.
    """
    ladder = {r.rung: fidelity_of_rung(r) for r in space.search.ladder}
    if rung in (CONTROLS, SCRATCH):
        return replace(list(ladder.values())[-1], rung=rung, scratch=rung == SCRATCH)
    if rung not in ladder:
        raise InputError(f"the space {space.name!r} has no rung {rung!r}")
    return ladder[rung]


def compared(recorded: Mapping[str, float], result: TrialResult) -> tuple[tuple[str, float, float], ...]:
    """Returns (name, recorded, now) of every score and cost that both have."""
    now = {**result.metrics, **{name: float(cost) for name, cost in result.costs.items()}}
    names = [name for name in now if name in recorded and not name.startswith(_TIMES)]
    return tuple((name, recorded[name], now[name]) for name in names)


def _surroundings(recorded: Mapping[str, str], result: TrialResult) -> list[str]:
    now = {**tracking.environment_tags(), "device": result.device}
    names = [name for name in ("device", *_SAME) if name in recorded]
    return [
        f"{name.removeprefix('version.')} was {recorded[name]}, is {now.get(name, 'unknown')}"
        for name in names
        if recorded[name] != now.get(name)
    ]


def _equal(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))
