"""From a rung's settings to its fidelity. Decides nothing else, so that every command runs a rung alike."""

from __future__ import annotations

from autoprune.results import Fidelity
from autoprune.space import RungSettings


def fidelity_of_rung(rung: RungSettings) -> Fidelity:
    """Returns how much of the recipe a rung runs."""
    return Fidelity(rung.rung, rung.epochs, rung.images, rung.seeds, rung.test, calibration=rung.calibration)
