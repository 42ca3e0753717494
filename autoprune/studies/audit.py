"""How well one rung ranks what the next one measures.

Decides whether a cheap rung may be trusted to choose for a dear one. Pure arithmetic on results.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoprune.results import TrialResult

MIN_TAU = 0.3
MIN_PAIRS = 6


@dataclass(frozen=True, slots=True)
class Audit:
    """What two rungs say about the policies that both measured.

    `tau` is Kendall's rank correlation of their validation errors (the variant that corrects for ties; None below two
    pairs or where a rung measured the same error throughout). `regret` is how much the second rung's error of the
    first rung's favourite exceeds the least error that the second rung found (None without a pair). `warning` is set
    where the first rung ranks badly.
    """

    pairs: int
    tau: float | None
    regret: float | None
    warning: str | None = None


def audit(results_a: Iterable[TrialResult], results_b: Iterable[TrialResult]) -> Audit:
    """Compares two rungs over the identities that both measured; results that are not finite count as not measured."""
    first = {result.identity: result.val_error for result in results_a if result.finite}
    second = {result.identity: result.val_error for result in results_b if result.finite}
    both = [identity for identity in first if identity in second]
    if not both:
        return Audit(0, None, None)
    tau = kendall_tau([first[i] for i in both], [second[i] for i in both])
    # Of equal favourites the worst one counts: the first rung could not tell them apart.
    best = min(first[i] for i in both)
    regret = max(second[i] for i in both if first[i] == best) - min(second[i] for i in both)
    warning = None
    if len(both) >= MIN_PAIRS and (tau is None or tau < MIN_TAU):
        said = "measured the same error throughout" if tau is None else f"agree by Kendall's τ = {tau:.2f} only"
        warning = f"the two rungs {said} over {len(both)} policies: the first one should not choose for the second"
    return Audit(len(both), tau, regret, warning)


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Returns Kendall's τ-b of two sequences of equal length; None where it is undefined."""
    agree = ties_a = ties_b = 0
    pairs = len(a) * (len(a) - 1) // 2
    for i in range(len(a)):
        for j in range(i):
            x, y = _sign(a[i] - a[j]), _sign(b[i] - b[j])
            agree += x * y
            ties_a += x == 0
            ties_b += y == 0
    scale = math.sqrt((pairs - ties_a) * (pairs - ties_b))
    return agree / scale if scale else None


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
