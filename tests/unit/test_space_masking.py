"""What a space file may ask for together with masks, and what it is told otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoprune.errors import SpaceError
from autoprune.space import load_space, parse_space

GOOD = """
schema: 1
name: masked
model: {name: resnet20}
data: {name: digits}
"""


def test_pruning_is_by_channel_where_nothing_is_said_and_2_to_4_needs_no_quotes() -> None:
    assert parse_space(GOOD, env={}).pruning == "channel"
    assert parse_space(GOOD + "pruning: 2:4\n", env={}).pruning == "2:4"
    assert parse_space(GOOD + "pruning: unstructured\ngroups: {step: 0.02}\n", env={}).groups.step == 0.02


@pytest.mark.parametrize(
    ("settings", "place", "reason"),
    [
        ("pruning: unstructurd", "pruning", "unstructured"),
        ("pruning: 4", "pruning", "channel, unstructured, 2:4"),
        ("pruning: unstructured\ncriteria: {choices: [l2, fpgm]}", "criteria.choices[1]", "whole filters"),
        ("pruning: 2:4\ncriteria: {choices: [bn_scale]}", "criteria.choices[0]", "batch norm"),
        ("pruning: unstructured\ncriteria: {choices: [l1, obs, l2]}", "criteria.choices[2]", "alike"),
        ("pruning: unstructured\ncriteria: {choices: [l2, hessian]}", "criteria.choices[1]", "what taylor is"),
        ("pruning: unstructured\ncriteria: {choices: [obs_greedy]}", "criteria.choices[0]", "take obs"),
        ("pruning: unstructured\ncriteria: {choices: [hrank]}", "criteria.choices[0]", "feature map"),
        ("pruning: 2:4\ncriteria: {choices: [mine.scores:norms]}", "criteria.choices[0]", "whole channels"),
        ("pruning: unstructured\ngroups: {blocks: true}", "groups.blocks", "keeps every layer"),
        ("pruning: 2:4\nrecipe: {schedule: {kind: iterative}}", "recipe.schedule", "set once"),
        ("pruning: unstructured\nrecipe: {schedule: iterative}", "recipe.schedule", "set once"),
        ("pruning: unstructured\nrecipe: {regularisation: {kind: bn_l1}}", "recipe.regularisation", "whole channels"),
        ("pruning: unstructured\nrecipe: {compensation: merge}", "recipe.compensation", "whole channels"),
        ("pruning: unstructured\ngroups: {round_to: 8}", "groups.round_to", "counts channels"),
        ("groups: {step: 0.1}", "groups.step", "unstructured masks"),
        ("pruning: 2:4\ngroups: {step: 0.1}", "groups.step", "unstructured masks"),
        ("pruning: unstructured\ngroups: {step: 0}", "groups.step", "above 0"),
        ("pruning: 2:4\ngroups: {max_ratio: 0.4}", "groups.max_ratio", "allows nothing"),
        ("pruning: 2:4\ngroups: {min_ratio: 0.6}", "groups.min_ratio", "half of the weights"),
    ],
)
def test_what_masks_cannot_do_is_a_fault_with_its_place_and_reason(settings: str, place: str, reason: str) -> None:
    with pytest.raises(SpaceError) as caught:
        parse_space(GOOD + settings + "\n", env={})
    faults = {fault.place: fault.message for fault in caught.value.faults}
    assert place in faults
    assert reason in faults[place]


def test_the_way_of_pruning_decides_results_and_leaves_the_fingerprints_of_channel_searches_as_they_were() -> None:
    base = parse_space(GOOD, env={})
    assert "pruning" not in base.fingerprint_sections()
    prints = {parse_space(GOOD, overrides=[f"pruning={way}"], env={}).fingerprint for way in ("unstructured", "2:4")}
    assert len(prints | {base.fingerprint}) == 3
    finer = parse_space(GOOD, overrides=["pruning=unstructured", "groups.step=0.02"], env={})
    assert finer.fingerprint not in prints


@pytest.mark.parametrize("name", ["digits_unstructured", "digits_2to4", "cifar10_resnet20_unstructured"])
def test_the_shipped_spaces_with_masks_say_so(name: str) -> None:
    space = load_space(Path(__file__).parents[2] / "search_spaces" / f"{name}.yaml", env={})
    assert space.pruning == ("2:4" if name == "digits_2to4" else "unstructured")
