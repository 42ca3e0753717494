"""Verification: guilty groups are found among innocent ones, and errors are measured over every output."""

import pytest
import torch
from torch import nn

from autoprune.errors import TraceError
from autoprune.network.trace import trace
from autoprune.network.verify import check, halved, on_meta, relative_error

X = torch.zeros(2, 3, 6, 6)


class Chain(nn.Module):
    """Convolutions of width 8; those named in `literal` are checked for it in the forward pass."""

    def __init__(self, depth, literal):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 1) for i in range(depth))
        self.head, self.literal = nn.Conv2d(8, 2, 1), literal

    def forward(self, x):
        for i, conv in enumerate(self.convs):
            x = conv(x).relu()
            if i in self.literal and x.shape[1] != 8:
                raise ValueError("it is 8 wide")
        return self.head(x)


def test_only_the_guilty_groups_are_frozen():
    network = trace(Chain(7, {1, 4}), X)
    assert [g.name for g in network.groups] == [f"convs.{i}" for i in (0, 2, 3, 5, 6)]
    assert set(network.broken) == {"convs.1", "convs.4"}


def test_groups_that_break_only_together_lose_one_of_them():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(16, 2, 1)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            if a.shape[1] < 8 and b.shape[1] < 8:
                raise ValueError("one of them must stay whole")
            return self.head(torch.cat([a, b], 1))

    network = trace(Pair(), X)
    assert [g.name for g in network.groups] == ["a"]
    assert network.broken == {"b": "the pruned network does not run: ValueError: one of them must stay whole"}


def test_a_sound_network_passes_and_a_broken_one_is_told_why():
    network = trace(Chain(3, {1}), X, verify=False)
    assert check(network, ["convs.0", "convs.2"], on_meta(network)) is None
    fault = check(network, ["convs.1"], on_meta(network))
    assert fault == "the pruned network does not run: ValueError: it is 8 wide"


def test_about_half_of_each_named_group_is_picked_and_never_the_same_fraction():
    network = trace(nn.Sequential(nn.Conv2d(3, 9, 1), nn.Conv2d(9, 2, 1), nn.Conv2d(2, 4, 1)), X)
    assert {name: len(kept) for name, kept in halved(network, ["0"]).items()} == {"0": 4}
    selection = halved(network, ["0", "1"])
    assert {name: len(kept) for name, kept in selection.items()} in ({"0": 3, "1": 1}, {"0": 6, "1": 1})
    assert all((kept[1:] > kept[:-1]).all() for kept in selection.values())


def test_widths_that_would_be_right_by_accident_at_one_half_are_found():
    class Taken(nn.Module):
        """The width of the second layer is taken for the first one's: right as long as both lose the same fraction."""

        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            a = self.a(self.stem(x))
            b = self.b(a)
            if a.shape[-1] != b.shape[-1]:
                raise ValueError("widths differ")
            return self.head(b)

    network = trace(Taken(), torch.zeros(2, 6))
    assert [g.name for g in network.groups] == ["stem"]
    assert "widths differ" in network.broken["a"]


def test_a_fault_shows_even_when_the_example_is_zero_and_the_network_has_no_bias():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8, bias=False), nn.Linear(8, 3, bias=False)

        def forward(self, x):
            y = self.a(x)
            return self.b(y) * y.shape[1]

    with pytest.raises(TraceError, match="differs from its masked twin"):
        trace(Scaled(), torch.zeros(2, 4))


def test_errors_are_relative_to_the_largest_expected_value_of_each_output():
    a, b = torch.tensor([1.0, -10.0]), torch.tensor([100.0])
    assert relative_error((a, {"b": b}), (a, {"b": b})) == 0.0
    assert relative_error((a + 1, {"b": b}), (a, {"b": b})) == pytest.approx(0.1)
    assert relative_error((a, {"b": b + 30}), (a, {"b": b})) == pytest.approx(0.3)


def test_outputs_of_another_shape_are_infinitely_wrong():
    assert relative_error(torch.zeros(2), torch.zeros(3)) == float("inf")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_taken_for_equal_unless_both_are(bad):
    one, other = torch.tensor([bad, 1.0]), torch.tensor([1.0, 1.0])
    assert relative_error(one, other) == float("inf")
    assert relative_error(other, one) == float("inf")
    assert relative_error(one, one) == 0.0
