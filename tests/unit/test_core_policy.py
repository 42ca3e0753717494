"""Policies: feasible widths, identity, and the way to JSON and back."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.errors import PolicyError
from autoprune.policy import Choice, Group, Policy, digest, feasible_widths, uniform_policy

ratios = st.floats(0.0, 1.0)
policies = st.dictionaries(
    st.text(min_size=1, max_size=12), st.builds(Choice, st.sampled_from(["l1", "obs"]), ratios)
).map(Policy)


@st.composite
def widths_asked_for(draw: st.DrawFn) -> tuple[int, float, float, int]:
    low, high = sorted([draw(st.floats(0, 0.99)), draw(st.floats(0, 0.99))])
    return draw(st.integers(1, 600)), low, high, draw(st.integers(1, 40))


@given(widths_asked_for())
def test_feasible_widths_ascend_within_the_asked_range(asked: tuple[int, float, float, int]) -> None:
    size, low, high, step = asked
    widths = feasible_widths(size, min_ratio=low, max_ratio=high, round_to=step)
    assert widths
    assert list(widths) == sorted(set(widths))
    assert 1 <= widths[0] <= widths[-1] <= size
    if widths != (size,):
        assert all(w % step == 0 or w == size for w in widths)
        assert all(low - 1e-6 <= (size - w) / size <= high + 1e-6 for w in widths)


def test_feasible_widths_by_hand() -> None:
    assert feasible_widths(16, max_ratio=0.5, round_to=4) == (8, 12, 16)
    assert feasible_widths(16, min_ratio=0.25, max_ratio=0.5, round_to=4) == (8, 12)
    assert feasible_widths(10, max_ratio=0.9, round_to=8) == (8, 10)
    assert feasible_widths(4, min_ratio=0.3, max_ratio=0.4, round_to=8) == (4,)
    assert feasible_widths(1) == (1,)


@given(st.integers(1, 300), ratios)
def test_a_group_takes_the_feasible_width_nearest_to_a_ratio(size: int, ratio: float) -> None:
    group = Group("g", size, feasible_widths(size, max_ratio=0.95))
    width = group.width(ratio)
    assert abs(width - size * (1 - ratio)) == min(abs(w - size * (1 - ratio)) for w in group.widths)
    assert group.width(group.ratio(width)) == width


@given(policies)
def test_a_policy_survives_json(policy: Policy) -> None:
    copy = Policy.from_json(json.loads(json.dumps(policy.to_json())))
    assert copy == policy
    assert copy.id == policy.id
    assert hash(copy) == hash(policy)


@given(policies)
def test_a_policy_survives_pickling(policy: Policy) -> None:
    assert pickle.loads(pickle.dumps(policy)) == policy


def test_the_order_of_groups_does_not_matter_and_what_they_get_does() -> None:
    a, b = Choice("l1", 0.5), Choice("l2", 0.25)
    assert Policy({"x": a, "y": b}).id == Policy({"y": b, "x": a}).id
    assert Policy({"x": a, "y": b}).id != Policy({"x": b, "y": a}).id
    assert len(Policy({}).id) == 12


def test_a_policy_is_not_changed_by_what_it_was_made_from() -> None:
    choices = {"x": Choice("l1", 0.5)}
    policy = Policy(choices)
    choices.clear()
    assert list(policy.choices) == ["x"]
    with pytest.raises(TypeError, match="does not support item assignment"):
        policy.choices["x"] = Choice("l1", 0.1)  # type: ignore[index]


@pytest.mark.parametrize("ratio", [1.0000001, -0.1, 1.5, float("nan"), float("inf"), "0.5", None])
def test_a_ratio_outside_its_range_is_refused(ratio: object) -> None:
    with pytest.raises(PolicyError, match="outside"):
        Choice("l1", ratio)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "NoneType"),
        ({}, "schema None"),
        ({"schema": 2}, "schema 2"),
        ({"schema": 1}, "malformed"),
        ({"schema": 1, "groups": []}, "malformed"),
        ({"schema": 1, "groups": {"a": {"criterion": "l1"}}}, "malformed"),
        ({"schema": 1, "groups": {"a": {"criterion": "l1", "ratio": "half"}}}, "malformed"),
        ({"schema": 1, "groups": {"a": {"criterion": "l1", "ratio": 2}}}, "outside"),
    ],
)
def test_a_malformed_policy_is_refused(data: object, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        Policy.from_json(data)


def test_a_policy_must_speak_of_exactly_the_groups_there_are() -> None:
    groups = [Group("conv1", 8, (4, 8)), Group("conv2", 4, (1, 2, 4))]
    assert uniform_policy(groups, 0.5, "l1").widths(groups) == {"conv1": 4, "conv2": 2}
    with pytest.raises(PolicyError, match="no pruning group 'conv3'; did you mean 'conv"):
        Policy({"conv3": Choice("l1", 0.5)}).widths(groups)
    with pytest.raises(PolicyError, match="says nothing about conv2"):
        Policy({"conv1": Choice("l1", 0.5)}).widths(groups)


@pytest.mark.parametrize(("size", "widths"), [(0, (1,)), (4, ()), (4, (2, 2)), (4, (3, 2)), (4, (-1, 2)), (4, (2, 5))])
def test_a_group_with_impossible_widths_is_refused(size: int, widths: tuple[int, ...]) -> None:
    with pytest.raises(PolicyError, match="'g'"):
        Group("g", size, widths)


def test_the_digest_of_a_value_is_the_same_on_every_machine() -> None:
    assert digest({"b": 1, "a": [0.5, None, "ü"]}) == digest({"a": [0.5, None, "ü"], "b": 1})
    assert digest([]) == "4f53cda18c2b"


def test_a_group_is_removed_whole_only_where_zero_is_among_its_widths() -> None:
    stays, goes = Group("g", 16, (2, 8, 16)), Group("g", 16, (0, 2, 8, 16))
    policy = Policy({"g": Choice("l1", 1.0)})
    assert policy.widths([goes]) == {"g": 0}
    assert goes.ratio(0) == 1.0
    with pytest.raises(PolicyError, match=r"would remove group 'g' whole; it keeps at least 2 of its 16"):
        policy.widths([stays])


@pytest.mark.parametrize("widths", [(0,), (-1, 4), (0, 17)])
def test_widths_that_no_group_has_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(PolicyError):
        Group("g", 16, widths)


def test_a_policy_without_activations_is_written_and_named_as_it_always_was() -> None:
    policy = Policy({"a": Choice("l1", 0.5), "b": Choice("obs", 0.25)})
    assert policy.to_json().keys() == {"schema", "groups"}
    assert policy.id == digest([["a", "l1", 0.5], ["b", "obs", 0.25]])


def test_the_example_with_blocks_and_activations_can_be_read() -> None:
    data = json.loads((Path(__file__).parents[1] / "assets/policy_schema1_blocks_activations.json").read_text())
    policy = Policy.from_json(data)
    assert policy.activations == {"stage1/relu": "relu6", "stage2/relu": "relu"}
    assert policy.choices["layer1.0.conv1"].ratio == 1.0
    assert policy.to_json() == data
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert Policy(policy.choices).id != policy.id


def test_malformed_activations_are_refused() -> None:
    with pytest.raises(PolicyError, match="malformed"):
        Policy.from_json({"schema": 1, "groups": {}, "activations": ["relu"]})
