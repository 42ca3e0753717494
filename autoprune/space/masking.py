"""What a space may not ask for where single weights are masked, and why.

Decides which criteria and settings have no meaning for masks. Must not know how masks are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from autoprune.policy import CHANNEL, SEMI_STRUCTURED, UNSTRUCTURED
from autoprune.space.criteria import NAMED_CRITERIA, of_weights
from autoprune.space.section import Found, number

Pruning = Literal["channel", "unstructured", "2:4"]
assert get_args(Pruning) == (CHANNEL, UNSTRUCTURED, SEMI_STRUCTURED)

DEFAULT_STEP = 0.05
"""Of the ratio grid of unstructured masks."""

_OWN = "it scores whole channels, which says nothing about single weights"
_INSTEAD = f"choose among {', '.join(of_weights())}"


def pruning_faults(raw: Mapping[str, Any]) -> Iterator[Found]:
    """Yields (place, message) for settings that do not go together with `pruning`; `raw` may hold invalid values."""
    pruning = raw.get("pruning", CHANNEL)
    groups = raw.get("groups")
    groups = groups if isinstance(groups, Mapping) else {}
    if groups.get("step", DEFAULT_STEP) != DEFAULT_STEP and pruning in (CHANNEL, SEMI_STRUCTURED):
        yield ("groups", "step"), f"is the grid of unstructured masks; with `pruning: {pruning}` leave it out"
    if pruning not in (UNSTRUCTURED, SEMI_STRUCTURED):
        return
    if groups.get("round_to", 1) != 1:
        yield ("groups", "round_to"), f"counts channels; leave it out with `pruning: {pruning}`"
    if groups.get("blocks", False) is True:
        text = f"removes all channels of a group; a mask keeps every layer: leave it out with `pruning: {pruning}`"
        yield ("groups", "blocks"), text
    yield from _recipe_faults(raw, pruning)
    if pruning == SEMI_STRUCTURED:
        low, high = number(groups.get("min_ratio", 0.0)), number(groups.get("max_ratio", 0.9))
        if low is not None and low > 0.5:
            yield ("groups", "min_ratio"), f"2:4 removes half of the weights of a layer, never {low}"
        if high is not None and high < 0.5:
            yield ("groups", "max_ratio"), f"2:4 removes half of the weights of a layer; {high} allows nothing"
    yield from _criteria_faults(raw, pruning)


def _recipe_faults(raw: Mapping[str, Any], pruning: str) -> Iterator[Found]:
    recipe = raw.get("recipe")
    recipe = recipe if isinstance(recipe, Mapping) else {}
    if recipe.get("compensation") == "merge":
        text = f"merge folds whole channels into others; take true or false with `pruning: {pruning}`"
        yield ("recipe", "compensation"), text
    if recipe.get("schedule") not in (None, "one_shot"):
        text = f"cuts channels in steps, and masks are set once; leave it out with `pruning: {pruning}`"
        yield ("recipe", "schedule"), text
    if recipe.get("regularisation") is not None:
        text = f"makes whole channels small; leave it out with `pruning: {pruning}`"
        yield ("recipe", "regularisation"), text


def _criteria_faults(raw: Mapping[str, Any], pruning: str) -> Iterator[Found]:
    criteria = raw.get("criteria")
    choices = criteria.get("choices") if isinstance(criteria, Mapping) else None
    if not isinstance(choices, (list, tuple)):
        return
    for i, choice in enumerate(choices):
        known = NAMED_CRITERIA.get(choice) if isinstance(choice, str) else None
        if known is not None and known.not_weights is not None:
            yield ("criteria", "choices", i), f"{choice} {known.not_weights} (pruning: {pruning}); {_INSTEAD}"
        if isinstance(choice, str) and ":" in choice:
            yield ("criteria", "choices", i), f"{_OWN} (pruning: {pruning}); {_INSTEAD}"
        if choice in ("l1", "l2") and {"l1", "l2"} & set(filter(_is_text, choices[:i])) - {choice}:
            yield ("criteria", "choices", i), "l1 and l2 rank single weights alike; keep one of them"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
