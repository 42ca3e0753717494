"""Measurements that are taken when a search has ended and no worker runs: the front's latency.

Decides which models are measured once more.
"""

from __future__ import annotations

from autoprune.coordinator.stored.search import DENSE, StoredSearch, model_key
from autoprune.network.artifacts.saved import read_document, shrink_to
from autoprune.network.graph.copies import deep_copy
from autoprune.network.workbench import Workbench
from autoprune.pareto import front_indices


def measure_front(bench: Workbench, stored: StoredSearch) -> dict[str, dict[str, float]]:
    """Measures the front's models and the dense one once more, and returns what is new by model.

    What a worker measured beside others is noise; see `autoprune.network.latency.timing`.
    """
    shown = stored.shown()
    primary = stored.facts["primary"]
    points = [(s.result.val_error, float(s.result.costs[primary])) for s in shown]
    found: dict[str, dict[str, float]] = {}
    for result in (shown[i].result for i in front_indices(points)):
        folder = stored.folder(result)
        if folder is not None and model_key(result) not in stored.measured:
            model = shrink_to(deep_copy(bench.network.model).cpu(), folder, read_document(folder))
            found[model_key(result)] = bench.measure(model)
    if found and DENSE not in stored.measured:
        found[DENSE] = bench.measure(bench.network.model)
    return found
