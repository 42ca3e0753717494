"""What a search was run with, as plain values: kept with its studies and in MLflow, so that both can be read later.

Decides what a reader needs to record a search, to train one of its models further, or to evaluate one again: the space
as run, dense costs, criterion scopes, and what else decides a number (threads, number formats).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autoprune.errors import StudyError
from autoprune.results import Problem
from autoprune.space import Space
from autoprune.space.code import check_mapping
from autoprune.space.file import write_document


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

    @property
    def text(self) -> str:
        """The space as the text of a space file."""
        return write_document(self.space)


def setup_of(space: Space, problem: Problem, *, at_hand: bool, facts: Mapping[str, str]) -> Setup:
    """Returns the setup of a search that is about to run."""
    return Setup(
        space=space.model_dump(mode="json", by_alias=True),
        at_hand=at_hand,
        dense=problem.cost_model.dense(),
        scopes={group.name: group.scope for group in problem.groups},
        facts=dict(facts),
    )


def space_of(setup: Setup, *, doing: str, allow_code: bool = False) -> Space:
    """Returns the space that a search was run with.

    Raises:
        StudyError: Model and data were Python objects, which nobody can build again.
        SpaceError: This version reads the settings differently.
        InputError: They name code that is not of the working directory, and `allow_code` is not set.
    """
    if setup.at_hand:
        raise StudyError(
            f"cannot {doing}: model and data of {setup.space['name']!r} were Python objects, not named in a space file"
        )
    check_mapping(setup.space, allow=allow_code, source="the search's settings")
    return Space.from_mapping(setup.space)
