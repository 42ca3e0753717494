"""Moves a proposal of pruning ratios onto the budget, by arithmetic on the exact cost model.

Decides which widths stand for a proposal: one shift is added to every ratio so that the limits are met, then what the
rounding left over is spent. Knows nothing of Optuna: the sampler hands ratios in and takes widths back.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autoprune.cost import LATENCY, MACS, MEMORY, PARAMS, SIZE, CostModel, Form, Surface, Term
from autoprune.errors import BudgetError, PolicyError
from autoprune.policy import Group
from autoprune.results import Problem

_LEAP_HALVINGS = 12
_HALVINGS = 24
"""Halvings of the shift's range [-1, 1]: 1.2e-7 is left, finer than a step of any group below four million channels."""


def project(problem: Problem, ratios: Mapping[str, float], target: float | None = None) -> dict[str, int]:
    """Returns feasible widths for a proposal; see `Projector.project`, which is faster for many proposals.

    Raises:
        BudgetError: Not even the narrowest widths meet the limits and the target.
        PolicyError: A group has no ratio, or a ratio is not finite.
    """
    return Projector(problem).project(ratios, target)


@dataclass(frozen=True, slots=True)
class _Limit:
    """An inclusive upper limit on one cost; `shares` prices, for each group, only what it takes part in."""

    cost: str
    limit: int
    shares: tuple[CostModel, ...]


@dataclass(frozen=True, slots=True)
class _Proposal:
    """Ratios in the order of the groups, and the places of those groups that are to stay away."""

    wanted: Sequence[float]
    held: frozenset[int]


