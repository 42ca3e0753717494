"""Pareto fronts of points that are minimised in both coordinates, (error, cost).

Decides what dominates what, how large a front is, and which of its points are well spread. Pure arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float]
SAME = 0.02
"""Part of a cost by which another one may exceed it and still count as equal: where candidates are chosen, and where
they are compared with controls."""


def dominates(a: Point, b: Point) -> bool:
    """Whether `a` is at least as good as `b` in both coordinates and better in one."""
    return a[0] <= b[0] and a[1] <= b[1] and a != b


def front_indices(points: Sequence[Point]) -> list[int]:
    """Returns the indices of the non-dominated points, in order of rising cost; of equal points the first one.

    Points with a coordinate that is not finite are never on the front.
    """
    order = sorted(
        (i for i, p in enumerate(points) if math.isfinite(p[0]) and math.isfinite(p[1])),
        key=lambda i: (points[i][1], points[i][0], i),
    )
    front: list[int] = []
    best = math.inf
    for i in order:
        if points[i][0] < best:
            best = points[i][0]
            front.append(i)
    return front


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Returns the area that `points` dominate below `reference`; points beyond it add nothing."""
    area, error = 0.0, reference[0]
    for i in front_indices(points):
        p = points[i]
        if p[0] < error and p[1] < reference[1]:
            area += (error - p[0]) * (reference[1] - p[1])
            error = p[0]
    return area


def ranks(points: Sequence[Point]) -> list[int]:
    """Returns for each point the number of fronts to peel off before it is on one; not finite: one past the last."""
    left = list(range(len(points)))
    result = [0] * len(points)
    depth = 0
    while left:
        front = {left[i] for i in front_indices([points[j] for j in left])}
        if not front:
            break
        # Equal points share a rank, although front_indices names only the first of them.
        values = {points[i] for i in front}
        front |= {j for j in left if points[j] in values}
        for i in front:
            result[i] = depth
        left = [i for i in left if i not in front]
        depth += 1
    for i in left:
        result[i] = depth
    return result


def select_spread(points: Sequence[Point], count: int) -> list[int]:
    """Returns `count` indices that are good and well spread along the cost axis, in order of rising cost.

    The cost axis is cut into `count` intervals of equal ratio (from 1 to 1/2 is as far as from 1/2 to 1/4); rounds over
    the intervals take the best remaining point of each, by rank and then by error, so that a crowded stretch does not
    crowd out an end of the front. Costs within 2 % of each other count as equal there: a far worse point that is a
    thousandth cheaper is no alternative.
    """
    finite = [i for i, p in enumerate(points) if math.isfinite(p[0]) and math.isfinite(p[1])]
    if count <= 0 or not finite:
        return []
    levels = cost_levels([points[i][1] for i in finite])
    level = dict(zip(finite, levels, strict=True))
    depth = ranks([(p[0], level.get(i, p[1])) for i, p in enumerate(points)])
    low = min(points[i][1] for i in finite)
    scale = math.log if low > 0 else float
    span = scale(max(points[i][1] for i in finite)) - scale(low) or 1.0
    bins: list[list[int]] = [[] for _ in range(count)]
    for i in finite:
        bins[min(count - 1, int((scale(points[i][1]) - scale(low)) / span * count))].append(i)
    for members in bins:
        members.sort(key=lambda i: (depth[i], points[i][0], points[i][1]), reverse=True)
    chosen: list[int] = []
    while len(chosen) < count and any(bins):
        heads = sorted((members for members in bins if members), key=lambda m: (depth[m[-1]], points[m[-1]][0]))
        for members in heads:
            if len(chosen) == count:
                break
            chosen.append(members.pop())
    return sorted(chosen, key=lambda i: (points[i][1], points[i][0]))


def cost_levels(costs: Sequence[float]) -> list[float]:
    """Returns for each cost the least one that counts as equal to it: a level reaches 2 % beyond its lowest cost."""
    result = [0.0] * len(costs)
    lowest = -math.inf
    for i in sorted(range(len(costs)), key=lambda i: costs[i]):
        if not costs[i] <= lowest + SAME * abs(lowest):
            lowest = costs[i]
        result[i] = lowest
    return result


def spread_order(values: Sequence[float]) -> list[int]:
    """Returns the indices of `values` in an order of which any beginning is well spread: the middle one, the ends, then
    always the one farthest from those before, on a logarithmic scale where all are positive.
    """
    if not values:
        return []
    scaled = [math.log(v) for v in values] if min(values) > 0 else list(values)
    middle = (min(scaled) + max(scaled)) / 2
    order = [min(range(len(scaled)), key=lambda i: (abs(scaled[i] - middle), i))]
    while len(order) < len(scaled):
        left = [i for i in range(len(scaled)) if i not in order]
        order.append(max(left, key=lambda i: (min(abs(scaled[i] - scaled[j]) for j in order), -i)))
    return order


def knee_index(points: Sequence[Point]) -> int | None:
    """Returns the front point farthest below the line through the front's ends, the usual "best for the money"."""
    front = front_indices(points)
    if not front:
        return None
    (e0, c0), (e1, c1) = points[front[0]], points[front[-1]]
    height, width = (e0 - e1) or 1.0, (c1 - c0) or 1.0

    def gain(i: int) -> float:
        error, cost = points[i]
        return (e0 - error) / height - (cost - c0) / width

    return max(front, key=gain)
