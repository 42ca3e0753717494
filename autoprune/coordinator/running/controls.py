"""The controls: what stands beside a finished front under the same recipe, to show what the search gained.

Decides which policies these are and where they are measured: simple ones in a rung of their own, and points of the
front whose networks are trained from random weights in another one.
"""

from __future__ import annotations

from dataclasses import replace

from autoprune.coordinator.stored.search import CONTROLS, SCRATCH, StoredSearch
from autoprune.network.workbench import Workbench
from autoprune.pareto import front_indices, select_spread
from autoprune.results import WarmStart
from autoprune.studies import LadderPlan, RungPlan
from autoprune.studies.warmstart import control_policies


def controls_plan(plan: LadderPlan, bench: Workbench, *, count: int) -> LadderPlan | None:
    """Returns the one-rung ladder of `count` simple policies by the last rung's recipe; None where there are none."""
    if count < 1:
        return None
    starts = control_policies(plan.problem, bench.ranking(), count=count, seed=plan.seed)
    identities = {bench.identity(start.policy) for start in starts}
    fidelity = replace(plan.rungs[-1].fidelity, rung=CONTROLS)
    return replace(plan, rungs=(RungPlan(fidelity, len(identities)),), warm_starts=starts, sampler=None)


def scratch_plan(plan: LadderPlan, stored: StoredSearch, *, count: int) -> LadderPlan | None:
    """Returns the one-rung ladder that trains `count` points of the front of the last rung from random weights.

    None where there are no such points.
    """
    last = plan.rungs[-1].fidelity
    shown = stored.shown(last.rung)
    points = [(s.result.val_error, plan.problem.fraction(s.result.costs)) for s in shown]
    front = front_indices(points)
    known = {t.identity for t in stored.rungs.get(SCRATCH, ())}  # of a front that has grown since
    chosen = [shown[front[i]] for i in select_spread([points[i] for i in front], count)]
    if not chosen:
        return None
    starts = tuple(WarmStart(s.result.policy, f"trial {s.number} from scratch") for s in chosen)
    fidelity = replace(last, rung=SCRATCH, scratch=True)
    return replace(
        plan,
        rungs=(RungPlan(fidelity, len(known | {s.result.identity for s in chosen})),),
        warm_starts=starts,
        sampler=None,
    )
