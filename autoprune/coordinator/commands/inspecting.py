"""What a space's model consists of, and what its latency is, before any search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoprune import report
from autoprune.coordinator.stored.places import make_home
from autoprune.report.console import terminal
from autoprune.space import Space


def inspect_space(space: Space, *, home: Path) -> tuple[str, dict[str, Any]]:
    """Returns the pruning groups of a space's model, what is frozen and why, and costs, as text and as JSON values.

    Raises:
        InputError: The model or the data cannot be used.
    """
    from autoprune.network import preparing, settings
    from autoprune.network.artifacts import layers as artifacts_layers

    ingredients = preparing.ingredients_of(space, cache=home / "cache")
    network = preparing.trace_ingredients(ingredients, space)
    data = artifacts_layers.describe(network, settings.searchable_groups(network, space))
    width, color = terminal()
    return report.render_inspection(data, title=space.name, console_width=width, color=color).rstrip("\n"), data


def latency_space(space: Space, *, home: Path) -> tuple[str, dict[str, Any]]:
    """Measures the latency table of a space's model, or reads the one that the home folder's cache holds.

    Returns what it predicts, and how well, as text and as JSON values.

    Raises:
        InputError: The model or the data cannot be used, or the network cannot be timed under the space's conditions.
    """
    from autoprune.network import preparing
    from autoprune.network.latency.cache import latency_table

    make_home(home)
    with report.Progress() as progress:
        ingredients = preparing.ingredients_of(space, cache=home / "cache")
        network = preparing.trace_ingredients(ingredients, cache=home / "cache", note=progress.note)
        data = latency_table(network, space, cache=home / "cache", note=progress.note).summary()
    width, color = terminal()
    return report.render_latency(data, title=space.name, console_width=width, color=color).rstrip("\n"), data
