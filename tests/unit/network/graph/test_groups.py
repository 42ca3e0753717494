"""Groups, index map and cost model as they come out of solved labels."""

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.network.graph.groups import module_of
from autoprune.network.tracing.trace import trace

X = torch.zeros(2, 3, 8, 8)


class Shuffling(nn.Module):
    """Two layers whose sum ties every channel to every other one: one of them shuffles."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.a(x)
        return self.c(self.b(x + x.flip(1) + x.view(2, 2, 3, 8, 8).transpose(1, 2).reshape(2, 6, 8, 8)))


def test_units_number_the_channels_of_all_groups_without_gaps():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 2, 1))
    network = trace(model, X)
    assert [list(g.units) for g in network.groups] == [list(range(8)), list(range(8, 14))]
    assert network.index_map["2.weight"][0].tolist() == list(range(8, 14))
    assert network.index_map["2.weight"][1].tolist() == list(range(8))
    assert "3.bias" not in network.index_map


def test_layers_of_the_same_width_that_are_not_joined_are_groups_of_their_own():
    network = trace(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)), X[:, 0, :, :4]
    )
    assert [(g.name, g.consumers) for g in network.groups] == [("0", ("2",)), ("2", ("4",))]


def test_outputs_with_different_places_are_groups_of_their_own_with_numbered_names():
    """Half of the channels go through a second path: they cost more, so they are another kind of channel."""

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.c(torch.cat([self.a(x), torch.relu(self.a(x))], 1) + self.b(x))

    network = trace(Split(), X)
    assert sum(g.size for g in network.groups if "b" in g.producers) == 4
    assert network.index_map["b.weight"][0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_channels_that_are_all_tied_together_are_frozen_and_the_reason_says_so():
    network = trace(Shuffling(), X)
    assert [g.name for g in network.groups] == ["b"]
    (frozen,) = [f for f in network.frozen if f.name == "a"]
    assert frozen.reason == "6 of its channels are tied together and could only go all at once"


def test_a_layer_with_a_single_channel_says_so():
    network = trace(nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 6, 1), nn.Conv2d(6, 2, 1)), X)
    assert [g.name for g in network.groups] == ["1"]
    assert next(f.reason for f in network.frozen if f.name == "0") == "a single channel"


def test_the_cost_of_a_convolution_is_the_product_of_its_kept_ends():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 2, 1))
    cost = trace(model, X).cost_model
    for a, b in [(8, 6), (3, 6), (1, 2)]:
        widths = {"0": a, "2": b}
        assert cost.cost("macs", widths) == 64 * (9 * 3 * a + 9 * a * b + b * 2)
        assert cost.cost("params", widths) == (27 + 1) * a + (9 * a + 1) * b + (b + 1) * 2
        assert cost.cost("size_bytes", widths) == 4 * cost.cost("params", widths)


def test_batch_norm_statistics_count_as_bytes_but_not_as_parameters():
    cost = trace(nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)), X).cost_model
    assert cost.cost("params", {"0": 5}) == 3 * 5 + 2 * 5 + 5 * 2 + 2
    assert cost.cost("size_bytes", {"0": 5}) == 4 * (cost.cost("params", {"0": 5}) + 2 * 5) + 8


@pytest.mark.parametrize("name", ["macs", "params", "size_bytes"])
def test_a_groups_share_changes_as_the_whole_does(name):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 2, 1))
    cost = trace(model, X).cost_model
    for group in ("0", "2"):
        share = cost.share(name, group)
        before, after = {"0": 7, "2": 5}, {"0": 7, "2": 5, group: 3}
        assert share.cost(name, after) - share.cost(name, before) == cost.cost(name, after) - cost.cost(name, before)


def test_half_precision_parameters_count_two_bytes():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)).to(torch.bfloat16)
    cost = trace(model, torch.zeros(2, 8, dtype=torch.bfloat16)).cost_model
    assert cost.dense()["size_bytes"] == 2 * cost.dense()["params"]


def test_the_module_of_a_parameter_is_its_path_without_the_last_name():
    assert module_of("layer1.0.conv1.weight") == "layer1.0.conv1"
    assert module_of("weight") == "weight"


def test_the_same_model_gives_the_same_groups_every_time():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 2, 1))
    first, second = trace(model, X), trace(model, X)
    assert first.groups == second.groups
    assert first.cost_model == second.cost_model
    assert all(
        np.array_equal(first.index_map[n][d], u) for n, dims in second.index_map.items() for d, u in dims.items()
    )
