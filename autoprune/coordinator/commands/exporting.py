"""Writes chosen models to disk: each in the formats asked for, with a model card beside it.

Decides the folders and what the card is told. Nothing is left half-written: a folder that is there already keeps its
files until the new ones are checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune import tracking
from autoprune.coordinator.commands.picking import Pick, Say, resolve
from autoprune.coordinator.recording.registering import FINETUNE
from autoprune.coordinator.stored.search import StoredSearch, read_search
from autoprune.coordinator.stored.setup import Setup, space_of
from autoprune.errors import InputError
from autoprune.files import write_whole
from autoprune.report.card import Card, ClassScores, card_markdown

CARD = "README.md"


@dataclass(frozen=True)
class ExportWish:
    """What is exported and how: `reference` as `resolve` reads it; `output` replaces `exports/NAME-TRIAL`.

    With `evaluate` the card also tells dense and pruned accuracy on validation and test data, class by class. With
    `allow_code` a model may be built by code from outside the working directory.
    """

    reference: str
    trial: int | None = None
    formats: Sequence[str] = ("safetensors",)
    output: Path | None = None
    evaluate: bool = False
    allow_code: bool = False


def export_models(wish: ExportWish, *, home: Path, say: Say) -> list[Path]:
    """Writes the models that a wish means, and returns the files.

    Raises:
        StudyError: There is no such search or model, nothing is picked, or the weights were not kept.
        InputError: A format is unknown, a model cannot be exported, or several models are to go to one folder.
    """
    chosen = resolve(wish.reference, home=home, trial=wish.trial, say=say)
    if len(chosen) > 1 and wish.output is not None:
        names = ", ".join(f"{pick.search} trial {pick.label}" for pick in chosen)
        raise InputError(f"several models are picked ({names}): leave --output out, or name one by --trial")
    files: list[Path] = []
    for pick in chosen:
        say(f"exporting {pick.search}, trial {pick.label} ({pick.rung})")
        target = wish.output or Path("exports") / f"{pick.search}-{pick.label}"
        files += _export(pick, target, wish, home=home, say=say)
    return files


def _export(pick: Pick, target: Path, wish: ExportWish, *, home: Path, say: Say) -> list[Path]:
    from autoprune.network import afterwards
    from autoprune.network.artifacts.export import export
    from autoprune.network.artifacts.saved import check_model, read_document

    stored = read_search(pick.search, home=home)
    setup = stored.setup if wish.evaluate or stored.background is not None else None  # an older search has none
    check_model(pick.folder, allow=wish.allow_code)
    files = [path for format in wish.formats for path in export(pick.folder, target, format=format)]
    document = read_document(pick.folder)
    scores: list[ClassScores] = []
    if wish.evaluate and setup is not None:
        space = space_of(setup, doing="evaluate by class", allow_code=wish.allow_code)
        found = afterwards.score_by_class(space, pick.folder, cache=home / "cache", note=say)
        scores = [ClassScores(s.split, s.count, s.dense, s.pruned, s.classes) for s in found]
    card = Card(
        title=f"{pick.search}, trial {pick.label}",
        document=document,
        dense=stored.facts["dense_metrics"],
        files=[path.name for path in files],
        latency=afterwards.time_both(pick.folder, **_conditions(stored)),
        scores=scores,
        made=_made(pick, document, setup),
        settings=setup.space if setup is not None and not setup.at_hand else None,
        objective=stored.objective,
    )
    write_whole(target / CARD, card_markdown(card).encode())
    return [*files, target / CARD]


def _conditions(stored: StoredSearch) -> dict[str, Any]:
    """Returns the conditions under which the search measured latency; a search of an older version tells none."""
    known = stored.facts.get("latency") or {}
    return {name: known[name] for name in ("batch", "dtype", "threads") if name in known}


def _made(pick: Pick, document: dict[str, Any], setup: Setup | None) -> dict[str, str]:
    fidelity = document["result"]["fidelity"]
    versions = tracking.environment_tags()
    facts = setup.facts if setup is not None else {}
    made = {
        "search": pick.search,
        "trial": f"{pick.trial} (`{pick.key}`)",
        "rung": f"{fidelity['rung']}: {fidelity['epochs']:g} epochs of fine-tuning, seeds: {fidelity['seeds']}",
        "channels kept": f"identity `{document['result']['identity']}`",
        "seed": str(document["result"]["seed"]),
        **{name: facts[name] for name in ("device", "threads", "training_precision", "fingerprint") if name in facts},
    }
    if FINETUNE in document:
        made["fine-tuned from"] = f"`{document[FINETUNE]['from']}`"
    names = ("version.autoprune", "version.torch", "version.python", "git_commit")
    return made | {f"{name.removeprefix('version.')} at export": versions[name] for name in names if name in versions}
