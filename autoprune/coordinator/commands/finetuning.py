"""Trains a chosen model of a search longer, as a run of its own that is linked to where it comes from.

Decides where the result is kept, how it is numbered and what is recorded. The model appears in its folder whole or not
at all; MLflow being away delays the record, which `autoprune sync` makes later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune.coordinator.commands.picking import Pick, Say, finetuned_folders, finetuned_root, resolve
from autoprune.coordinator.recording.records import Records
from autoprune.coordinator.recording.registering import FINETUNE
from autoprune.coordinator.stored.search import read_search
from autoprune.coordinator.stored.setup import space_of
from autoprune.errors import InputError
from autoprune.objective import ACCURACY, Objective
from autoprune.results import TrialResult

_PATIENCE = 60.0
"""Seconds that are waited for MLflow at the end."""


@dataclass(frozen=True)
class Finetuned:
    """A model that was trained longer: its folder, its number among its search's, and what was measured."""

    folder: Path
    number: int
    origin: Pick
    result: TrialResult
    recorded: bool
    objective: Objective = ACCURACY

    @property
    def text(self) -> str:
        """What a person reads."""
        metrics, name, own = self.result.metrics, self.origin.search, self.objective
        before, after = (metrics[key] for key in ("val_accuracy_before", "val_accuracy"))
        change = own.difference(after, before, 2)
        lines = [
            f"{name}, trial {self.origin.label}, trained {self.result.fidelity.epochs:g} epochs longer:",
            f"  {own.long('val')} {own.text(before, 2)} before, {own.text(after, 2)} after ({change}){own.hint}",
            f"  {own.long('test')} {own.text(metrics['test_accuracy'], 2)}",
            f"  model {self.folder}",
        ]
        if not self.recorded:
            lines.append(f"MLflow is away: `autoprune sync {name}` records it once it is back.")
        return "\n".join([*lines, f"Next: autoprune export {name}@finetuned --format onnx"])


def finetune_model(
    reference: str,
    *,
    home: Path,
    trial: int | None,
    how: Mapping[str, Any],
    say: Say,
    allow_code: bool = False,
) -> Finetuned:
    """Trains one model of a search longer with the space's recipe and evaluates it on validation and test data.

    Args:
        reference: Which model, as `resolve` reads it.
        home: The home folder.
        trial: The trial's number, where `reference` is a search's name.
        how: `epochs`, `lr` (None: the recipe's) and `seed`.
        say: Is told of progress, in words.
        allow_code: Whether code that the settings or the model name may come from outside the working directory.

    Raises:
        StudyError: There is no such model, or model and data were Python objects.
        InputError: Epochs or rate cannot be used, several models are picked, or code may not be run.
        TrialError: Training diverged; nothing is kept.
    """
    from autoprune.network import afterwards
    from autoprune.network.artifacts.saved import check_model

    training = afterwards.Training(**how)
    chosen = resolve(reference, home=home, trial=trial, say=say)
    if len(chosen) > 1:
        names = ", ".join(pick.label for pick in chosen)
        raise InputError(f"several models are picked (trials {names}); name one: --trial {chosen[0].trial}")
    origin = chosen[0]
    stored = read_search(origin.search, home=home)
    setup = stored.setup
    space = space_of(setup, doing="train a model longer", allow_code=allow_code)
    check_model(origin.folder, allow=allow_code)
    done = finetuned_folders(home, origin.search)
    number = int(done[-1].name) + 1 if done else 1
    folder = finetuned_root(home, origin.search) / str(number)
    say(f"training trial {origin.label} of {origin.search} for {training.epochs:g} epochs")
    link = {"from": origin.key, "trial": origin.trial}
    result = afterwards.finetune(
        space, origin.folder, training=training, cache=home / "cache", target=afterwards.Target(folder, link), note=say
    )
    records = Records(origin.search, setup, home=home, say=say, opens=False, objective=stored.objective)
    record_finetuned(records, folder)
    left = records.close(_PATIENCE)
    return Finetuned(folder, number, origin, result, recorded=left == 0, objective=stored.objective)


def record_finetuned(records: Records, folder: Path) -> None:
    """Queues the record of a model that was trained longer, with its registered version."""
    document = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
    result = TrialResult.from_json(document[FINETUNE]["result"])
    records.finetuned(int(folder.name), folder, result, origin=document[FINETUNE]["from"])


def record_all_finetuned(records: Records, home: Path) -> int:
    """Queues the records of every model of a search that was trained longer; returns how many there are."""
    folders = finetuned_folders(home, records.name)
    for folder in folders:
        record_finetuned(records, folder)
    return len(folders)
