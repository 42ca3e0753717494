"""Surgery: the smaller network, its masked twin, and the properties that hold for any small network."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from autoprune.cost import COSTS
from autoprune.errors import PolicyError
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.selection import kept_indices, unit_mask
from autoprune.network.surgery.twin import masked_twin
from autoprune.network.tracing.trace import trace

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


@pytest.fixture
def network():
    return trace(cnn(), X)


def test_the_kept_channels_carry_the_dense_weights(network):
    kept = np.array([1, 4, 5])
    small = cut(network, {"0": kept})
    dense = network.model
    assert torch.equal(small[0].weight, dense[0].weight[kept])
    assert torch.equal(small[0].bias, dense[0].bias[kept])
    assert torch.equal(small[1].running_var, dense[1].running_var[kept])
    assert torch.equal(small[2].weight, dense[2].weight[kept])
    assert torch.equal(small[3].weight, dense[3].weight[kept])
    assert torch.equal(small[4].weight, dense[4].weight[:, kept])
    assert torch.equal(small[7].weight, dense[7].weight)


def test_module_attributes_say_what_the_parameters_say(network):
    small = cut(network, {"0": np.arange(3), "4": np.arange(2)})
    assert (small[0].in_channels, small[0].out_channels) == (3, 3)
    assert (small[1].num_features, small[2].num_parameters) == (3, 3)
    assert (small[3].in_channels, small[3].out_channels, small[3].groups) == (3, 3, 3)
    assert (small[4].in_channels, small[4].out_channels) == (3, 2)
    assert (small[7].in_features, small[7].out_features) == (2, 5)


def test_a_transposed_convolution_and_norms_say_so_too():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 6, 2), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    small = cut(trace(model, X), {"0": np.arange(2), "2": np.arange(5)})
    assert small[1].num_channels == 4
    assert (small[2].in_channels, small[2].out_channels) == (4, 5)
    model = nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    small = cut(trace(model, torch.zeros(2, 4, dtype=torch.long)), {"0": np.arange(3)})
    assert (small[0].embedding_dim, small[1].normalized_shape, small[2].in_features) == (3, (3,), 3)


def test_nothing_is_shared_with_the_dense_model(network):
    before = copy.deepcopy(network.model.state_dict())
    small = cut(network, {"0": np.arange(3)})
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.fill_(7)
    assert all(torch.equal(value, before[name]) for name, value in network.model.state_dict().items())


def test_flags_of_parameters_survive(network):
    network.model[0].weight.requires_grad_(False)
    small = cut(network, {"0": np.arange(3)})
    assert not small[0].weight.requires_grad
    assert small[0].bias.requires_grad
    assert all(isinstance(p, nn.Parameter) and p.is_leaf and p.is_contiguous() for p in small.parameters())


def test_keeping_every_channel_is_the_identity(network, output):
    x = torch.randn(2, 3, 8, 8)
    everything = {g.name: np.arange(g.size) for g in network.groups}
    for selection in ({}, everything):
        assert torch.equal(output(cut(network, selection), x), output(network.model, x))
        assert torch.equal(output(masked_twin(network, selection), x), output(network.model, x))


def test_the_masked_twin_keeps_its_shapes_and_zeroes_what_would_be_read(network):
    twin = masked_twin(network, {"0": np.array([0, 2])})
    gone = [1, 3, 4, 5, 6, 7]
    assert twin[4].weight.shape == network.model[4].weight.shape
    assert not twin[4].weight[:, gone].any()
    assert torch.equal(twin[4].weight[:, [0, 2]], network.model[4].weight[:, [0, 2]])
    assert torch.equal(twin[0].weight, network.model[0].weight)


@pytest.mark.parametrize("kept", [[-1, 2], [3, 8]], ids=["negative", "too large"])
def test_channels_that_a_group_does_not_have_are_refused(network, kept):
    with pytest.raises(PolicyError, match="group '0' has channels 0 to 7"):
        cut(network, {"0": np.array(kept)})


def test_a_group_that_would_keep_no_channel_is_refused(network):
    with pytest.raises(PolicyError, match="group '0' would keep no channel"):
        cut(network, {"0": np.array([], dtype=np.int64)})


def test_a_group_that_does_not_exist_is_refused(network):
    with pytest.raises(PolicyError, match="no pruning group 'zero'"):
        cut(network, {"zero": np.arange(2)})


def test_masks_are_laid_out_group_after_group(network):
    mask = unit_mask(network, {"4": np.array([1, 5])})
    assert mask.tolist() == [True] * 8 + [False, True, False, False, False, True]
    assert kept_indices(np.array([-1, 8, 9, 13, -1]), mask).tolist() == [0, 2, 3, 4]


# --- any small network --------------------------------------------------------------------------------------------

BLOCKS = ("conv", "depthwise", "grouped", "residual", "dense", "squeeze", "pool", "shuffle")


class Grown(nn.Module):
    """A network that is grown block by block from a list of (kind, width)."""

    def __init__(self, plan, hidden):
        super().__init__()
        self.plan, self.blocks, width = plan, nn.ModuleList(), 3
        for kind, wanted in plan:
            layers, width = self._block(kind, width, wanted)
            self.blocks.append(layers)
        self.head = nn.Sequential(nn.Linear(width * 4, hidden), nn.ReLU(), nn.Linear(hidden, 3))

    @staticmethod
    def _block(kind, width, wanted):
        def conv(a, b, k=3, **options):
            return nn.Sequential(nn.Conv2d(a, b, k, padding=k // 2, **options), nn.BatchNorm2d(b), nn.ReLU())

        if kind == "conv":
            return conv(width, wanted, bias=False), wanted
        if kind == "depthwise":
            return nn.Sequential(conv(width, width, groups=width), conv(width, wanted, 1)), wanted
        if kind == "grouped":
            return nn.Sequential(conv(width, 2 * wanted), conv(2 * wanted, 2 * wanted, groups=2)), 2 * wanted
        if kind == "residual":
            return nn.ModuleList([conv(width, wanted), conv(wanted, width)]), width
        if kind == "dense":
            return conv(width, wanted), width + wanted
        if kind == "squeeze":
            return nn.ModuleList([conv(width, wanted), nn.Conv2d(wanted, 2, 1), nn.Conv2d(2, wanted, 1)]), wanted
        if kind == "shuffle":
            return conv(width, 2 * wanted), 2 * wanted
        return nn.MaxPool2d(3, 1, 1), width

    def forward(self, x):
        for (kind, _), block in zip(self.plan, self.blocks, strict=True):
            if kind == "residual":
                x = x + block[1](block[0](x))
            elif kind == "dense":
                x = torch.cat([x, block(x)], 1)
            elif kind == "squeeze":
                y = block[0](x)
                x = y * torch.sigmoid(block[2](F.relu(block[1](F.adaptive_avg_pool2d(y, 1)))))
            elif kind == "shuffle":
                y = block(x)
                b, c, h, w = y.shape
                x = y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
            else:
                x = block(x)
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


plans = st.lists(st.tuples(st.sampled_from(BLOCKS), st.integers(2, 7)), min_size=1, max_size=5)


@settings(
    max_examples=25,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(plan=plans, hidden=st.integers(2, 6), seed=st.integers(0, 999), ratio=st.floats(0.0, 0.9))
def test_any_small_network_equals_its_masked_twin_and_costs_what_was_predicted(
    exact, pruned, plan, hidden, seed, ratio
):
    torch.manual_seed(seed)
    x = torch.randn(2, 3, 5, 5)
    network = exact(Grown(plan, hidden), x, ratio=ratio, shows=False)
    assert network.notes == ()
    # The cost model prices every mixture of widths, not only a common ratio.
    rng = np.random.default_rng(seed)
    widths = {g.name: int(rng.integers(1, g.size + 1)) for g in network.groups}
    small = cut(network, {name: np.arange(width) for name, width in widths.items()})
    assert network.cost_model.cost("params", widths) == sum(p.numel() for p in small.parameters())
    # No cost rises when any group narrows.
    costs = network.cost_model.costs(widths)
    for name, width in widths.items():
        if width > 1:
            fewer = network.cost_model.costs({**widths, name: width - 1})
            assert all(fewer[cost] <= costs[cost] for cost in COSTS), name
