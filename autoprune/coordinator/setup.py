"""What a search was run with, as plain values: kept with its studies and in MLflow, so that both can be read later.

Decides what a reader needs to record a search, to train one of its models further, or to evaluate one again: the space
as run, dense costs, criterion scopes, and what else decides a number (threads, number formats).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import autoprune.search as studies
from autoprune.errors import StudyError
from autoprune.results import Problem
from autoprune.space import Space

SCHEMA = 1


@dataclass(frozen=True)
class Setup:
    """A search's settings.

    `space` is the space file's content with every default filled in. `at_hand` is set where model and data were Python
    objects: then nobody can build them again from the settings. `dense` are the dense network's costs, `scopes` the
    criterion scope of every group. `facts` are further short texts that become tags, such as the fingerprint.
    """

    space: Mapping[str, Any]
    at_hand: bool
    dense: Mapping[str, int]
    scopes: Mapping[str, str]
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def params(self) -> dict[str, Any]:
        """The space as flat MLflow parameters: `recipe.lr`."""
        nested = {f"{k}.{kk}": vv for k, v in self.space.items() if isinstance(v, dict) for kk, vv in v.items()}
        return nested | {k: v for k, v in self.space.items() if not isinstance(v, dict)}

    def to_json(self) -> dict[str, Any]:
        """Returns the setup as plain JSON values."""
        return {"schema": SCHEMA, **asdict(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Setup:
        """Reads what `to_json` wrote.

        Raises:
            StudyError: The schema is unknown.
        """
        if data.get("schema") != SCHEMA:
            raise StudyError(f"settings of schema {data.get('schema')!r}; this version reads schema {SCHEMA}")
        return Setup(data["space"], data["at_hand"], data["dense"], data["scopes"], data["facts"])


def setup_of(space: Space, problem: Problem, *, at_hand: bool, facts: Mapping[str, str]) -> Setup:
    """Returns the setup of a search that is about to run."""
    return Setup(
        space=space.model_dump(mode="json", by_alias=True),
        at_hand=at_hand,
        dense=problem.cost_model.dense(),
        scopes={group.name: group.scope for group in problem.groups},
        facts=dict(facts),
    )


def read_setup(storage: Any, name: str) -> Setup:
    """Returns the settings that a search was last run with.

    Raises:
        StudyError: There is no such search, or it was run by a version that did not keep them.
    """
    for rung in studies.rung_names(storage, name):
        found = studies.read_setup(studies.load_rung(storage, name, rung))
        if found is not None:
            return Setup.from_json(found)
    raise StudyError(f"the search {name!r} keeps no settings (an earlier version ran it): run `autoprune search` again")


def space_of(setup: Setup, *, doing: str) -> Space:
    """Returns the space that a search was run with.

    Raises:
        StudyError: Model and data were Python objects, which nobody can build again.
        SpaceError: This version reads the settings differently.
    """
    if setup.at_hand:
        raise StudyError(
            f"cannot {doing}: model and data of {setup.space['name']!r} were Python objects, not named in a space file"
        )
    return Space.from_mapping(setup.space)
