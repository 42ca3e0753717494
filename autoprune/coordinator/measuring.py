"""Measurements that are taken when a search has ended and no worker runs: the front's latency, and who is no faster.

Decides which models are measured once more, and what is said of those whose latency did not fall.
"""

from __future__ import annotations

import copy

from autoprune.coordinator.views import DENSE, StoredSearch, model_key
from autoprune.network.artifacts import read_document, shrink_to
from autoprune.network.workbench import Workbench
from autoprune.pareto import front_indices
from autoprune.results import not_faster

NO_FASTER = "Its MACs fell, but its measured latency did not, beyond the spread of the measurement."


def measure_front(bench: Workbench, stored: StoredSearch) -> dict[str, dict[str, float]]:
    """Measures the front's models and the dense one once more, and returns what is new by model.

    What a worker measured beside others is noise; see `autoprune.network.timing`.
    """
    shown = stored.shown()
    primary = stored.facts["primary"]
    points = [(s.result.val_error, float(s.result.costs[primary])) for s in shown]
    found: dict[str, dict[str, float]] = {}
    for result in (shown[i].result for i in front_indices(points)):
        folder = stored.folder(result)
        if folder is not None and model_key(result) not in stored.measured:
            model = shrink_to(copy.deepcopy(bench.network.model).cpu(), folder, read_document(folder))
            found[model_key(result)] = bench.measure(model)
    if found and DENSE not in stored.measured:
        found[DENSE] = bench.measure(bench.network.model)
    return found


def no_faster(stored: StoredSearch, rung: str) -> list[int]:
    """Returns a rung's own numbers of trials whose MACs fell and whose measured latency did not."""
    metrics = {**stored.facts["dense_metrics"], **stored.measured.get(DENSE, {})}
    costs = stored.facts["dense_costs"]
    found = []
    for trial in stored.rungs[rung]:
        if trial.result is None:
            continue
        own = {**trial.result.metrics, **stored.measured.get(model_key(trial.result), {})}
        if not_faster(trial.result.costs, own, dense_costs=costs, dense_metrics=metrics):
            found.append(trial.number)
    return found
