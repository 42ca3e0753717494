"""The search as a Python function: the same machinery for a model and data that are at hand.

Decides how live objects take the place of a space file's sections.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoprune import report
from autoprune.coordinator.running.log import SearchLog
from autoprune.coordinator.running.preparation import prepare
from autoprune.coordinator.running.session import SearchOutcome, Session
from autoprune.coordinator.running.workers import Here, OnRay, Workers
from autoprune.coordinator.stored.places import make_home
from autoprune.errors import InputError
from autoprune.network import preparing
from autoprune.network.data.loading import as_splits
from autoprune.network.data.tasks import check_task
from autoprune.network.graph.copies import deep_copy
from autoprune.network.surgery.attention import replace_attention
from autoprune.space import Space


def search(
    model: Any,
    *,
    data: Any,
    budget: Mapping[str, float | str],
    trials: int = 48,
    name: str | None = None,
    home: str | Path = ".autoprune",
    workers: int | None = None,
    ray: str | None = None,
    cpus_per_trial: float = 1.0,
    gpus_per_trial: float | None = None,
    timeout: float | None = None,
    criteria: Sequence[str] = ("l2", "taylor", "obs"),
    loss: Callable[[Any, Any], Any] | None = None,
    metric: Callable[[Any, Any], Any] | None = None,
    **settings: Any,
) -> SearchOutcome:
    """Searches for a Pareto front of accuracy against complexity of a trained model.

    Run again with the same name and settings, it resumes.

    Args:
        model: A trained `torch.nn.Module`; it is not changed.
        data: A mapping with `train` and any of `calibration`, `val`, `test`, each `(inputs, targets)` or a torch
            `Dataset`; what is missing is carved out of `train`. Whole-number targets `(N,)` are classes; for any other
            targets (quantities, masks) both `loss` and `metric` are needed.
        budget: Limits such as `{"macs": 0.5, "params": "1M"}` and the span `front: [0.2, 0.5]`, as in a space file.
        trials: Candidates on the first rung.
        name: Names the studies and the MLflow experiment; by default the model's class.
        home: Folder of the studies, models and caches.
        workers: Evaluations in parallel. One (the default without `ray`) is made in this process, so that a script
            needs no `if __name__ == "__main__"`; a trial that crashes it (a fault in native code, want of memory) or
            hangs then ends the script, and called again the search resumes. `workers=2` and more are processes: they
            isolate trials, which fail with the reason, and the script needs the guard. With `ray` None means as many
            as the cluster has room for.
        ray: Evaluate on a Ray cluster: `local` (a new one here), `auto` (the one that was started here), `HOST:PORT` or
            `ray://HOST:PORT`. The classes and functions of model, data, loss and metric are looked up by name there:
            they belong into a module that its nodes can import, not into the script itself.
        cpus_per_trial: Processors that an evaluation takes on the cluster.
        gpus_per_trial: GPUs that it takes there; 0.5: two share one. None: one where the search's device is a GPU.
        timeout: Seconds after which nothing more is started.
        criteria: What may rank channels.
        loss: Own loss `loss(output, target)`, the mean over a batch; by default cross-entropy.
        metric: Own metric `metric(output, target)` of a whole split, higher is better: of an error give the negative;
            by default top-1 accuracy.
        **settings: Any other section of a space file: `pruning`, `recipe`, `search`, `groups`, `device`, `seed`.

    Raises:
        InputError: Model, data or settings cannot be used, the study belongs to others, or the cluster cannot be
            reached or has no room.
        MissingExtraError: Ray is wanted and not installed.
        TrialError: Too many trials fail.
    """
    place = _place(workers, ray, cpus_per_trial=cpus_per_trial, gpus_per_trial=gpus_per_trial)
    name = name or re.sub(r"[^a-z0-9._-]+", "-", type(model).__name__.lower()).strip("-") or "model"
    space = Space.from_mapping(
        {
            "schema": 1,
            "name": name,
            "model": {"factory": "autoprune.coordinator.api:search"},
            "data": {"factory": "autoprune.coordinator.api:search"},
            "budget": dict(budget),
            "criteria": {"choices": list(criteria), **settings.pop("criteria_settings", {})},
            **settings,
        }
    )
    folder = Path(home)
    make_home(folder)
    deadline = None if timeout is None else time.monotonic() + timeout
    splits = as_splits(data, settings=None, seed=space.seed)
    check_task(splits, loss=loss, metric=metric)
    key = preparing.splits_digest(splits)
    origin = {"name": None, "factory": None, "class": f"{type(model).__module__}.{type(model).__qualname__}"}
    dense = replace_attention(deep_copy(model).cpu()).eval()
    ingredients = preparing.fitting(preparing.Ingredients(dense, splits, origin, key, loss, metric))
    sections = space.fingerprint_sections() | {"model": preparing.model_digest(model), "data": key}
    with SearchLog(folder, name) as log, report.Progress(on_note=log.note) as progress:
        prepared = prepare(space, ingredients, sections=sections, home=folder, note=progress.note)
        session = Session(prepared, progress=progress, log=log)
        return session.run(workers=place, deadline=deadline, trials=trials, summary=False)


def _place(workers: int | None, ray: str | None, *, cpus_per_trial: float, gpus_per_trial: float | None) -> Workers:
    """Returns where evaluations run, as the command's options of the same names say it."""
    if workers is not None and workers < 1:
        raise InputError(f"a search needs at least one worker, got {workers}")
    if ray is None:
        if cpus_per_trial != 1.0 or gpus_per_trial is not None:
            raise InputError("cpus_per_trial and gpus_per_trial belong to ray")
        return Here() if workers in (None, 1) else workers
    return OnRay(ray, workers, cpus_per_trial, gpus_per_trial)
