"""Regions under autocast or without gradients are traced as if they stood in the forward pass itself."""

import torch
from torch import nn

from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.twin import masked_twin, relative_error
from autoprune.network.tracing.counting import count_macs
from autoprune.network.tracing.trace import trace
from autoprune.network.tracing.verify import halved


class Regions(nn.Module):
    """A layer in full precision, one without gradients inside of it, and one region with two results."""

    def __init__(self):
        super().__init__()
        self.first, self.full, self.inner = nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(12, 10)
        self.last = nn.Linear(10, 3)

    def forward(self, x):
        x = self.first(x)
        with torch.autocast("cpu", enabled=False):
            y = torch.relu(x.float())
            with torch.no_grad():
                gate = self.inner(y).sigmoid()
            z = self.full(y) * gate
        with torch.no_grad():
            scale, shift = z.mean(1, keepdim=True), z.amax(1, keepdim=True)
        return self.last(z * 0.5) + scale.sign() + shift * 0.0


def test_layers_in_regions_are_pruned_and_counted():
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    network = trace(Regions().eval(), x)
    assert not network.notes
    assert "first" in {group.name for group in network.groups}
    selection = halved(network, ["first"])
    small = cut(network, selection).eval()
    with torch.no_grad():
        assert relative_error(small(x), masked_twin(network, selection).eval()(x)) < 1e-5
    assert count_macs(small, (x,)) == network.cost_model.cost("macs", {"first": len(selection["first"])})


def test_what_a_region_computes_reaches_the_groups_around_it():
    class Gated(Regions):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                x = torch.relu(self.first(x))
                x = self.full(x) * self.inner(x).sigmoid()
            return self.last(x)

    network = trace(Gated().eval(), torch.randn(2, 6))
    assert {group.name: group.size for group in network.groups} == {"first": 12, "full": 10}
    assert [frozen.name for frozen in network.frozen] == ["last"]
