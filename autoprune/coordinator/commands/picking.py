"""Which models a person picked, and how a pick is made, kept and found again.

Decides what `NAME`, `NAME@knee` and `NAME --trial N` mean, and which point a wish such as "at most half the MACs"
chooses. Picks made in the MLflow UI hold; a pick made here is kept with the study too, so that it works where MLflow is
away, and is handed over once it is back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoprune import studies, tracking
from autoprune.budget import KEYS, parse_limit
from autoprune.coordinator.recording.registering import ALIASES, FINETUNE, FINETUNED, aliases_of, candidates
from autoprune.coordinator.stored.display import view_of
from autoprune.coordinator.stored.places import open_existing
from autoprune.coordinator.stored.search import StoredSearch, read_search
from autoprune.errors import InputError, StudyError, TrackingError, nearest
from autoprune.report import SearchView

Say = Callable[[str], None]


@dataclass(frozen=True)
class Pick:
    """A model of a search: its trial's key, the number that people use, the rung and the folder that holds it."""

    search: str
    key: str
    trial: int
    rung: str
    folder: Path
    shown: bool = True
    """Whether it is of the rung that the front shows."""

    @property
    def label(self) -> str:
        """How it is called in the names of folders: `17`, or `tune-17` where it is not of the shown rung."""
        return str(self.trial) if self.shown else f"{self.rung}-{self.key.rpartition('/')[2]}"


@dataclass(frozen=True)
class Wish:
    """What a person wants of a point: one of `trial` and `knee`, or limits and the least accuracy.

    `limits` maps keys of a budget (`macs`, `params`, `size`, `memory`) to numbers or texts as a space file takes them;
    `latency_ms` is an upper limit in milliseconds, `accuracy` the least validation accuracy as a fraction, or the least
    value of a metric of the user's own.
    """

    trial: int | None = None
    knee: bool = False
    limits: Mapping[str, str] = field(default_factory=dict)
    latency_ms: float | None = None
    accuracy: float | None = None

    def __post_init__(self) -> None:
        limited = bool(self.limits) or self.latency_ms is not None or self.accuracy is not None
        if (self.trial is not None) + self.knee + limited != 1:
            raise InputError(
                "say which model: --trial N, or --knee, or limits (--max-macs 0.5, --min-accuracy 0.9 ...)"
            )
        if self.accuracy is not None and not math.isfinite(self.accuracy):
            raise InputError(f"the least accuracy is a number, got {self.accuracy}")
        if self.latency_ms is not None and not self.latency_ms > 0:
            raise InputError(f"a latency is a positive number of milliseconds, got {self.latency_ms}")


def split_reference(text: str) -> tuple[str, str | None]:
    """Returns the name and the alias of `NAME@alias`; None where there is no alias.

    Raises:
        InputError: One of the two is empty.
    """
    name, at, alias = text.partition("@")
    if not name or (at and not alias):
        raise InputError(f"write NAME or NAME@alias, got {text!r}")
    return name, alias or None


def pick(name: str, wish: Wish, *, home: Path, say: Say) -> Pick:
    """Picks a model of the front, in place of what was picked before, in the study and in MLflow.

    Args:
        name: The search.
        wish: What is wanted.
        home: The home folder.
        say: Is told, in words, what was done, and where MLflow is away.

    Raises:
        StudyError: There is no such search, or no model of it that meets the wish.
        InputError: The wish cannot be read.
    """
    stored = read_search(name, home=home)
    found = of_trial(stored, chosen_trial(view_of(stored), wish))
    _keep(home, name, [found.key], synced=False)
    try:
        reader = reader_of(home)
    except TrackingError as error:
        say(f"MLflow is away; the pick is kept with the study and handed over later ({error})")
        return found
    try:
        say(_hand_over(reader, name, found.key))
        _keep(home, name, [found.key], synced=True)
    except TrackingError as error:
        say(f"MLflow does not have the pick yet; it is kept with the study ({error})")
    return found


