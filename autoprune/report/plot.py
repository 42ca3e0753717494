"""The front as a picture made of characters.

Decides which character a cell of the picture shows. Must not print: it returns text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from autoprune.report import units
from autoprune.report.view import FrontPoint, SearchView

LEAST_WIDTH = 70
"""A terminal of fewer columns gets no picture."""
_WIDE = 12.0
_UNICODE = {"trial": "·", "control": "◇", "line": "╌", "front": "●", "knee": "◉", "dense": "★", "budget": "┊"}
_ASCII = {"trial": ".", "control": "+", "line": "-", "front": "o", "knee": "@", "dense": "*", "budget": "|"}


def plot_front(view: SearchView, *, width: int = 100, height: int = 14, unicode: bool = True) -> str:
    """Returns accuracy or an own metric (upwards) against the primary cost (to the right) as lines of text.

    Args:
        view: The search.
        width: Columns in all; fewer than `LEAST_WIDTH` give an empty text.
        height: Lines of the picture without its axis.
        unicode: Whether characters beyond ASCII may be used.

    Raises:
        ValueError: `height` is less than 3.
    """
    if height < 3:
        raise ValueError(f"a picture has at least 3 lines, got {height}")
    front = view.front
    if not front or width < LEAST_WIDTH:
        return ""
    marks = _UNICODE if unicode else _ASCII
    shown = [p for p in (*view.trials, *view.controls, view.dense) if math.isfinite(p.val_accuracy)]
    costs = [view.fraction(p) for p in shown]
    logarithmic = min(costs) > 0 and max(costs) / min(costs) > _WIDE
    scale: Callable[[float], float] = math.log if logarithmic else float
    columns = min(width, 100) - 10
    place = _Places(
        (scale(min(costs)), scale(max(costs))),
        _accuracies(view, shown),
        (columns, height),
    )
    cells = [[" "] * columns for _ in range(height)]

    def put(points: Sequence[FrontPoint], mark: str) -> None:
        for point in points:
            column, row = place.of(scale(view.fraction(point)), point.val_accuracy)
            cells[row][column] = marks[mark]

    limit = view.limits.get(view.primary)
    if limit is not None and limit > 0:
        share = scale(limit / view.dense.costs[view.primary])
        if place.low <= share <= place.high:
            column, _ = place.of(share, place.top)
            for row in cells:
                row[column] = marks["budget"]
    put([p for p in view.trials if math.isfinite(p.val_accuracy)], "trial")
    put(view.controls, "control")
    _draw_steps(cells, [place.of(scale(view.fraction(p)), p.val_accuracy) for p in front], marks["line"])
    put(front, "front")
    if view.knee is not None:
        put([view.knee], "knee")
    put([view.dense] if view.dense in shown else [], "dense")
    return _framed(view, cells, place, marks, logarithmic=logarithmic, unicode=unicode)


class _Places:
    """Turns (cost, accuracy) into (column, row)."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], size: tuple[int, int]) -> None:
        self.low, self.high = x
        self.bottom, self.top = y
        self.columns, self.rows = size

    def of(self, cost: float, accuracy: float) -> tuple[int, int]:
        across = (cost - self.low) / ((self.high - self.low) or 1.0)
        up = (accuracy - self.bottom) / ((self.top - self.bottom) or 1.0)
        row = round((1.0 - min(max(up, 0.0), 1.0)) * (self.rows - 1))
        return round(across * (self.columns - 1)), row


def _accuracies(view: SearchView, shown: Sequence[FrontPoint]) -> tuple[float, float]:
    """Returns the range of the picture: the front, the dense network and the controls fill it; a trial far below them
    stands on its edge.
    """
    near = [*(p.val_accuracy for p in (*view.front, *view.controls)), view.dense.val_accuracy]
    near = [value for value in near if math.isfinite(value)]
    low, high = min(near), max(p.val_accuracy for p in shown)
    gap = (high - low) * 0.04 or (0.01 if view.objective.percent else 0.01 * abs(low) or 0.01)
    return low - gap, high


def _draw_steps(cells: list[list[str]], places: Sequence[tuple[int, int]], mark: str) -> None:
    """Draws what the front reaches between its points: the accuracy of the cheaper one."""
    for (left, row), (right, _) in itertools.pairwise(places):
        for column in range(left + 1, right):
            if cells[row][column] == " ":
                cells[row][column] = mark


def _framed(
    view: SearchView,
    cells: list[list[str]],
    place: _Places,
    marks: dict[str, str],
    *,
    logarithmic: bool,
    unicode: bool,
) -> str:
    bar, corner, dash = ("│", "└", "─") if unicode else ("|", "+", "-")
    lines = [f"{view.objective.head('val')}{view.objective.hint}"]
    labels = dict.fromkeys((0, len(cells) // 2, len(cells) - 1), "")
    for number in labels:
        value = place.top - (place.top - place.bottom) * number / (len(cells) - 1)
        labels[number] = view.objective.text(value)
    margin = max(7, *map(len, labels.values()))
    lines += [f"{labels.get(n, ''):>{margin}} {bar}{''.join(row).rstrip()}" for n, row in enumerate(cells)]
    lines.append(f"{'':>{margin}} {corner}{dash * place.columns}")
    ends = [math.exp(v) if logarithmic else v for v in (place.low, (place.low + place.high) / 2, place.high)]
    left, middle, right = (units.share(value) for value in ends)
    gap = place.columns - len(left) - len(right)
    lines.append(f"{'':>{margin + 2}}{left}{middle:^{gap}}{right}")
    scale = ", logarithmic" if logarithmic else ""
    legend = [("front", "front"), ("trial", "trial"), ("dense", "dense")]
    legend += [("knee", "knee")] if view.knee is not None else []
    legend += [("control", "control")] if view.controls else []
    legend += [("budget", "budget")] if view.primary in view.limits else []
    said = "  ".join(f"{marks[mark]} {name}" for mark, name in legend)
    lines.append(f"{'':>{margin + 2}}{units.AXES[view.primary]}, part of dense{scale}   {said}")
    return "\n".join(lines) + "\n"
