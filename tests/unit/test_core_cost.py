"""The cost model against numbers worked out by hand, and its direction."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.cost import COSTS, MACS, MEMORY, PARAMS, SIZE, CostModel, Form, Term

A, B = Form(terms=((0, 1),)), Form(terms=((1, 1),))

# conv1 3x3: 3 -> a=16 at 8x8; batch norm; conv2 3x3: a -> b=32 at 4x4; flatten (b*4 + 2 constants) -> linear 10, bias.
NET = CostModel(
    groups=("a", "b"),
    sizes=(16, 32),
    macs=(Term(9 * 3 * 64, (A,)), Term(9 * 16, (A, B)), Term(10, (Form(2, ((1, 4),)),))),
    params=(Term(9 * 3, (A,)), Term(2, (A,)), Term(9, (A, B)), Term(10, (Form(2, ((1, 4),)),)), Term(10)),
    size_bytes=(Term(4 * 27, (A,)), Term(8)),
    live=((Term(3 * 64 * 4), Term(64 * 4, (A,))), (Term(64 * 4, (A,)), Term(16 * 4, (B,)))),
)


def test_dense_costs_equal_the_hand_computed_numbers() -> None:
    assert NET.dense() == {
        MACS: 1728 * 16 + 144 * 16 * 32 + 10 * (4 * 32 + 2),  # 102,676
        PARAMS: 27 * 16 + 2 * 16 + 9 * 16 * 32 + 10 * (4 * 32 + 2) + 10,  # 6,382
        SIZE: 108 * 16 + 8,
        MEMORY: max(768 + 256 * 16, 256 * 16 + 64 * 32),
    }
    assert NET.dense()[MACS] == 102_676
    assert NET.dense()[PARAMS] == 6_382


def test_pruned_costs_equal_the_hand_computed_numbers() -> None:
    assert NET.costs({"a": 4, "b": 8}) == {
        MACS: 1728 * 4 + 144 * 4 * 8 + 10 * 34,
        PARAMS: 27 * 4 + 2 * 4 + 9 * 4 * 8 + 10 * 34 + 10,
        SIZE: 108 * 4 + 8,
        MEMORY: max(768 + 256 * 4, 256 * 4 + 64 * 8),
    }
    assert NET.cost(MACS, {"b": 8}) == 1728 * 16 + 144 * 16 * 8 + 10 * 34


def test_an_unknown_cost_is_refused_and_no_tensor_means_no_memory() -> None:
    with pytest.raises(KeyError, match="flops"):
        NET.cost("flops", {})
    assert CostModel((), (), (), (), ()).dense() == dict.fromkeys(COSTS, 0)


@given(st.integers(1, 16), st.integers(1, 32), st.integers(0, 16), st.integers(0, 32))
def test_a_wider_network_never_costs_less(a: int, b: int, more_a: int, more_b: int) -> None:
    narrow = NET.costs({"a": a, "b": b})
    wide = NET.costs({"a": min(16, a + more_a), "b": min(32, b + more_b)})
    assert all(wide[name] >= narrow[name] for name in COSTS)
    assert {name: NET.cost(name, {"a": a, "b": b}) for name in COSTS} == narrow