def chosen_trial(view: SearchView, wish: Wish) -> int:
    """Returns the number of the trial that meets a wish.

    Of several points of the front within the limits it is the most accurate one; where the least accuracy alone is
    given, the one of least primary cost. A metric of the user's own is compared as it is.

    Raises:
        StudyError: No point meets the wish; the message shows the front.
        InputError: A limit cannot be read, or an accuracy is no fraction.
    """
    if wish.accuracy is not None and view.objective.percent and not 0 < wish.accuracy <= 1:
        raise InputError(f"an accuracy is a fraction in (0, 1], got {wish.accuracy}")
    if wish.trial is not None:
        return wish.trial
    if wish.knee:
        if view.knee is None or view.knee.trial is None:
            raise StudyError(f"the front of {view.name} has fewer than three points, so it has no knee: use --trial")
        return view.knee.trial
    within = list(view.front)
    for key, text in wish.limits.items():
        limit, fraction = parse_limit(text)
        limit *= view.dense.costs[KEYS[key]] if fraction else 1
        within = [p for p in within if p.costs[KEYS[key]] <= limit]
    if wish.latency_ms is not None:
        within = [p for p in within if p.metrics.get("latency_ms", math.inf) <= wish.latency_ms]
    if wish.accuracy is not None:
        within = [p for p in within if p.val_accuracy >= wish.accuracy]
    if not within or within[0].trial is None:
        raise StudyError(f"no point of the front of {view.name} has {_wish_text(wish, view)}. {_front_text(view)}")
    limited = wish.limits or wish.latency_ms is not None
    best = max(within, key=lambda p: p.val_accuracy) if limited else within[0]
    assert best.trial is not None  # points of the front are trials
    return best.trial


def _wish_text(wish: Wish, view: SearchView) -> str:
    parts = [f"{key} <= {text}" for key, text in wish.limits.items()]
    parts += [f"latency <= {wish.latency_ms:g} ms"] if wish.latency_ms is not None else []
    parts += [f"{view.objective.name} >= {wish.accuracy:g}"] if wish.accuracy is not None else []
    return ", ".join(parts)


def _front_text(view: SearchView) -> str:
    points = []
    for p in view.front:
        latency = f", {p.metrics['latency_ms']:.3g} ms" if "latency_ms" in p.metrics else ""
        points.append(
            f"trial {p.name}: {view.objective.name} {view.objective.plain(p.val_accuracy)},"
            f" {view.fraction(p):.3f} of {view.primary}{latency}"
        )
    return f"The front: {'; '.join(points) or 'empty'}{view.objective.hint}"


def resolve(reference: str, *, home: Path, trial: int | None, say: Say) -> list[Pick]:
    """Returns the models that `NAME`, `NAME@alias` or a trial's number mean; without either the picked ones.

    Raises:
        StudyError: There is no such search, trial or alias, nothing is picked, or the weights were not kept.
        InputError: Both an alias and a trial are given.
    """
    name, alias = split_reference(reference)
    stored = read_search(name, home=home)
    if trial is not None:
        if alias is not None:
            raise InputError(f"{reference} names a model already: leave --trial {trial} or @{alias} out")
        return [of_trial(stored, trial)]
    if alias in ALIASES:
        view = view_of(stored)
        key = aliases_of(view, candidates(stored, view))[alias]
        if key is None:
            why = "it has fewer than three points" if alias == "knee" else "its weights were not kept"
            raise StudyError(f"the front of {name} has no {alias}: {why}")
        return [of_key(stored, key)]
    if alias == FINETUNED:
        folders = finetuned_folders(home, name)
        if not folders:
            raise StudyError(f"nothing of {name} was trained longer yet: `autoprune finetune {name}@knee --epochs 20`")
        return [_finetuned(stored, folders[-1])]
    if alias is not None and alias != tracking.PICKED:
        return [of_key(stored, _named_in_mlflow(home, name, alias))]
    keys = picks(name, home=home, say=say)
    if not keys:
        raise StudyError(
            f"no model of {name} is picked: set the alias `{tracking.PICKED}` on a version in the MLflow UI, or run"
            f" `autoprune pick {name} --knee` (or --trial N), or name one: {name}@knee"
        )
    return [of_key(stored, key) for key in keys]


