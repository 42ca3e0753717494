"""The registered model of a search: one version for each member of its front, and aliases that name some of them.

Decides when a version is made (once for each trial), which files it points to, and how a person's pick is read back.
Must not know what makes a member the knee, nor how a model is built.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprune.errors import InputError, TrackingError
from autoprune.tracking import records
from autoprune.tracking.connection import translated
from autoprune.tracking.flavour import flavour_files

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

PICKED = "picked"
"""The alias that a person sets."""
_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Member:
    """A model to register.

    `key` is its trial's key and `run_id` that trial's run. `folder` holds safetensors and `policy.json`. `tags` are
    what the registry's table shows, `description` is Markdown. `input_shape` is that of one sample; `outputs` the
    number of logits, `None` where the output is something else.
    """

    key: str
    run_id: str
    folder: Path
    tags: Mapping[str, str]
    description: str
    input_shape: Sequence[int]
    outputs: int | None = None


@dataclass(frozen=True, slots=True)
class Version:
    """A version as the registry holds it: its number, its trial's key (empty for a version that somebody else made),
    and its aliases.
    """

    number: str
    key: str
    run_id: str
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)


class Registry:
    """The registered model called `name` in the store at `uri`."""

    def __init__(self, client: MlflowClient, uri: str, name: str) -> None:
        self.name = name
        self._client = client
        self._uri = uri

    def open(self, *, description: str, tags: Mapping[str, str]) -> None:
        """Makes the registered model where it is missing and writes what the UI says about it.

        Raises:
            TrackingError: The store cannot be used.
        """
        with self._translated("open the registry of"):
            wanted = records.clean_tags(tags)
            if self._find() is None:
                self._client.create_registered_model(self.name, tags=wanted, description=description)
                return
            self._client.update_registered_model(self.name, description=description)
            for key, value in wanted.items():
                self._client.set_registered_model_tag(self.name, key, value)

    def versions(self) -> list[Version]:
        """Returns every version, oldest first; none where there is no such registered model.

        Raises:
            TrackingError: The store cannot be used.
        """
        with self._translated("read the registry of"):
            model = self._find()
            if model is None:
                return []
            named: dict[str, list[str]] = {}
            for alias, number in dict(model.aliases).items():
                named.setdefault(str(number), []).append(str(alias))
            found = sorted(self._all(), key=lambda version: int(version.version))
        return [
            Version(
                number=str(version.version),
                key=str(version.tags.get(records.TRIAL_TAG, "")),
                run_id=str(version.run_id or ""),
                aliases=tuple(sorted(named.get(str(version.version), ()))),
                tags=dict(version.tags),
            )
            for version in found
        ]

    def add(self, members: Sequence[Member], *, loader: str) -> dict[str, str]:
        """Registers those of `members` that have no version yet, and writes what changed about the others.

        A member's files become the artifact `model/` of its run, loadable by `mlflow.pyfunc` through the module
        `loader`.

        Returns:
            The number of every member's version, by its trial's key.

        Raises:
            ValueError: A member's folder holds no model, or a file that could be a pickle.
            TrackingError: The store cannot be used.
        """
        known = {version.key: version for version in self.versions()}
        numbers: dict[str, str] = {}
        for member in members:
            tags = records.clean_tags({**member.tags, records.TRIAL_TAG: member.key})
            old = known.get(member.key)
            if old is None:
                numbers[member.key] = self._create(member, tags, loader)
                continue
            numbers[member.key] = old.number
            with self._translated("update the registry of"):
                for key in (key for key, value in tags.items() if old.tags.get(key) != value):
                    self._client.set_model_version_tag(self.name, old.number, key, tags[key])
        return numbers

    def mark(self, front: Collection[str]) -> None:
        """Tags the versions of the trials `front` with `pareto = true`, all others of ours with `false`.

        Raises:
            TrackingError: The store cannot be used.
        """
        for version in self.versions():
            value = "true" if version.key in front else "false"
            if version.key and version.tags.get(records.PARETO_TAG) != value:
                with self._translated("update the registry of"):
                    self._client.set_model_version_tag(self.name, version.number, records.PARETO_TAG, value)

    def point(self, aliases: Mapping[str, str | None]) -> None:
        """Lets each alias name the version given by its number; `None` removes the alias.

        Raises:
            TrackingError: The store cannot be used, or has no such version.
        """
        with self._translated("name versions in the registry of"):
            model = self._find()
            have = {} if model is None else {str(k): str(v) for k, v in dict(model.aliases).items()}
            for alias, number in aliases.items():
                if number is None and alias in have:
                    self._client.delete_registered_model_alias(self.name, alias)
                elif number is not None and have.get(alias) != number:
                    self._client.set_registered_model_alias(self.name, alias, number)

    def named(self, alias: str) -> Version | None:
        """Returns the version that an alias names, or `None`.

        Raises:
            TrackingError: The store cannot be used.
        """
        return next((version for version in self.versions() if alias in version.aliases), None)

    def picked(self, experiment: str, search: str) -> dict[str, str]:
        """Returns what a person picked: the version with the alias `picked`, and the runs with the tag `pick = true`.

        Returns:
            The run's id of every pick, by its trial's key.

        Raises:
            InputError: A run or version that is no trial of this search was picked.
            TrackingError: The store cannot be used.
        """
        version = self.named(PICKED)
        found: dict[str, str] = {}
        if version is not None:
            if not version.key:
                raise InputError(
                    f"version {version.number} of {self.name} has the alias {PICKED}, but was not made by autoprune:"
                    " set the alias on another version"
                )
            found[version.key] = version.run_id
        for run in self._tagged(experiment):
            key = str(run.data.tags.get(records.TRIAL_TAG, ""))
            if not key or run.data.tags.get(records.SEARCH_TAG) != search:
                raise InputError(
                    f"the run {run.info.run_name!r} ({run.info.run_id}) has the tag {records.PICK_TAG} = true, but is"
                    f" no trial of {search}: remove the tag there"
                )
            found[key] = str(run.info.run_id)
        return found

    def choose(self, experiment: str, key: str, run_id: str | None) -> str:
        """Picks one trial in place of all that were picked: by the alias where it has a version, else by its run's tag.

        Args:
            experiment: Where the runs of the search are.
            key: The trial's key.
            run_id: The trial's run.

        Returns:
            What was done, in words.

        Raises:
            TrackingError: The store cannot be used, or holds neither the version nor the run.
        """
        version = next((version for version in self.versions() if version.key == key), None)
        if version is None and run_id is None:
            raise TrackingError(f"MLflow holds neither a version nor a run of {key}: `autoprune sync` records it")
        with self._translated("pick in"):
            for run in self._tagged(experiment):
                self._client.set_tag(run.info.run_id, records.PICK_TAG, "false")
            if version is None and run_id is not None:
                self._client.set_tag(run_id, records.PICK_TAG, "true")
        self.point({PICKED: version.number if version is not None else None})
        if version is None:
            return f"the run {run_id} has the tag {records.PICK_TAG} = true"
        return f"version {version.number} of {self.name} has the alias {PICKED}"

    def _tagged(self, experiment: str) -> list[Run]:
        """Returns the runs of an experiment that a person gave the tag `pick = true`."""
        with self._translated("read"):
            found = self._client.get_experiment_by_name(experiment)
            if found is None:
                return []
            text = f"tags.`{records.PICK_TAG}` ILIKE '%true%'"
            runs = list(self._client.search_runs([found.experiment_id], text, max_results=_PAGE))
        return [run for run in runs if str(run.data.tags[records.PICK_TAG]).strip().lower() == "true"]

    def _create(self, member: Member, tags: dict[str, str], loader: str) -> str:
        files = model_files(member.folder)
        with (
            tempfile.TemporaryDirectory(prefix="autoprune-") as scratch,
            self._translated("register a model in"),
        ):
            texts = flavour_files(member.run_id, loader=loader, input_shape=member.input_shape, outputs=member.outputs)
            for name, text in texts.items():
                (Path(scratch) / name).write_text(text, encoding="utf-8")
            for path in files:
                self._client.log_artifact(member.run_id, str(path), records.MODEL_FOLDER)
            self._client.log_artifacts(member.run_id, scratch, records.MODEL_FOLDER)
            version = self._client.create_model_version(
                self.name,
                source=f"runs:/{member.run_id}/{records.MODEL_FOLDER}",
                run_id=member.run_id,
                tags=tags,
                description=member.description,
            )
        return str(version.version)

    def _find(self) -> Any:
        """Returns the registered model, or `None` where there is none."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _all(self) -> Iterator[ModelVersion]:
        token: str | None = None
        while True:
            page = self._client.search_model_versions(f"name = '{self.name}'", _PAGE, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _translated(self, verb: str) -> contextlib.AbstractContextManager[None]:
        return translated(verb, self._uri)


def model_files(folder: Path) -> list[Path]:
    """Returns the files of a saved model.

    Raises:
        ValueError: `folder` holds no model, or a file that could be a pickle.
    """
    found = sorted(path for path in folder.iterdir() if path.is_file())
    unwelcome = [path.name for path in found if path.suffix.lower() not in records.MODEL_FILES]
    if unwelcome:
        raise ValueError(f"{folder} holds {', '.join(unwelcome)}: models are stored as safetensors and JSON only")
    if not any(path.suffix == ".safetensors" for path in found):
        raise ValueError(f"{folder} holds no .safetensors file")
    return found


def registered_name(search: str) -> str:
    """Returns the name of a search's registered model."""
    return f"autoprune-{search}"
