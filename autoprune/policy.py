"""Policies and the pruning groups that they speak of.

Decides what a policy is, how a ratio becomes an integer width, and how policies are written to disk. Knows nothing of
networks: a group is a name, a size and the widths that it may take.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from autoprune.errors import PolicyError, nearest

SCHEMA = 1
CHANNEL, UNSTRUCTURED, SEMI_STRUCTURED = "channel", "unstructured", "2:4"
"""Ways of pruning: whole channels are removed, or single weights are masked (any, or two of every four)."""
UNITS = {CHANNEL: "channels", UNSTRUCTURED: "weights", SEMI_STRUCTURED: "weights"}
"""Way of pruning → what a group's size counts."""


def caveat(pruning: str) -> str:
    """Returns what must be said beside costs: that those of masks are no latency; empty for channels."""
    if pruning == CHANNEL:
        return ""
    return f"Pruning {pruning}: costs count non-zeros, and give no latency without a sparse kernel."


@dataclass(frozen=True, slots=True)
class Group:
    """A pruning group as the search sees it: `size` channels that may shrink to any of `widths`.

    `widths` ascends and may leave `size` out (where a minimum ratio is asked for); it begins with 0 where the group may
    be removed whole, because the network works without it. `scope` names the part of the
    network whose criterion is chosen together with this group's: `model`, a stage, or the group itself.
    """

    name: str
    size: int
    widths: tuple[int, ...]
    scope: str = "model"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise PolicyError(f"group {self.name!r} has {self.size} channels")
        if not self.widths or any(b <= a for a, b in zip(self.widths, self.widths[1:], strict=False)):
            raise PolicyError(f"group {self.name!r} needs ascending widths, got {self.widths}")
        if self.widths[0] < 0 or self.widths[-1] < 1 or self.widths[-1] > self.size:
            raise PolicyError(f"group {self.name!r} has {self.size} channels, got widths {self.widths}")

    def width(self, ratio: float) -> int:
        """Returns the feasible width that is nearest to keeping `1 - ratio` of the channels."""
        wanted = self.size * (1.0 - ratio)
        return min(self.widths, key=lambda w: (abs(w - wanted), -w))

    def check(self, ratio: float) -> None:
        """Raises a `PolicyError` where `ratio` removes every channel of a group that must keep some."""
        if ratio >= 1.0 and self.widths[0] > 0:
            raise PolicyError(
                f"pruning ratio {ratio!r} would remove group {self.name!r} whole; it keeps at least"
                f" {self.widths[0]} of its {self.size} channels (groups.blocks decides which groups may go)"
            )

    def ratio(self, width: int) -> float:
        """Returns the fraction of channels that `width` removes."""
        return (self.size - width) / self.size


def feasible_widths(size: int, *, min_ratio: float = 0.0, max_ratio: float = 0.9, round_to: int = 1) -> tuple[int, ...]:
    """Returns the widths, ascending, that a group of `size` channels may take.

    A width is a multiple of `round_to` (or `size` itself), at least 1, and removes between `min_ratio` and `max_ratio`
    of the channels. A group in which no multiple lies in that range keeps `size`.
    """
    low = max(1, math.ceil(size * (1.0 - max_ratio) - 1e-9))
    high = math.floor(size * (1.0 - min_ratio) + 1e-9)
    widths = [w for w in range(low, high + 1) if w % round_to == 0 or w == size]
    return tuple(widths) or (size,)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a policy says about one group: which criterion ranks its channels and which fraction of them goes.

    A ratio of 1 removes the group whole, which only a group with the width 0 takes.
    """

    criterion: str
    ratio: float

    def __post_init__(self) -> None:
        if not (isinstance(self.ratio, (int, float)) and 0.0 <= self.ratio <= 1.0):
            raise PolicyError(f"pruning ratio {self.ratio!r} is outside [0, 1]")


@dataclass(frozen=True, slots=True)
class Policy:
    """A complete assignment group → (criterion, ratio), and where activations are searched `<scope>/<kind>` → kind."""

    choices: Mapping[str, Choice]
    activations: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", MappingProxyType(dict(sorted(self.choices.items()))))
        object.__setattr__(self, "activations", MappingProxyType(dict(sorted(self.activations.items()))))

    def __reduce__(self) -> tuple[type[Policy], tuple[dict[str, Choice], dict[str, str]]]:
        return Policy, (dict(self.choices), dict(self.activations))

    def __hash__(self) -> int:
        return hash((tuple(self.choices.items()), tuple(self.activations.items())))

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that are the same for equal policies on every machine."""
        plain: list[Any] = [[name, c.criterion, round(c.ratio, 9)] for name, c in self.choices.items()]
        return digest([plain, dict(self.activations)] if self.activations else plain)

    def widths(self, groups: Iterable[Group]) -> dict[str, int]:
        """Returns the integer width of every group.

        Raises:
            PolicyError: The policy misses a group, names one that does not exist, or removes whole one that must stay.
        """
        known = {group.name: group for group in groups}
        for name in self.choices:
            if name not in known:
                raise PolicyError(f"no pruning group {name!r}{nearest(name, known)}")
        missing = [name for name in known if name not in self.choices]
        if missing:
            raise PolicyError(f"the policy says nothing about {', '.join(missing[:5])}")
        for name, group in known.items():
            group.check(self.choices[name].ratio)
        return {name: group.width(self.choices[name].ratio) for name, group in known.items()}

    def to_json(self) -> dict[str, Any]:
        """Returns the policy as plain JSON values."""
        groups = {name: {"criterion": c.criterion, "ratio": c.ratio} for name, c in self.choices.items()}
        extra = {"activations": dict(self.activations)} if self.activations else {}
        return {"schema": SCHEMA, "groups": groups, **extra}

    @staticmethod
    def from_json(data: Any) -> Policy:
        """Reads what `to_json` wrote.

        Raises:
            PolicyError: The schema is unknown or an entry is malformed.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise PolicyError(f"policy schema {found!r} is unknown; this version reads schema {SCHEMA}")
        try:
            choices = {
                str(name): Choice(str(entry["criterion"]), float(entry["ratio"]))
                for name, entry in data["groups"].items()
            }
            activations = {str(place): str(kind) for place, kind in data.get("activations", {}).items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, PolicyError):
                raise
            raise PolicyError(f"malformed policy: {error!r}") from error
        return Policy(choices, activations)


def uniform_policy(groups: Iterable[Group], ratio: float, criterion: str) -> Policy:
    """Returns the policy that asks for the same `ratio` and `criterion` everywhere, on each group's feasible grid."""
    return Policy({g.name: Choice(criterion, g.ratio(g.width(ratio))) for g in groups})


def digest(value: Any) -> str:
    """Returns twelve hexadecimal digits of the SHA-256 of `value` written as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
