"""What a search maximises, as people see it: its name, how its numbers are written, and that higher is better.

Decides every word and digit of it, for tables, pictures, notes and messages. Keys under which it is stored
(`val_accuracy`) are none of its business. Imports nothing heavy: the live line of a search needs it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

UNNAMED = "metric"
"""The name of a metric that has none, such as a lambda."""
_LONG = {"val": "validation", "test": "test"}
_DIGITS = 3
"""Significant digits of a metric beyond those that are asked for: `83.4%` has one decimal, `1.924` four digits."""
_PLAIN = (1e-4, 1e7)
"""Numbers of a size between these are written without an exponent."""
_TINY = 1e-10
"""What is minimised is 1 less the metric: of numbers smaller than this fewer than six digits are left."""


@dataclass(frozen=True, slots=True)
class Objective:
    """The metric that a search maximises.

    With `percent` it is a fraction of 1 and written as a percentage, else a number of any size: a metric of the user's
    own, of which nothing is assumed but that higher is better.
    """

    name: str = "accuracy"
    percent: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"an objective needs a name, got {self.name!r}")

    # --- names ---

    @property
    def hint(self) -> str:
        """What stands behind a number, where its direction does not go without saying: ` (higher is better)`."""
        return "" if self.percent else " (higher is better)"

    @property
    def note(self) -> str:
        """A sentence about the direction; empty where that goes without saying."""
        return "" if self.percent else f"`{self.name}` is maximised: higher is better."

    @property
    def best(self) -> str:
        """What the best point of a front is: `most accurate`, `highest r2`."""
        return "most accurate" if self.percent else f"highest {self.name}"

    def head(self, split: str) -> str:
        """Returns the head of a column: `val acc`, `val r2`."""
        return f"{split} acc" if self == Objective() else self.label(split)

    def label(self, split: str) -> str:
        """Returns the short name on a split: `val accuracy`, `val r2`."""
        return f"{split} {self.name}"

    def long(self, split: str) -> str:
        """Returns the long name on a split: `validation accuracy`, `validation r2`."""
        return f"{_LONG.get(split, split)} {self.name}"

    @property
    def error(self) -> str:
        """What is minimised in its place: `validation error`, `1 - validation r2`."""
        return "validation error" if self == Objective() else f"1 - {self.long('val')}"

    @property
    def stored_error(self) -> str:
        """The name that Optuna's studies and its dashboard give to what is minimised: `val_error`, `1 - val r2`."""
        return "val_error" if self == Objective() else f"1 - {self.label('val')}"

    def axis(self, *splits: str, on: str = "") -> str:
        """Returns the title of an axis: `validation accuracy (%)`, `validation r2 (higher is better)`.

        Args:
            splits: One: whose values are drawn. Several are told behind the name: `accuracy (%): validation, and test`.
            on: Where they were measured, such as a rung.
        """
        unit = " (%)" if self.percent else self.hint
        place = f" on {on}" if on else ""
        if len(splits) == 1:
            return f"{self.long(splits[0])}{place}{unit}"
        return f"{self.name}{place}{unit}: {', and '.join(_LONG.get(split, split) for split in splits)}"

    # --- numbers ---

    @property
    def scale(self) -> float:
        """By what values are multiplied where they are drawn."""
        return 100.0 if self.percent else 1.0

    @property
    def suffix(self) -> str:
        """What stands behind a number on an axis."""
        return "%" if self.percent else ""

    def text(self, value: float, digits: int = 1) -> str:
        """Returns a value: `83.4%`, or `1.924`; a dash for what is not a number.

        Args:
            value: As it was measured.
            digits: Decimals of a percentage; a number of any size has three significant digits more than this.
        """
        if not math.isfinite(value):
            return "–"
        if self.percent:
            return f"{value * 100:.{digits}f}%"
        if value == 0:
            return "0"
        decimals = _decimals(value, digits)
        return f"{value:.{digits + _DIGITS - 1}e}" if decimals is None else f"{value:.{decimals}f}"

    def difference(self, a: float, b: float, digits: int = 1) -> str:
        """Returns `a` less `b` with its sign and, for a percentage, its unit: `+0.3 points`, `+0.012`."""
        change = self.change(a - b, near=max(a, b, key=abs), digits=digits)
        return f"{change} points" if self.percent else change

    def change(self, difference: float, *, near: float, digits: int = 1) -> str:
        """Returns a difference with its sign and without a unit, to the last place of the values that it is between.

        Args:
            difference: As it was measured.
            near: One of these values; it decides the decimals of a number of any size.
            digits: As `text` takes them.
        """
        return self._by(difference, near, digits, sign="+")

    def spread(self, value: float, *, near: float, digits: int = 1) -> str:
        """Returns a standard deviation or error of a value, without sign and unit; see `change`."""
        return self._by(value, near, digits, sign="")

    def regret(self, value: float) -> str:
        """Returns by how much a value falls short of another one: `0.35 points`, `0.012`."""
        return f"{100 * value:.2f} points" if self.percent else self.text(value, 0)

    def area(self, value: float) -> str:
        """Returns a hypervolume: that of percentages is at most 1, that of numbers has their size."""
        return f"{value:.4f}" if self.percent else self.text(value)

    def plain(self, value: float, digits: int = 4) -> str:
        """Returns a value as a program reads it: a fraction with so many decimals, or a number with its digits."""
        return f"{value:.{digits}f}" if self.percent else self.text(value)

    def worst(self, dense: float) -> float:
        """Returns the value from which on hypervolumes count, given the dense network's.

        A fraction is worth something above 0. So is a metric of which the dense network has more than nothing; of one
        that is negative, such as a mean squared error with its sign turned, what is twice as far below 0 counts for
        nothing. Where the dense network has 0, it is -1.
        """
        if self.percent or dense > 0:
            return 0.0
        return 2.0 * dense if math.isfinite(dense) and dense < 0 else -1.0

    def warning(self, dense: float) -> str:
        """Returns a sentence where the dense network's value is too small to tell candidates apart; else nothing."""
        if self.percent or not 0 < abs(dense) < _TINY:
            return ""
        return (
            f"Warning: the dense network's {self.name} is {self.text(dense)}, too small to tell candidates apart: "
            "what is minimised is 1 less it. Give the metric in a larger unit."
        )

    def tells(self, difference: float) -> bool:
        """Whether a difference is more than what one decimal of a percentage shows, or any of a number of any size."""
        return abs(difference) >= 0.0005 if self.percent else difference != 0

    # --- storage ---

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Objective:
        """Reads what `to_json` returned."""
        return Objective(name=data["name"], percent=bool(data["percent"]))

    def _by(self, value: float, near: float, digits: int, *, sign: str) -> str:
        if self.percent:
            return f"{100.0 * value:{sign}.{digits}f}"
        if not math.isfinite(value):
            return "–"
        decimals = _decimals(near, digits)
        return f"{value:{sign}.{max(digits + 1, 2)}g}" if decimals is None else f"{value:{sign}.{decimals}f}"


ACCURACY = Objective()
"""What a search of classes maximises, and what anything is called of which nobody says otherwise."""


def objective_of(metric: Any) -> Objective:
    """Returns what a search maximises that is given a metric of the user's own, or none."""
    return ACCURACY if metric is None else Objective(name_of(metric), percent=False)


def name_of(metric: Any) -> str:
    """Returns what people call a metric: a function's name, that of the function in a `partial`, an object's class."""
    while isinstance(metric, functools.partial):
        metric = metric.func
    name = getattr(metric, "__name__", None) or type(metric).__name__
    return name if isinstance(name, str) and name.isidentifier() else UNNAMED


def _decimals(value: float, digits: int) -> int | None:
    """Returns the decimals of a number of the size of `value`; None where it is written with an exponent."""
    size = abs(value)
    if size == 0 or not math.isfinite(size):
        return digits + _DIGITS - 1
    if not _PLAIN[0] <= size < _PLAIN[1]:
        return None
    return max(0, digits + _DIGITS - 1 - math.floor(math.log10(size)))