def picks(name: str, *, home: Path, say: Say) -> list[str]:
    """Returns the keys of the trials that are picked: in MLflow where it answers, else as the study remembers.

    Raises:
        InputError: Something was picked that is no trial of this search.
    """
    study = _first_study(home, name)
    kept = studies.read_pick(study) or {"keys": [], "synced": True}
    try:
        reader = reader_of(home)
        if not kept["synced"]:
            for key in kept["keys"]:
                say(_hand_over(reader, name, key))
        found = sorted(reader.registry(name).picked(name, name))
    except TrackingError as error:
        say(f"MLflow is away; what the study remembers holds ({error})")
        return list(kept["keys"])
    _keep(home, name, found, synced=True)
    return found


def of_trial(stored: StoredSearch, number: int) -> Pick:
    """Returns the model of the trial that people call `number`.

    Raises:
        StudyError: There is no such trial, or its weights were not kept.
    """
    folder = stored.model_path(number)
    for rung in dict.fromkeys([stored.shown_rung, stored.picked_rung]):
        for shown in stored.shown(rung):
            if shown.number == number and stored.folder(shown.result) == folder:
                key = tracking.trial_key(studies.study_name(stored.name, rung), shown.own)
                return Pick(stored.name, key, number, rung, folder, rung == stored.shown_rung)
    raise StudyError(f"{stored.name} has no finished trial {number}")


def of_key(stored: StoredSearch, key: str) -> Pick:
    """Returns the model of the trial with this key: that very one, of whatever rung.

    Raises:
        StudyError: This home folder has no such trial, or its weights were not kept.
    """
    study, _, own = key.rpartition("/")
    rung = study.removeprefix(f"{stored.name}.")
    if rung == FINETUNE:
        return _finetuned(stored, finetuned_root(stored.home, stored.name) / own)
    trial = next((t for t in stored.rungs.get(rung, ()) if str(t.number) == own), None)
    if trial is None or trial.result is None:
        raise StudyError(f"the home folder {stored.home} holds no finished trial {key}: was it searched elsewhere?")
    folder = stored.folder(trial.result)
    if folder is None:
        raise StudyError(
            f"the weights of {rung} trial {own} of {stored.name} were not kept (it is not on the front): pick another"
        )
    renamed = rung in stored.order and stored.order.index(rung) > stored.order.index(stored.picked_rung)
    number = int(trial.origin) if renamed else trial.number
    return Pick(stored.name, key, number, rung, folder, rung == stored.shown_rung)


def finetuned_root(home: Path, name: str) -> Path:
    """Returns the folder of the models of a search that were trained longer."""
    return home / "finetuned" / name


def finetuned_folders(home: Path, name: str) -> list[Path]:
    """Returns the models of a search that were trained longer, oldest first."""
    root = finetuned_root(home, name)
    found = [path for path in root.iterdir() if path.name.isdecimal()] if root.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


def reader_of(home: Path) -> tracking.Reader:
    """Returns what reads the MLflow store of a home folder.

    Raises:
        TrackingError: It cannot be reached, or was not made yet.
    """
    uri = tracking.resolve_uri(home, os.environ)
    path = tracking.sqlite_path(uri)
    if path is not None and not path.is_file():
        raise TrackingError(f"there is no MLflow store {path} yet")
    return tracking.open_reader(uri)


def _finetuned(stored: StoredSearch, folder: Path) -> Pick:
    try:
        document: dict[str, Any] = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"the fine-tuned model {folder} is not there") from error
    key = tracking.trial_key(studies.study_name(stored.name, FINETUNE), int(folder.name))
    return Pick(stored.name, key, int(document[FINETUNE]["trial"]), FINETUNE, folder, shown=False)


def _named_in_mlflow(home: Path, name: str, alias: str) -> str:
    registry = reader_of(home).registry(name)
    version = registry.named(alias)
    if version is None or not version.key:
        known = [*ALIASES, FINETUNED, *(a for v in registry.versions() for a in v.aliases)]
        raise StudyError(f"no model of {name} has the alias {alias!r}{nearest(alias, dict.fromkeys(known))}")
    return version.key


def _hand_over(reader: tracking.Reader, name: str, key: str) -> str:
    return reader.registry(name).choose(name, key, reader.trial_run(name, key))


def _first_study(home: Path, name: str) -> Any:
    storage = open_existing(home)
    return studies.load_rung(storage, name, studies.rung_names(storage, name)[0])


def _keep(home: Path, name: str, keys: Sequence[str], *, synced: bool) -> None:
    studies.write_pick(_first_study(home, name), {"keys": list(keys), "synced": synced})