class Projector:
    """Projects proposals for one problem; what can be prepared once is prepared on construction."""

    def __init__(self, problem: Problem) -> None:
        self._groups = problem.groups
        self._model = problem.cost_model
        self._primary = problem.budget.primary
        self._dense = problem.cost_model.cost(self._primary, {})
        self._limits = tuple(self._limit(name, limit) for name, limit in problem.budget.limits.items())
        self._unlimited = self._limit(self._primary, self._dense)
        self._fixed = dict(zip(self._model.groups, self._model.sizes, strict=True))

    def project(self, ratios: Mapping[str, float], target: float | None = None) -> dict[str, int]:
        """Returns the width of every group for a proposal of ratios.

        The smallest common shift of all ratios (each clipped to what its group may take) under which every limit holds
        is found by bisection. Then groups grow by one feasible width at a time, first the one whose rounding lost
        most, until no group can grow any more. So a projection of its own output changes nothing, and a higher target
        never gives a lower primary cost.

        A group whose proposed ratio removes it whole stays away: the shift and the slack go to the others, because a
        block that is there with two channels is no near neighbour of one that is gone. It comes back only where all
        others are as wide as they may be and the target is still not met.

        Args:
            ratios: The proposed fraction of channels to remove, by group.
            target: Upper limit on the primary cost as a fraction of the dense network's, which the widths approach from
                below. None: a proposal within the budget is only rounded, and one beyond it is shrunk.

        Raises:
            BudgetError: Not even the narrowest widths meet the limits and the target.
            PolicyError: A group has no ratio, or a ratio is not finite.
        """
        wanted = self._wanted(ratios)
        held = frozenset(
            i
            for i, (g, r) in enumerate(zip(self._groups, wanted, strict=True))
            if nearest_width(g, g.size * (1 - r)) == 0
        )
        limits = self._limits
        if target is not None:
            most = target * self._dense
            # The slack undoes the rounding of a fraction that was itself computed from an integer cost.
            goal = replace(self._unlimited, limit=math.floor(most + 1e-6 + 4 * math.ulp(most)))
            limits = (goal, *limits)
        shift, widths = self._bisect(_Proposal(wanted, held), limits, low=-1.0 if target is not None else 0.0)
        if target is None and shift == 0.0:
            return widths
        spent = self._spend(wanted, shift, dict(widths), limits, held=held)
        if held and all(spent[g.name] == g.widths[-1] for i, g in enumerate(self._groups) if i not in held):
            spent = self._spend(wanted, shift, spent, limits)
        # Shares of a cost that is spread over a batch are rounded, one by one: their sum may be off by one.
        return spent if self._meets(spent, limits) else widths

    def fraction(self, widths: Mapping[str, int]) -> float:
        """Returns the primary cost of `widths` as a fraction of the dense network's."""
        return self._model.cost(self._primary, widths) / self._dense

    def _limit(self, name: str, limit: int) -> _Limit:
        model = self._model
        if name == LATENCY:
            shares = (_latency_share(model, group.name) for group in self._groups)
            return _Limit(name, limit, tuple(shares))
        sums = model.live if name == MEMORY else [(term,) for term in getattr(model, name)]
        own: dict[str, list[tuple[Term, ...]]] = {group: [] for group in model.groups}
        for terms in sums:
            for place in {place for term in terms for form in term.forms for place, _ in form.terms}:
                own[model.groups[place]].append(terms)
        return _Limit(name, limit, tuple(_share(model, name, own[group.name]) for group in self._groups))

    def _wanted(self, ratios: Mapping[str, float]) -> list[float]:
        wanted = []
        for group in self._groups:
            ratio = ratios.get(group.name)
            if ratio is None or not math.isfinite(ratio):
                raise PolicyError(f"group {group.name!r} needs a finite ratio, got {ratio!r}")
            low, high = group.ratio(group.widths[-1]), group.ratio(group.widths[0])
            wanted.append(min(max(ratio, low), high))
        return wanted

    def _at(self, proposal: _Proposal, shift: float) -> dict[str, int]:
        return {
            g.name: 0 if i in proposal.held else nearest_width(g, g.size * (1.0 - r - shift))
            for i, (g, r) in enumerate(zip(self._groups, proposal.wanted, strict=True))
        }

    def _meets(self, widths: Mapping[str, int], limits: Sequence[_Limit]) -> bool:
        values = {**self._fixed, **widths}
        return all(self._model.cost(limit.cost, values) <= limit.limit for limit in limits)

    def _bisect(self, wanted: _Proposal, limits: Sequence[_Limit], *, low: float) -> tuple[float, dict[str, int]]:
        """Returns the smallest shift from `low` on whose widths meet the limits, and these widths."""
        wide = self._at(wanted, low)
        if self._meets(wide, limits):
            return low, wide
        high = 1.0
        narrow = self._at(wanted, high)
        if not self._meets(narrow, limits):
            raise BudgetError(self._complaint(narrow, limits))
        for _ in range(_HALVINGS):
            if len(_steps_apart(self._groups, narrow, wide)) <= 1:
                break
            middle = (low + high) / 2.0
            widths = self._at(wanted, middle)
            if self._meets(widths, limits):
                high, narrow = middle, widths
            else:
                low, wide = middle, widths
        return high, narrow

    def _complaint(self, narrow: Mapping[str, int], limits: Sequence[_Limit]) -> str:
        for limit in limits:
            least = self._model.cost(limit.cost, narrow)
            if least > limit.limit:
                return f"no policy has {limit.cost} <= {limit.limit:,}: the least possible is {least:,}"
        raise AssertionError("every limit is met")  # pragma: no cover

    def _spend(
        self,
        wanted: Sequence[float],
        shift: float,
        widths: dict[str, int],
        limits: Sequence[_Limit],
        *,
        held: frozenset[int] = frozenset(),
    ) -> dict[str, int]:
        """Grows groups but those `held` while the limits hold, first the one whose rounding lost most of its
        channels.
        """
        values = {**self._fixed, **widths}
        spent = [self._model.cost(limit.cost, values) for limit in limits]
        ideal = [g.size * (1.0 - r - shift) for g, r in zip(self._groups, wanted, strict=True)]
        heap = [(_gain(g, ideal[i], widths[g.name]), i) for i, g in enumerate(self._groups) if i not in held]
        heapq.heapify(heap)
        streak = 0
        while heap:
            gain, i = heapq.heappop(heap)
            group = self._groups[i]
            old, new = values[group.name], _wider(group, values[group.name])
            if new is None:
                continue
            grown = []
            for limit, cost in zip(limits, spent, strict=True):
                grown.append(self._after_step(limit, cost, values, index=i, widths=(old, new)))
                if grown[-1] > limit.limit:
                    break
            if grown[-1] > limits[len(grown) - 1].limit:
                values[group.name] = old  # never tried again: the others only grow
                streak = 0
                continue
            values[group.name], spent = new, grown
            heapq.heappush(heap, (_gain(group, ideal[i], new), i))
            streak += 1
            if streak > 2 * len(heap):
                values = self._leap(ideal, values, limits, growing=[i for _, i in heap], level=gain)
                spent = [self._model.cost(limit.cost, values) for limit in limits]
                heap = [(_gain(self._groups[i], ideal[i], values[self._groups[i].name]), i) for _, i in heap]
                heapq.heapify(heap)
                streak = 0
        return {group.name: values[group.name] for group in self._groups}

    def _leap(
        self,
        ideal: Sequence[float],
        values: dict[str, int],
        limits: Sequence[_Limit],
        *,
        growing: Sequence[int],
        level: float,
    ) -> dict[str, int]:
        """Returns where many steps of `_spend` lead, none of which is refused.

        One after the other they take 450 ms for 60 groups of 512 channels where a memory limit holds back two of them.
        """

        def at(reach: float) -> dict[str, int]:
            grown = dict(values)
            for i in growing:
                group = self._groups[i]
                place = bisect_left(group.widths, ideal[i] + reach * group.size)
                width = group.widths[min(place, len(group.widths) - 1)]
                grown[group.name] = max(width, values[group.name])
            return grown

        low, high = level, 1.0 + level
        for _ in range(_LEAP_HALVINGS):
            middle = (low + high) / 2.0
            if self._meets(at(middle), limits):
                low = middle
            else:
                high = middle
        return at(low)

    def _after_step(
        self, limit: _Limit, cost: int, values: dict[str, int], *, index: int, widths: tuple[int, int]
    ) -> int:
        """Returns what `cost` becomes when one group grows; leaves `values` at the new width."""
        name, share = self._groups[index].name, limit.shares[index]
        values[name] = widths[1]
        after = share.cost(limit.cost, values)
        if limit.cost == MEMORY:  # the largest of several sums: those without this group stay as they are
            return max(cost, after)
        values[name] = widths[0]
        before = share.cost(limit.cost, values)
        values[name] = widths[1]
        return cost + after - before


