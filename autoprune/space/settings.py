"""A whole space, how it is loaded, and which of its settings decide a result.

Decides the top level of a space file, its fingerprint and its JSON Schema. Must not know how anything is carried out,
nor import torch: whether a model name exists is checked where models are built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from autoprune.errors import Fault, SpaceError
from autoprune.policy import CHANNEL, digest
from autoprune.redaction import holds_secret
from autoprune.space.activations import ActivationSettings
from autoprune.space.code import code_places, refusal
from autoprune.space.faults import plain_faults, shown
from autoprune.space.file import Document, leaves, override, parse_document, read_document
from autoprune.space.inputs import DataSettings, ModelSettings
from autoprune.space.masking import Pruning, pruning_faults
from autoprune.space.method import (
    BudgetSettings,
    CriteriaSettings,
    GroupSettings,
    LatencySettings,
    SearchSettings,
)
from autoprune.space.recipe import RecipeSettings
from autoprune.space.section import NAME_PATTERN, Found, Section

SCHEMA = 1
DEFAULT_SPACE = "digits_resnet20.yaml"
"""Name of the space file that is used where none is given; see `default_space_path`."""


class Space(Section):
    """Settings of a pruning-policy search."""

    schema_version: Literal[1] = Field(alias="schema", description="Version of this format: 1.")
    name: str = Field(
        pattern=NAME_PATTERN,
        max_length=100,
        description="Names the studies and the MLflow experiment: lower-case letters, digits, dots, dashes and "
        "underscores.",
    )
    model: ModelSettings = Field(description="The network to prune.")
    checkpoint: str | None = Field(
        default=None,
        min_length=1,
        description="Trained weights: a .safetensors file or a state dict (.pt, .pth) that loads with weights_only. "
        "Null: a baseline is trained by `recipe.baseline` and cached, unless `model.weights` names some.",
    )
    data: DataSettings = Field(description="The data to fine-tune and score on.")
    pruning: Pruning = Field(
        default="channel",
        description="What is removed. channel: whole channels. unstructured: single weights become zero. 2:4: two of "
        "every four neighbouring weights, layer by layer all of them or none. Zeros are counted as costs saved, and "
        "give no latency without a sparse kernel.",
    )
    budget: BudgetSettings = Field(
        default_factory=BudgetSettings, description="Upper limits on costs, several at once, and the span of the front."
    )
    latency: LatencySettings = Field(
        default_factory=LatencySettings, description="Under which conditions latency is measured and predicted."
    )
    groups: GroupSettings = Field(
        default_factory=GroupSettings, description="Which pruning groups may shrink, and how far."
    )
    criteria: CriteriaSettings = Field(default_factory=CriteriaSettings, description="How channels may be ranked.")
    activations: ActivationSettings = Field(
        default_factory=ActivationSettings, description="Which activations may be replaced by which."
    )
    recipe: RecipeSettings = Field(
        default_factory=RecipeSettings, description="How a pruned network is repaired and fine-tuned."
    )
    search: SearchSettings = Field(default_factory=SearchSettings, description="How the search goes about it.")
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
        description="auto (a GPU where there is one), cpu, cuda or cuda:0.",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Decides splits, samplers and training.")

    @classmethod
    def cross_faults(cls, raw: Mapping[str, Any]) -> Iterator[Found]:
        """Checks that the dense weights come from one place, and what masks cannot do."""
        model = raw.get("model")
        if isinstance(model, Mapping) and model.get("weights") is not None and raw.get("checkpoint") is not None:
            yield ("checkpoint",), "`checkpoint` and `model.weights` exclude each other"
        yield from pruning_faults(raw)
        yield from _scratch_faults(raw)
        recipe, search = raw.get("recipe"), raw.get("search")
        ladder = search.get("ladder") if isinstance(search, Mapping) else None
        if not isinstance(recipe, Mapping) or not isinstance(ladder, (list, tuple)):
            return
        if any(not isinstance(rung, Mapping) or rung.get("epochs", 0) != 0 for rung in ladder):
            return
        for key in ("schedule", "regularisation"):
            if recipe.get(key) not in (None, "one_shot"):
                yield ("recipe", key), "it needs a rung with epochs; no rung of `search.ladder` has any"

    def fingerprint_sections(self) -> dict[str, str]:
        """Returns a digest for each section that decides what a trial's result is.

        Left out: the device, the number of trials, the sampler, and `data.download`, which change what is tried or
        where but not what a policy scores.
        """
        plain = self.model_dump(mode="json", by_alias=True)
        plain["data"].pop("download")
        # Keys that came later are left out where they are not used: studies from before there were any go on.
        if not self.groups.blocks:
            plain["groups"].pop("blocks")
        for key in ("schedule", "regularisation"):
            if plain["recipe"][key] is None:
                plain["recipe"].pop(key)
        for key in ("latency", "latency_ms"):
            if plain["budget"][key] is None:
                del plain["budget"][key]
        ladder = [{k: v for k, v in rung.items() if k != "trials"} for rung in plain["search"]["ladder"]]
        sections = ["model", "checkpoint", "data", "budget", "groups", "criteria", "recipe", "seed"]
        if self.pruning == CHANNEL:
            plain["groups"].pop("step")
        else:
            sections.append("pruning")
        if self.activations.choices:
            sections.append("activations")
        if self.budget.limits_latency:
            sections.append("latency")
        return {name: digest(plain[name]) for name in sections} | {"ladder": digest(ladder)}

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that are the same for spaces whose results can be compared."""
        return digest(self.fingerprint_sections())

    @staticmethod
    def from_mapping(data: Mapping[str, Any]) -> Space:
        """Builds a space from plain values, as the Python interface does. Functions that it names are the caller's.

        Raises:
            SpaceError: Something in `data` is invalid; carries all faults.
        """
        return _validate(Document(dict(data), {}), "the settings", allow_code=True)


