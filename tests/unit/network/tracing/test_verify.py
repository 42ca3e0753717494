"""Verification: guilty groups are found among innocent ones, and errors are measured over every output."""

import pytest
import torch
from torch import nn

from autoprune.errors import TraceError
from autoprune.network.surgery.twin import relative_error
from autoprune.network.tracing import verify
from autoprune.network.tracing.trace import trace
from autoprune.network.tracing.verify import Shapes, check, halved

X = torch.zeros(2, 3, 6, 6)


@pytest.fixture
def runs(monkeypatch):
    """How many samples each real pass had, in their order."""
    found, run = [], verify._run
    monkeypatch.setattr(verify, "_run", lambda model, inputs: found.append(len(inputs[0])) or run(model, inputs))
    return found


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
    assert check(network, ["convs.0", "convs.2"], Shapes(network)) is None
    fault = check(network, ["convs.1"], Shapes(network))
    assert fault == "the pruned network does not run: ValueError: it is 8 wide"


class Scaled(nn.Module):
    """Without biases, and scaled by a width: zeros hide that pruning changes it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8, bias=False), nn.Linear(8, 3, bias=False)

    def forward(self, x):
        y = self.a(x)
        return self.b(y) * y.shape[1]


class Normed(nn.Module):
    """A residual stream under a LayerNorm, of which `code` can rely on the widths or the batch."""

    def __init__(self, code=lambda stream, hidden: None):
        super().__init__()
        self.stem, self.norm = nn.Linear(4, 12), nn.LayerNorm(12)
        self.up, self.down, self.head = nn.Linear(12, 10), nn.Linear(10, 12), nn.Linear(12, 3)
        self.code = code

    def forward(self, x):
        stream = self.stem(x)
        hidden = self.up(self.norm(stream)).relu()
        self.code(stream, hidden)
        return self.head(stream + self.down(hidden))


def demands(what):
    def code(stream, hidden):
        if not what(stream, hidden):
            raise ValueError("it is 12 and 10 wide, and two of them")

    return code


@pytest.mark.parametrize(("large", "passes"), [(0, [1, 1]), (verify.LARGE, [2, 2, 2])])
def test_groups_under_a_norm_are_tried_with_the_others_where_the_network_is_large(large, passes, runs, monkeypatch):
    monkeypatch.setattr(verify, "LARGE", large)
    network = trace(Normed(), torch.zeros(2, 4))
    assert [(g.name, bool(g.approximate)) for g in network.groups] == [("stem", True), ("up", False)]
    assert runs == passes


@pytest.mark.parametrize(
    ("what", "left"),
    [
        (lambda stream, hidden: stream.shape[-1] == 12, "up"),
        (lambda stream, hidden: hidden.shape[-1] == 10, "stem"),
        (lambda stream, hidden: stream.shape[-1] == 12 or hidden.shape[-1] == 10, "stem"),
        (lambda stream, hidden: hidden.shape[-1] > 8 or stream.shape[-1] < 12, "stem"),
    ],
    ids=["the stream", "the hidden width", "both together", "the hidden width beside the whole stream"],
)
@pytest.mark.parametrize("large", [0, verify.LARGE])
def test_a_guilty_group_is_found_under_a_norm_or_beside_it(what, left, large, monkeypatch):
    monkeypatch.setattr(verify, "LARGE", large)
    network = trace(Normed(demands(what)), torch.zeros(2, 4))
    assert [g.name for g in network.groups] == [left]
    assert "it is 12 and 10 wide" in next(iter(network.broken.values()))


def test_a_large_network_runs_on_one_sample_and_on_all_where_it_needs_them(runs, monkeypatch):
    monkeypatch.setattr(verify, "LARGE", 0)
    assert len(trace(Chain(2, ()), X).groups) == 2
    assert runs == [1, 1]
    runs.clear()
    network = trace(Normed(demands(lambda stream, hidden: len(stream) == 2)), torch.zeros(2, 4))
    assert not network.broken
    assert runs == [1, 2, 2]


@pytest.mark.parametrize("example", [torch.zeros(2, 4), torch.tensor([[0.0] * 4, [1.0] * 4])])
def test_a_large_network_that_differs_from_its_twin_is_found_on_one_sample(example, monkeypatch):
    monkeypatch.setattr(verify, "LARGE", 0)

    with pytest.raises(TraceError, match="differs from its masked twin"):
        trace(Scaled(), example)


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


@pytest.mark.parametrize("large", [0, verify.LARGE])
def test_a_model_that_writes_its_own_weights_stays_as_it_was(large, monkeypatch):
    monkeypatch.setattr(verify, "LARGE", large)

    class Clamped(nn.Linear):
        def forward(self, x):
            if not torch.compiler.is_compiling():
                self.weight.data.clamp_(-0.1, 0.1)
            return super().forward(x)

    model = Normed()
    model.up = Clamped(12, 10)
    before = model.up.weight.detach().clone()
    assert trace(model, torch.zeros(2, 4)).groups
    assert torch.equal(model.up.weight, before)


class Looking(nn.Module):
    """Looks at numbers, as code does that asks whether a mask masks anything."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.a(x).relu()
        if not torch.compiler.is_exporting() and float(y.sum()) == 12.0:
            y = y * 2
        return self.b(y)


def test_a_network_that_looks_at_numbers_is_counted_while_it_runs():
    network = trace(Looking(), torch.randn(2, 6))
    assert [group.name for group in network.groups] == ["a"]
    assert not Shapes(network).tell
    assert network.cost_model.dense()["macs"] == 6 * 8 + 8 * 3


def test_of_a_network_that_looks_at_numbers_a_broken_group_is_frozen_all_the_same():
    class Wide(Looking):
        def forward(self, x):
            if self.a(x).shape[-1] != 8:
                raise ValueError("it is 8 wide")
            return super().forward(x)

    with pytest.raises(TraceError, match="ValueError: it is 8 wide"):
        trace(Wide(), torch.randn(2, 6))


def test_of_a_network_that_looks_at_numbers_a_wrong_price_is_found(monkeypatch):
    network = trace(Looking(), torch.randn(2, 6), verify=False)
    monkeypatch.setattr(verify, "macs_counted", lambda counter, inputs: 1)
    assert "its MACs cannot be predicted (counted 1" in check(network, ["a"], Shapes(network))