def _share(model: CostModel, name: str, sums: Sequence[tuple[Term, ...]]) -> CostModel:
    """Returns a model of the groups in `sums` alone, whose cost `name` is their total or, for memory, the largest.

    To look up all 60 groups of a network takes ten times as long as the arithmetic on the three that matter.
    """
    used = sorted({place for terms in sums for term in terms for form in term.forms for place, _ in form.terms})
    new = {place: i for i, place in enumerate(used)}
    moved = tuple(
        tuple(
            replace(term, forms=tuple(Form(f.const, tuple((new[p], k) for p, k in f.terms)) for f in term.forms))
            for term in terms
        )
        for terms in sums
    )
    flat = tuple(term for terms in moved for term in terms)
    return CostModel(
        tuple(model.groups[place] for place in used),
        tuple(model.sizes[place] for place in used),
        macs=flat if name == MACS else (),
        params=flat if name == PARAMS else (),
        size_bytes=flat if name == SIZE else (),
        live=moved if name == MEMORY else (),
    )


def _latency_share(model: CostModel, group: str) -> CostModel:
    """Returns a model of the groups alone that share a surface with `group`; see `_share`."""
    surfaces = model.share(LATENCY, group).latency
    used = sorted({place for surface in surfaces for form in surface.forms for place, _ in form.terms})
    new = {place: i for i, place in enumerate(used)}
    moved = tuple(
        Surface(
            tuple(Form(f.const, tuple((new[p], k) for p, k in f.terms)) for f in surface.forms),
            surface.knots,
            surface.values,
        )
        for surface in surfaces
    )
    groups, sizes = tuple(model.groups[p] for p in used), tuple(model.sizes[p] for p in used)
    return CostModel(groups, sizes, (), (), (), latency=moved)


def _gain(group: Group, ideal: float, width: int) -> float:
    """Returns what rounding gave a group, as a fraction of its channels; below zero it lost."""
    return (width - ideal) / group.size


def _wider(group: Group, width: int) -> int | None:
    """Returns the next feasible width above `width`."""
    place = bisect_left(group.widths, width) + 1
    return group.widths[place] if place < len(group.widths) else None


def nearest_width(group: Group, wanted: float) -> int:
    """Returns the feasible width nearest to `wanted` channels, the wider of two equally near ones.

    `Group.width` says the same and looks at every width: 60 groups of 512 channels take it 6 ms.
    """
    widths = group.widths
    place = bisect_left(widths, wanted)
    if place == 0:
        return widths[0]
    if place == len(widths):
        return widths[-1]
    below, above = widths[place - 1], widths[place]
    return above if above - wanted <= wanted - below else below


def _steps_apart(groups: Sequence[Group], narrow: Mapping[str, int], wide: Mapping[str, int]) -> list[str]:
    """Returns the names of the groups that differ, a group twice where it differs by more than one feasible width."""
    apart = []
    for group in groups:
        low, high = narrow[group.name], wide[group.name]
        if low != high:
            apart.append(group.name)
            if bisect_left(group.widths, high) - bisect_left(group.widths, low) > 1:
                apart.append(group.name)
    return apart
