"""Budgets: upper limits on costs, absolute or as a fraction of the dense network.

Decides how a budget is read, what it means for a given network, and by how much a policy violates it. A violation of
zero or less is feasible, which is Optuna's sign.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoprune.cost import COSTS, LATENCY, MACS, MEMORY, PARAMS, SIZE, CostModel
from autoprune.errors import BudgetError, nearest
from autoprune.policy import Group

KEYS = {"macs": MACS, "params": PARAMS, "size": SIZE, "memory": MEMORY, "latency": LATENCY, "latency_ms": LATENCY}
"""Keys of a space file's budget → names of costs."""

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "kb": 10**3, "mb": 10**6, "gb": 10**9, "b": 1}
_SUFFIX |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}
_TIMES = {"ns": 1.0, "us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9}
_TIME = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(ns|us|µs|ms|s)\s*$")
_PATTERN = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*(%?)\s*$")


def parse_limit(value: float | int | str) -> tuple[float, bool]:
    """Reads one limit: `(number, is_fraction)`.

    A number in (0, 1] and a percentage are fractions of dense; a number above 1 and a text such as `"30M"`, `"1.2 MB"`
    or `"512 KiB"` are absolute. `K`, `M` and `G` are powers of 1000.

    Raises:
        BudgetError: `value` is not such a number or text, or is not positive.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise BudgetError(f"a budget is a number or a text such as '30M', got {value!r}")
    if isinstance(value, str):
        match = _PATTERN.match(value)
        if not match or match[2].lower() not in _SUFFIX or (match[2] and match[3]):
            raise BudgetError(f"cannot read the budget {_short(value)}; write 0.5, '50%', '30M' or '1.2 MB'")
        number = float(match[1])
        if match[3]:
            number, fraction = number / 100.0, True
        else:
            number, fraction = number * _SUFFIX[match[2].lower()], not match[2] and number <= 1.0
    else:
        number, fraction = float(value), value <= 1
    if not number > 0 or number == float("inf"):
        raise BudgetError(f"a budget is positive and finite, got {_short(value)}")
    if fraction and number > 1.0:
        raise BudgetError(f"a fraction of the dense network is at most 1, got {value!r}")
    return number, fraction


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def read_limit(key: str, value: float | int | str) -> tuple[float, bool]:
    """Reads the limit of one of `KEYS`: `(number, is_fraction)`, the number in the unit of the cost.

    `latency` is a fraction of dense or a text with a unit of time (`"4 ms"`), `latency_ms` a number of milliseconds;
    any other key is read by `parse_limit`.

    Raises:
        BudgetError: `value` is no such limit, or is not positive.
    """
    if key == "latency_ms":
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise BudgetError(f"latency_ms is a positive number of milliseconds, got {value!r}")
        return value * 1e6, False
    if key in ("macs", "params") and isinstance(value, str) and value.rstrip().lower().endswith("b"):
        raise BudgetError(f"this limit is a number of things, not of bytes: write '30M', got {_short(value)}")
    if key != "latency":
        return parse_limit(value)
    match = _TIME.match(value) if isinstance(value, str) else None
    number, fraction = (float(match[1]) * _TIMES[match[2]], False) if match else parse_limit(value)
    if not match and not fraction:
        raise BudgetError(f"a latency budget is a fraction of dense or has a unit of time ('4 ms'), got {value!r}")
    if not number > 0:
        raise BudgetError(f"a budget is positive and finite, got {value!r}")
    return number, fraction


@dataclass(frozen=True, slots=True)
class Budget:
    """Upper limits on costs, in absolute numbers, and the span of the front.

    `limits` maps names of costs to inclusive upper limits. `primary` is the cost on the front's axis; the front is
    searched between `span[0]` and `span[1]`, fractions of the dense network's `primary` cost. The upper end never
    exceeds the limit. `points`, falling fractions, are the only ones that candidates are made for; empty: all of the
    span.
    """

    limits: Mapping[str, int]
    primary: str
    span: tuple[float, float]
    points: tuple[float, ...] = ()

    def target(self, share: float) -> float:
        """Returns the fraction of the dense primary cost at `share` (0 to 1) of the span, on a logarithmic scale.

        Of points, each has the same share.
        """
        if self.points:
            return self.points[::-1][min(int(share * len(self.points)), len(self.points) - 1)]
        low, high = self.span
        return high * (low / high) ** (1.0 - share) if low < high else high

    def nearest(self, target: float) -> float:
        """Returns the point whose ratio to `target` is least, `target` itself where there are no points."""
        return min(self.points, key=lambda point: abs(math.log(point / target)), default=target)

    def violation(self, costs: Mapping[str, float]) -> float:
        """Returns the largest relative excess over a limit: at most 0 for a policy within the budget."""
        return max((costs[name] / limit - 1.0 for name, limit in self.limits.items()), default=-1.0)

    def within(self, costs: Mapping[str, float]) -> bool:
        """Whether no limit is exceeded."""
        return all(costs[name] <= limit for name, limit in self.limits.items())


def resolve_budget(
    wanted: Mapping[str, float | int | str],
    cost_model: CostModel,
    groups: Sequence[Group],
    *,
    front: tuple[float, float] | None = None,
    points: Sequence[float] = (),
) -> Budget:
    """Turns a space file's budget into absolute limits for one network and checks that some policy can meet it.

    Args:
        wanted: Limits by key of `KEYS`, each as `read_limit` reads it. The first one is the primary cost; `macs` where
            there is none.
        cost_model: Prices the widths.
        groups: The groups that may be pruned.
        front: Fractions of the dense primary cost between which the front is searched; by default from the least
            possible (at least 0.1 of dense) to the limit.
        points: The fractions of the dense primary cost that are wanted; they make the span.

    Raises:
        BudgetError: A key is unknown, a limit cannot be read, not even the narrowest network meets it, or a point
            exceeds it or lies below what is possible.
    """
    dense = cost_model.dense()
    least = cost_model.costs({group.name: group.widths[0] for group in groups})
    limits: dict[str, int] = {}
    for key, value in wanted.items():
        if key not in KEYS:
            raise BudgetError(f"unknown budget {key!r}{nearest(key, KEYS)}")
        name = KEYS[key]
        if name not in dense:
            raise BudgetError(f"the budget {key} needs a latency table of the network, and there is none")
        if name in limits:
            raise BudgetError("latency and latency_ms are the same limit; give one of them")
        number, fraction = read_limit(key, value)
        limits[name] = int(number * dense[name] + 1e-6) if fraction else int(number)
        if least[name] > limits[name]:
            raise BudgetError(
                f"no policy meets the budget {key}: {value}: the least possible is {_shown(name, least[name])}"
                f" ({least[name] / dense[name]:.3f} of the dense {_shown(name, dense[name])})"
            )
    primary = KEYS[next(iter(wanted))] if wanted else MACS
    floor = least[primary] / dense[primary]
    ceiling = min(1.0, limits.get(primary, dense[primary]) / dense[primary])
    if points:
        for point in points:
            _check_point(point, floor=floor, ceiling=ceiling, rounding=1.0 / dense[primary], key=key_of(primary))
        span = (min(points), min(max(points), ceiling))
        return Budget(limits, primary, span, tuple(sorted(set(points), reverse=True)))
    low, high = front if front is not None else (max(floor, 0.1 if ceiling > 0.1 else floor), ceiling)
    if not 0.0 < low <= high <= 1.0:
        raise BudgetError(f"front: {[low, high]} must rise within (0, 1]")
    high = min(high, ceiling)
    low = max(low, floor)
    if low > high:
        raise BudgetError(
            f"no policy lies on the front {[low, high]}: the least possible {key_of(primary)} is {floor:.3f} of dense"
        )
    return Budget(limits, primary, (low, high))


def _check_point(point: float, *, floor: float, ceiling: float, rounding: float, key: str) -> None:
    """Checks a point; limits are rounded down to whole numbers, so it may exceed one by `rounding`."""
    if not 0.0 < point <= 1.0:
        raise BudgetError(f"a point of the front is a fraction of the dense {key}, in (0, 1], got {point}")
    if point > ceiling + rounding:
        raise BudgetError(f"the point {point} exceeds the budget, {ceiling:.3f} of the dense {key}")
    if point < floor:
        raise BudgetError(f"no policy meets the point {point}: the least possible {key} is {floor:.3f} of dense")


def _shown(name: str, value: int) -> str:
    return f"{value / 1e6:,.3f} ms" if name == LATENCY else f"{value:,}"


def key_of(cost: str) -> str:
    """Returns the space file's key for the name of a cost."""
    return next(key for key, name in KEYS.items() if name == cost)


assert set(KEYS.values()) == {*COSTS, LATENCY}