def load_space(
    path: Path | str,
    *,
    overrides: Sequence[str] = (),
    env: Mapping[str, str],
    check_files: bool = False,
    allow_code: bool = False,
) -> Space:
    """Reads and validates a space file.

    Args:
        path: The file.
        overrides: Settings `key.path=value` that replace the file's.
        env: The environment for `${VAR}` and `${VAR:-default}` in values.
        check_files: Whether the checkpoint and the data must exist already.
        allow_code: Whether functions that the file names may come from anywhere; else only from the working directory.

    Raises:
        SpaceError: The file is missing, is not YAML, or holds faults; carries all of them.
    """
    document = override(read_document(Path(path), env), overrides, env)
    return _validate(document, str(path), check_files=check_files, allow_code=allow_code)


def parse_space(text: str, *, overrides: Sequence[str] = (), env: Mapping[str, str], source: str = "") -> Space:
    """Does what `load_space` does for the text of a space file.

    Raises:
        SpaceError: The text is not YAML or holds faults; carries all of them.
    """
    return _validate(override(parse_document(text, env, source=source), overrides, env), source)


def default_space_path(folder: Path) -> Path:
    """Returns the space file to use where none is given: `search_spaces/` below `folder`, else the embedded copy."""
    local = folder / "search_spaces" / DEFAULT_SPACE
    return local if local.is_file() else Path(__file__).parent.with_name("default_space.yaml")


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of space files, with a description of every key, for editors."""
    schema = Space.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "autoprune space file"}


def _validate(document: Document, source: str, *, check_files: bool = False, allow_code: bool = False) -> Space:
    faults, data = list(document.faults), document.data
    version = data.get("schema")
    if "schema" in data and (version != SCHEMA or isinstance(version, bool)):
        given = repr(version) if isinstance(version, str) else shown(version)
        text = f"schema {given[:40]} is unknown; this version of autoprune reads schema {SCHEMA}"
        raise SpaceError([document.fault(("schema",), text)], source)
    space = None
    try:
        space = Space.model_validate(data)
    except ValidationError as error:
        # A value that could not be read has been reported; what is then said of its stand-in would only confuse.
        reported = {fault.place for fault in faults}
        faults += [f for f in plain_faults(error, document, Space) if f.place not in reported]
    if check_files:
        reported = {fault.place for fault in faults}
        faults += [fault for fault in _missing_files(document) if fault.place not in reported]
    if not allow_code:
        faults += _refused_code(document)
    faults += _secrets(document)
    if space is None or faults:
        raise SpaceError(sorted(faults, key=lambda f: (f.line is None, f.line or 0, f.place)), source)
    return space


def _secrets(document: Document) -> Iterator[Fault]:
    for place, value in leaves(document.data):
        if isinstance(value, str) and holds_secret(value):
            text = "an address with a password would be stored with every trial: let your function read it itself"
            yield document.fault(place, text)


def _refused_code(document: Document) -> Iterator[Fault]:
    for place, path in code_places(document.data):
        reason = refusal(path, directory=Path.cwd())
        if reason is not None:
            yield document.fault(place, reason)


def _scratch_faults(raw: Mapping[str, Any]) -> Iterator[Found]:
    """Checks that what is to be trained from scratch is trained at all, and in one go."""
    search, recipe = raw.get("search"), raw.get("recipe")
    if not isinstance(search, Mapping) or search.get("scratch") in (None, 0):
        return
    if raw.get("pruning", CHANNEL) != CHANNEL:
        yield ("search", "scratch"), "masks of single weights are not trained from scratch; only pruning: channel is"
    own = recipe if isinstance(recipe, Mapping) else {}
    staged = [key for key in ("schedule", "regularisation") if own.get(key) not in (None, "one_shot")]
    if staged:
        yield ("search", "scratch"), f"there are no weights to prune in stages (recipe.{staged[0]}) from scratch"
    ladder = search.get("ladder")
    last = ladder[-1] if isinstance(ladder, (list, tuple)) and ladder else None
    if isinstance(last, Mapping) and last.get("epochs", 0) == 0:
        yield ("search", "scratch"), "training from scratch needs epochs, and the last rung of `search.ladder` has none"


def _missing_files(document: Document) -> Iterator[Fault]:
    checkpoint, data = document.data.get("checkpoint"), document.data.get("data")
    if isinstance(checkpoint, str) and checkpoint:
        yield from _missing(document, ("checkpoint",), checkpoint, file=True)
    if isinstance(data, dict) and data.get("download") is not True:
        path = data.get("path")
        if isinstance(path, str) and path:
            yield from _missing(document, ("data", "path"), path, file=False)


def _missing(document: Document, place: tuple[str, ...], path: str, *, file: bool) -> Iterator[Fault]:
    kind = "file" if file else "file or folder"
    if "://" in path:
        yield document.fault(place, f"addresses are not read; download the {kind} and name it here")
    elif "\0" in path:
        yield document.fault(place, "a path cannot hold a NUL character")
    elif not Path(path).exists():
        yield document.fault(place, f"there is no {kind} {path!r}")
    elif file and Path(path).is_dir():
        yield document.fault(place, f"{path!r} is a folder; name the file in it")
