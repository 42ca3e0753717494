"""How far the area under a front can be trusted.

Decides what a hypervolume's interval is drawn from. The results of single samples are not kept, so the bootstrap is a
parametric one: each point's accuracy is drawn anew, by the spread over its seeds where several were run, else as a
fraction of the samples that scored it. All points were scored on the same samples and their errors rise and fall
together, so that two intervals that overlap may still belong to fronts that differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoprune.pareto import front_indices, hypervolume
from autoprune.report import units
from autoprune.report.view import FrontPoint, SearchView

_DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Interval:
    """The central 95 % of a bootstrapped hypervolume; `source` says what was drawn."""

    low: float
    high: float
    source: str


def hypervolume_interval(view: SearchView, points: Sequence[FrontPoint]) -> Interval | None:
    """Returns the interval of the area that the front of `points` dominates; None where no spread is known.

    Only the points on the front are drawn: of many trials the luckiest would make up a better front at every draw. The
    same points give the same interval.
    """
    import numpy as np

    front = [points[i] for i in front_indices([view.coordinates(p) for p in points])]
    samples = view.samples.get("val", 0)
    spreads = [p.metrics.get("val_accuracy_spread", math.nan) for p in front]
    seeded = view.seeds > 1 and all(map(math.isfinite, spreads))
    if not front or not (seeded or (samples > 0 and all(0.0 <= p.val_accuracy <= 1.0 for p in front))):
        return None
    rng = np.random.default_rng(0)
    accuracies = np.array([p.val_accuracy for p in front])
    if seeded:
        errors = np.array(spreads) / math.sqrt(view.seeds)
        drawn = accuracies + errors * rng.standard_normal((_DRAWS, len(front)))
    else:
        drawn = rng.binomial(samples, accuracies, (_DRAWS, len(front))) / samples
    costs = [view.fraction(p) for p in front]
    areas = [hypervolume(list(zip((1.0 - row).tolist(), costs, strict=True)), view.reference) for row in drawn]
    low, high = np.quantile(areas, [0.025, 0.975])
    source = f"{view.seeds} seeds" if seeded else f"{samples:,} validation samples"
    return Interval(float(low), float(high), source)


def hypervolume_sentence(view: SearchView) -> str:
    """Returns the front's hypervolume and the controls', each with its interval where there is one."""
    own = hypervolume_interval(view, view.trials)
    area = view.objective.area
    text = f"Hypervolume {area(view.hypervolume)}{_between(view, own)}"
    if view.controls:
        text += f", controls alone {area(view.controls_hypervolume)}"
        text += _between(view, hypervolume_interval(view, view.controls))
    return text if own is None else f"{text}, 95 % intervals by parametric bootstrap over {own.source}"


def reference_sentence(view: SearchView) -> str:
    """Returns where the area begins, and how much of the front lies outside of it where that may be."""
    error, cost = view.reference
    axis = f"{units.LABELS[view.primary]} {cost:.3g} of dense"
    if view.objective.percent:
        return f"reference point: {view.objective.error} {error:g}, {axis}"
    text = f"reference point: {view.objective.label('val')} {view.objective.text(1.0 - error)}, {axis}"
    worse = sum(view.coordinates(p)[0] >= error for p in view.front)
    return text if not worse else f"{text}; {worse} of {len(view.front)} points of the front are worse and add nothing"


def _between(view: SearchView, interval: Interval | None) -> str:
    area = view.objective.area
    return "" if interval is None else f" [{area(interval.low)}, {area(interval.high)}]"
