"""What a search needs before its first trial: network, latency table, problem, storage and workbench, step by step.

Decides the order, so that what can be refused is refused before anything slow is done or written. Must not know how a
search runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autoprune import studies, tracking
from autoprune.coordinator.stored.places import models_path, storage_path
from autoprune.errors import StudyError
from autoprune.network import preparing, settings
from autoprune.network.graph.network import Network
from autoprune.network.latency.cache import latency_table
from autoprune.network.latency.table import LatencyTable
from autoprune.network.workbench import Workbench
from autoprune.objective import objective_of
from autoprune.policy import digest
from autoprune.results import Problem
from autoprune.space import Space


@dataclass(frozen=True)
class Prepared:
    """A search that is ready to run.

    `sections` are the settings that decide a result, by section, with digests of what the search found out itself.
    `table` is there where latency is limited. `watches` says whether MLflow gets the machine's own metrics.
    """

    space: Space
    home: Path
    sections: Mapping[str, str]
    network: Network
    table: LatencyTable | None
    problem: Problem
    storage: Any
    watches: bool
    bench: Workbench

    @property
    def fingerprint(self) -> str:
        """Stands for everything that decides a result."""
        return digest(self.sections)


def prepare(
    space: Space,
    ingredients: preparing.Ingredients,
    *,
    sections: Mapping[str, str],
    home: Path,
    note: Callable[[str], None],
) -> Prepared:
    """Traces the network, opens the studies' storage, trains a baseline where there is none, and learns about groups.

    Args:
        space: The settings.
        ingredients: The model and its data.
        sections: The settings that decide a result, by section.
        home: Folder of the studies, models and caches.
        note: Told what takes long, and what a person should know.

    Raises:
        InputError: Something that the settings name cannot be used.
        StudyError: The study belongs to other settings, or shares its database with MLflow.
        TrialError: The training of a baseline diverged.
    """
    cache = home / "cache"
    network = preparing.trace_ingredients(ingredients, space, cache=cache, note=note)
    groups = settings.searchable_groups(network, space)
    table: LatencyTable | None = None
    if space.budget.limits_latency:
        table = latency_table(network, space, cache=cache, note=note)
        network = network.with_latency(table.surfaces)
        sections = {**sections, "latency_table": digest([asdict(surface) for surface in table.surfaces])}
    objective = objective_of(ingredients.metric)
    problem = replace(settings.problem_of(network, groups, space), objective=objective)
    _check_apart(home)
    storage = studies.open_storage(storage_path(home), say=note)
    _check_study(storage, space, problem, sections)
    if objective.note:
        note(objective.note)
    watches = tracking.watches_machine(os.environ)
    preparing.train_baseline(space, ingredients, cache=cache, note=note)
    models = models_path(home, space.name)
    bench = preparing.workbench_of(space, ingredients, network, cache=cache, models=models, note=note)
    return Prepared(space, home, dict(sections), network, table, problem, storage, watches, bench)


def _check_apart(home: Path) -> None:
    """Refuses one database for both: Optuna and MLflow each keep a table `alembic_version` of their own."""
    tracked = tracking.resolve_uri(home, os.environ)
    if studies.same_database(str(storage_path(home)), tracked):
        raise StudyError(
            "the studies and MLflow need databases of their own (both keep a table of the same name): name another one"
            " by --storage or MLFLOW_BACKEND_STORE_URI"
        )


def _check_study(storage: Any, space: Space, problem: Problem, sections: Mapping[str, str]) -> None:
    """Refuses a study of other settings before anything slow is done or written."""
    name = studies.study_name(space.name, space.search.ladder[0].rung)
    if name in {study.study_name for study in storage.get_all_studies()}:
        studies.open_study(storage, name, problem, fingerprint=digest(sections), settings=sections, create=False)
