"""Latency tables: what every operator takes at a grid of widths on this device, and what that predicts for any widths.

Decides the grid, how its times become surfaces that never fall as widths rise, how their sum is calibrated on a few
whole networks, and how the error of the result is told. Knows nothing of budgets or searches.

The operators of a network are timed alone, equal ones once. Alone an operator finds its data in the cache and its
neighbours out of the way, so the sum is scaled and shifted to what whole networks take: dense, uniformly and randomly
pruned ones. The error is taken on other randomly pruned networks, which the calibration has not seen.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from autoprune.cost import CostModel, Form, Surface
from autoprune.errors import InputError
from autoprune.files import write_whole
from autoprune.network.devices.device import device_name, threads
from autoprune.network.graph.network import Network
from autoprune.network.latency.operators import Call, Kind, record_calls
from autoprune.network.latency.timing import Conditions, measure_latency, one_at_a_time, time_call
from autoprune.network.surgery.cut import cut

SCHEMA = 1
Times = npt.NDArray[np.float64]
Knots = tuple[tuple[int, ...], ...]
Grid = tuple[Knots, Times]
"""Ascending sizes along each axis, and the time of an operator at each of their combinations in nanoseconds."""
Note = Callable[[str], None]

_FRACTIONS = {
    0: (),
    1: (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0),
    2: (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0),
    3: (1 / 4, 1 / 2, 1.0),
}
"""Number of axes → where on each axis an operator is timed, as fractions of the dense size."""
_RATIOS = (0.0, 0.23, 0.47, 0.73)
_ODD, _EVEN = 3, 8
"""Most widths are no multiple of 8, and those that are run faster: ResNet-50's knots at such multiples predicted other
networks 11 % too fast. Where widths may be anything, knots within a grid are moved off them by three, or by about that
in steps of `round_to`."""
_RANDOM, _HELD_OUT = 3, 4
_CELL_SECONDS = 0.06
"""A cell of a grid takes three times its operator, or about so long."""
_SAY_EVERY = 10.0


@dataclass(frozen=True, slots=True)
class Check:
    """One whole network that was measured: how wide it was, what it took and what the table says, in milliseconds."""

    name: str
    measured_ms: float
    spread_ms: float
    predicted_ms: float

    @property
    def error(self) -> float:
        """The prediction's relative error."""
        return self.predicted_ms / self.measured_ms - 1.0


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """What a latency budget is decoded against.

    `surfaces` add up to the predicted latency; they are in the order of `groups`, the names that their forms index.
    `calibration` are the networks that the sum was fitted to, `held_out` those that tell its error. `shares` are the
    parts of the dense network's time by operator. `fixed` counts the calls that could not be made at other widths and
    are held at their dense time.
    """

    conditions: Conditions
    device: str
    groups: tuple[str, ...]
    surfaces: tuple[Surface, ...]
    calibration: tuple[Check, ...]
    held_out: tuple[Check, ...]
    shares: Mapping[str, float]
    timed: int
    fixed: int
    seconds: float

    @property
    def error(self) -> float:
        """Median of the absolute relative errors on the networks that were held out."""
        return median(abs(check.error) for check in self.held_out)

    def summary(self) -> dict[str, Any]:
        """Returns what people ask of a table, as plain JSON values: everything but the surfaces."""
        networks = [
            {**asdict(check), "error": check.error, "held_out": held_out}
            for checks, held_out in ((self.calibration, False), (self.held_out, True))
            for check in checks
        ]
        return {
            "schema": SCHEMA,
            "conditions": asdict(self.conditions),
            "device": self.device,
            "networks": networks,
            "error": self.error,
            "shares": dict(self.shares),
            "timed": self.timed,
            "fixed": self.fixed,
            "seconds": self.seconds,
        }

    def to_json(self) -> dict[str, Any]:
        """Returns the table as plain JSON values."""
        return {"schema": SCHEMA, **asdict(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> LatencyTable:
        """Reads what `to_json` wrote.

        Raises:
            InputError: The schema is unknown.
        """
        if data.get("schema") != SCHEMA:
            raise InputError(f"latency table schema {data.get('schema')!r} is unknown; this version reads {SCHEMA}")

        def form(plain: Mapping[str, Any]) -> Form:
            return Form(plain["const"], tuple((group, n) for group, n in plain["terms"]))

        return LatencyTable(
            conditions=Conditions(**data["conditions"]),
            device=data["device"],
            groups=tuple(data["groups"]),
            surfaces=tuple(
                Surface(tuple(map(form, s["forms"])), tuple(map(tuple, s["knots"])), tuple(s["values"]))
                for s in data["surfaces"]
            ),
            calibration=tuple(Check(**check) for check in data["calibration"]),
            held_out=tuple(Check(**check) for check in data["held_out"]),
            shares=data["shares"],
            timed=data["timed"],
            fixed=data["fixed"],
            seconds=data["seconds"],
        )


def read_or_build(
    path: Path, network: Network, conditions: Conditions, *, round_to: int, seed: int, lock: Path, note: Note
) -> LatencyTable:
    """Returns the table that `path` holds, and builds it where there is none.

    Raises:
        InputError: The file cannot be read, or belongs to other groups; or see `record_calls`.
    """
    if path.is_file():
        try:
            table = LatencyTable.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(
                f"the latency table {path} cannot be read ({error}); delete it to measure again"
            ) from error
        if table.groups == tuple(group.name for group in network.groups):
            return table
        raise InputError(f"the latency table {path} belongs to another network; delete it to measure again")
    with one_at_a_time(lock):
        table = build_table(network, conditions, round_to=round_to, seed=seed, note=note)
    write_whole(path, json.dumps(table.to_json()).encode())
    return table


def build_table(
    network: Network, conditions: Conditions, *, round_to: int = 1, seed: int = 0, note: Note = lambda text: None
) -> LatencyTable:
    """Measures a latency table of a network on a device.

    Args:
        network: The traced network; its weights do not matter.
        conditions: Batch, number format, threads and device.
        round_to: Widths are multiples of this number.
        seed: Draws the random networks.
        note: Is told how it goes on.

    Raises:
        InputError: See `record_calls`.
    """
    begun = time.monotonic()
    calls = record_calls(network, conditions)
    kinds = list(dict.fromkeys(call.kind for call in calls))
    by_kind = {kind: next(call for call in calls if call.kind == kind) for kind in kinds}
    grids: dict[Kind, Grid | None] = {}
    told = begun
    with threads(conditions.threads):
        for number, kind in enumerate(kinds):
            if number == 0 or time.monotonic() - told > _SAY_EVERY:
                told = time.monotonic()
                note(f"latency table: {number} of {len(kinds)} operators timed")
            grids[kind] = _timed(by_kind[kind], conditions, round_to)
    note(f"latency table: {len(kinds)} operators timed; measuring whole networks")
    raw, fixed = _surfaces(calls, grids, conditions)
    model = CostModel(
        tuple(group.name for group in network.groups),
        tuple(group.size for group in network.groups),
        (),
        (),
        (),
        (),
        raw,
    )
    policies = _policies(network, round_to, seed)
    measured = [_measured(network, widths, conditions) for _, widths in policies]
    sums = [model.cost("latency_ns", widths) / 1e6 for _, widths in policies]
    count = len(policies) - _HELD_OUT
    scale, base = _fit(sums[:count], [ms for ms, _ in measured[:count]])
    checks = [
        Check(name, ms, spread, scale * total + base)
        for (name, _), (ms, spread), total in zip(policies, measured, sums, strict=True)
    ]
    constant = Surface((), (), (round(base * 1e6),))
    return LatencyTable(
        conditions=conditions,
        device=device_name(conditions.device),
        groups=model.groups,
        surfaces=(constant, *(_scaled(surface, scale) for surface in raw)),
        calibration=tuple(checks[:count]),
        held_out=tuple(checks[count:]),
        shares=_shares(calls, grids),
        timed=len(kinds),
        fixed=fixed,
        seconds=time.monotonic() - begun,
    )


# --- operators ----------------------------------------------------------------------------------------------------


def _knots(kind: Kind, round_to: int) -> Knots:
    """Returns where each axis is timed; with more than three axes all of them move together along a single one."""
    fractions = _FRACTIONS.get(len(kind.sizes), _FRACTIONS[1])
    knots = []
    for size, least in zip(kind.sizes, kind.least, strict=True):
        wanted = [_rounded(f * size, round_to, least, size) for f in fractions]
        if round_to % _EVEN:
            off = max(1, round(_ODD / round_to)) * round_to
            wanted = [n - off if n % _EVEN == 0 and n < size and n - off >= least else n for n in wanted]
        knots.append(tuple(sorted({size, *wanted})))
    return tuple(knots)


def _rounded(value: float, round_to: int, least: int, most: int) -> int:
    return min(max(round(value / round_to) * round_to, least, min(round_to, most)), most)


def _timed(call: Call, conditions: Conditions, round_to: int) -> Grid | None:
    """Times an operator at its grid, in nanoseconds; None where it cannot be made at smaller sizes.

    Raises:
        InputError: It cannot even be made at its dense sizes.
    """
    kind = call.kind
    axes = _knots(kind, round_to)
    together = len(axes) > 3
    if together:
        cells = [
            tuple(_rounded(f * s, 1, m, s) for s, m in zip(kind.sizes, kind.least, strict=True)) for f in _FRACTIONS[1]
        ]
    else:
        cells = list(itertools.product(*axes))
    times = np.zeros(len(cells))
    # The dense sizes come last in every grid, and first here: what fails there fails for another reason.
    for place in range(len(cells) - 1, -1, -1):
        try:
            times[place] = 1e9 * _cell(call, cells[place], conditions)
        except (RuntimeError, TypeError, IndexError, NotImplementedError) as error:
            if place == len(cells) - 1:
                raise InputError(
                    f"the operator {kind.target} at {call.where} cannot be timed alone as {conditions.dtype} on"
                    f" {conditions.device}: {str(error).splitlines()[0]}"
                ) from error
            return None
    if together:
        totals = [sum(cell) for cell in cells]
        unique, first = np.unique(totals, return_index=True)
        return (tuple(int(n) for n in unique),), monotone(times[first])
    return axes, monotone(times.reshape([len(knots) for knots in axes]))


def _cell(call: Call, sizes: Sequence[int], conditions: Conditions) -> float:
    import torch

    with torch.inference_mode():
        return time_call(call.prepare(sizes, conditions), conditions.device, samples=5, seconds=_CELL_SECONDS)


def monotone(times: Times) -> Times:
    """Returns times that never fall along any axis: halfway between the tightest such bounds above and below."""
    above, below = times.astype(float), times.astype(float)
    for axis in range(times.ndim):
        above = np.maximum.accumulate(above, axis=axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis=axis), axis)
    return np.asarray((above + below) / 2.0)


def _surfaces(
    calls: Sequence[Call], grids: Mapping[Kind, Grid | None], conditions: Conditions
) -> tuple[tuple[Surface, ...], int]:
    """Returns one surface for all calls over the same axes, and how many calls are held at their dense time."""
    sums: dict[tuple[tuple[Form, ...], Knots], Times] = {}
    dense: dict[Kind, float] = {}
    no_axes: Knots = ()
    fixed = 0
    for call in calls:
        grid = grids[call.kind]
        if grid is None:
            if call.kind not in dense:
                dense[call.kind] = 1e9 * _cell(call, call.kind.sizes, conditions)
            forms: tuple[Form, ...] = ()
            knots, times = no_axes, np.array(dense[call.kind])
            fixed += 1
        else:
            knots, times = grid
            forms = call.forms if len(knots) == len(call.forms) else (_total(call.forms),)
        key = (forms, knots)
        sums[key] = sums[key] + times if key in sums else times
    surfaces = (Surface(*key, tuple(round(float(t)) for t in np.ravel(times))) for key, times in sums.items())
    return tuple(surfaces), fixed


def _total(forms: Sequence[Form]) -> Form:
    terms: dict[int, int] = {}
    for form in forms:
        for group, n in form.terms:
            terms[group] = terms.get(group, 0) + n
    return Form(sum(form.const for form in forms), tuple(sorted(terms.items())))


def _scaled(surface: Surface, scale: float) -> Surface:
    return Surface(surface.forms, surface.knots, tuple(round(scale * value) for value in surface.values))


def _shares(calls: Sequence[Call], grids: Mapping[Kind, Grid | None]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for call in calls:
        grid = grids[call.kind]
        if grid is not None:
            totals[call.kind.name] = totals.get(call.kind.name, 0.0) + float(grid[1].flat[-1])
    whole = sum(totals.values()) or 1.0
    return {name: value / whole for name, value in sorted(totals.items(), key=lambda item: -item[1])}


# --- whole networks -----------------------------------------------------------------------------------------------


def _policies(network: Network, round_to: int, seed: int) -> list[tuple[str, dict[str, int]]]:
    """Returns names and widths of the networks to measure; the last ones are held out."""
    rng = np.random.default_rng(seed)

    def widths(ratios: Sequence[float]) -> dict[str, int]:
        return {
            group.name: _rounded(group.size * (1.0 - ratio), round_to, min(round_to, group.size), group.size)
            for group, ratio in zip(network.groups, ratios, strict=True)
        }

    count = len(network.groups)
    found = [(f"{ratio:.0%} removed" if ratio else "dense", widths([ratio] * count)) for ratio in _RATIOS]
    for number in range(_RANDOM + _HELD_OUT):
        # Around a level of its own: independent draws alone would all weigh the same in total.
        level = 0.15 + 0.6 * ((number * 0.618) % 1.0)
        ratios = np.clip(level + rng.uniform(-0.35, 0.35, size=count), 0.0, 0.9)
        found.append((f"random {number + 1}", widths(ratios.tolist())))
    return found


def _measured(network: Network, widths: Mapping[str, int], conditions: Conditions) -> tuple[float, float]:
    """Returns median and spread of a network of these widths, in milliseconds."""
    selection = {g.name: np.arange(widths[g.name]) for g in network.groups if widths[g.name] < g.size}
    model = cut(network, selection)
    found = measure_latency(model, network.example_inputs, conditions, repeats=50)
    return found.median_ms, found.spread_ms


def _fit(sums: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """Returns the scale and the constant >= 0 that bring the sums to the measured times, least in relative error."""
    x, y = np.asarray(sums), np.asarray(measured)
    design = np.stack([x / y, 1.0 / y], axis=1)  # rows divided by y: relative errors
    (scale, base), *_ = np.linalg.lstsq(design, np.ones_like(y), rcond=None)
    if base < 0 or scale <= 0:
        weights = x / y
        scale, base = float(weights.sum() / (weights * weights).sum()), 0.0
    return float(scale), float(base)
