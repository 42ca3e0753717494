"""From a space's settings to what the network's own parts take, and to the problem that the search solves.

Decides what each section of a space means here. Knows nothing of caches or of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from autoprune.budget import resolve_budget
from autoprune.errors import InputError, nearest
from autoprune.network.data.loading import DataSettings
from autoprune.network.graph.network import Network
from autoprune.network.surgery.activations import choices_of
from autoprune.network.surgery.masks import grid_widths, pair_widths
from autoprune.network.training.recipe import Baseline, Distillation, Iterative, Recipe
from autoprune.network.training.regularisation import Regularisation
from autoprune.policy import CHANNEL, SEMI_STRUCTURED, Group, feasible_widths
from autoprune.results import Problem
from autoprune.space import Space


def recipe_of(space: Space) -> Recipe:
    """Returns the space's recipe section as the network's own type."""
    section = space.recipe.model_dump()
    distillation, baseline = section.pop("distillation"), section.pop("baseline")
    schedule, regularisation = section.pop("schedule"), section.pop("regularisation")
    if schedule:
        schedule.pop("kind")
    return Recipe(
        **section,
        distillation=Distillation(**distillation) if distillation else None,
        baseline=Baseline(**baseline),
        schedule=Iterative(**schedule) if schedule else None,
        regularisation=Regularisation(**regularisation) if regularisation else None,
    )


def data_settings(space: Space) -> DataSettings:
    """Returns the space's data section as the network's own type."""
    data, preprocessing = space.data, space.data.preprocessing
    return DataSettings(
        name=data.name,
        factory=data.factory,
        path=data.path,
        download=data.download,
        validation_source=data.validation.source,
        validation_fraction=data.validation.part,
        validation_match=data.validation.match,
        calibration=data.calibration,
        size=preprocessing.size,
        mean=preprocessing.mean,
        std=preprocessing.std,
        flip=preprocessing.flip,
        crop_padding=preprocessing.crop_padding,
    )


def searchable_groups(network: Network, space: Space) -> tuple[Group, ...]:
    """Returns the groups that the space lets the search prune, with their feasible widths and criterion scopes.

    Raises:
        InputError: A glob matches no group, or nothing is left to prune.
    """
    settings = space.groups
    names = [group.name for group in network.groups]
    for glob in (*settings.include, *settings.exclude):
        if not any(fnmatchcase(name, glob) for name in names):
            raise InputError(f"groups: {glob!r} matches no pruning group{nearest(glob, names)}")
    chosen = [
        group
        for group in network.groups
        if any(fnmatchcase(group.name, glob) for glob in settings.include)
        and not any(fnmatchcase(group.name, glob) for glob in settings.exclude)
    ]
    if not chosen:
        raise InputError("groups: include and exclude leave nothing to prune")
    scope = space.criteria.scope
    return tuple(
        Group(
            group.name,
            group.size,
            ((0,) if settings.blocks and group.name in network.removable else ()) + _widths(space, group.size),
            {"model": "model", "stage": group.stage, "layer": group.name}[scope],
        )
        for group in chosen
    )


def _widths(space: Space, size: int) -> tuple[int, ...]:
    settings = space.groups
    low, high = settings.min_ratio, settings.max_ratio
    if space.pruning == CHANNEL:
        return feasible_widths(size, min_ratio=low, max_ratio=high, round_to=settings.round_to)
    if space.pruning == SEMI_STRUCTURED:
        return pair_widths(size, min_ratio=low, max_ratio=high)
    return grid_widths(size, step=settings.step, min_ratio=low, max_ratio=high)


def problem_of(network: Network, groups: Sequence[Group], space: Space) -> Problem:
    """Returns what the search needs to know about a traced network.

    Raises:
        BudgetError: No policy meets the budget.
        InputError: An activation is to be replaced and the network has no module of that kind.
    """
    section = space.budget
    budget = resolve_budget(
        section.limits, network.cost_model, groups, front=section.front, points=section.points or ()
    )
    activations = choices_of(network, space.activations.choices, activation_scope(space))
    return Problem(tuple(groups), network.cost_model, budget, tuple(space.criteria.choices), activations)


def activation_scope(space: Space) -> str:
    """Returns over what one choice of an activation holds; by default as for criteria."""
    return space.activations.scope or space.criteria.scope
