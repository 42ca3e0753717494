"""An operator is added through the table alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import TraceError
from autoprune.network.graph.labels import Value
from autoprune.network.graph.recorder import Tape
from autoprune.network.graph.rules.elementwise import same
from autoprune.network.graph.rules.table import OPERATORS, SIZED_FUNCTIONS, Operator, Sizing, operator_of
from autoprune.network.pruning import prune
from autoprune.network.tracing.trace import trace

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


@torch.library.custom_op("autoprune_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("autoprune_tests::mirrored", mutates_args=())
def mirrored(x: Tensor) -> Tensor:
    """`(B, C) -> (B, 2 * C)`: every channel, and behind them the negative of every channel."""
    return torch.cat([x, -x], dim=1)


@mirrored.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], 2 * x.shape[1])


def double(x: Tensor) -> Tensor:
    """A plain function, which can be copied with a model."""
    return doubled(x)


def mirrors(x: Tensor) -> Tensor:
    return mirrored(x)


def mirror(tape: Tape, x: Value) -> Value:
    """`(B, C) -> (B, 2 * C)`: channel c lies at c and at C + c."""
    labels = x.dims[1]
    return Value(tape.shape, (x.dims[0], None if labels is None else np.tile(labels, 2)))


class Toy(nn.Module):
    """Two linear layers with one of the toy operators between them."""

    def __init__(self, between: Any, width: int):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.between = nn.Linear(5, 8), nn.Linear(width, 2), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))  # type: ignore[no-any-return]


TOYS = [(double, "doubled", same, 8), (mirrors, "mirrored", mirror, 16)]


@pytest.mark.parametrize(("operator", "name", "rule", "width"), TOYS)
def test_an_operator_without_a_row_freezes_what_it_reads(operator: Any, name: str, rule: Any, width: int) -> None:
    with pytest.raises(TraceError, match=f"no rule for the operator autoprune_tests.{name}"):
        trace(Toy(operator, width).eval(), X)


@pytest.mark.parametrize(("operator", "name", "rule", "width"), TOYS)
def test_an_operator_with_a_row_lets_channels_go(
    monkeypatch: pytest.MonkeyPatch, operator: Any, name: str, rule: Any, width: int
) -> None:
    monkeypatch.setitem(OPERATORS, name, Operator(rule))
    model = Toy(operator, width).eval()
    network = trace(model, X)
    assert [(group.name, group.size) for group in network.groups] == [("first", 8)]
    small: Any = prune(network, 0.5)
    kept = model.first.weight.norm(dim=1).topk(4).indices.sort().values
    places = torch.cat([kept + 8 * k for k in range(width // 8)])
    assert torch.equal(small.last.weight, model.last.weight[:, places])
    with torch.no_grad():
        masked = torch.zeros(8)
        masked[kept] = 1.0
        expected = model.last(operator(model.first(X) * masked))
        torch.testing.assert_close(small(X), expected)


def test_an_operator_that_is_said_to_be_a_view_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = []
    for row in (Operator(same), Operator(same, alias=True, moves=True)):
        monkeypatch.setitem(OPERATORS, "doubled", row)
        memory.append(trace(Toy(double, 8).eval(), X).cost_model.dense()["activation_bytes"])
    assert memory == [4 * (8 + 8), 4 * (5 + 8)]  # while it runs; while the first layer runs


def test_flags_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="say moves=True"):
        Operator(same, alias=True)


def test_what_is_not_in_the_table_is_neither_a_view_nor_given_sizes() -> None:
    assert operator_of(torch.ops.aten.bincount.default) == Operator()


def test_functions_that_are_given_sizes_are_those_of_the_operators() -> None:
    assert SIZED_FUNCTIONS["split"].sizing is Sizing.PARTS  # a list of sizes, which ATen calls by another name
    assert "_unsafe_view" not in SIZED_FUNCTIONS
    assert all(known.sizing is not None and known.sizes is not None for known in SIZED_FUNCTIONS.values())
