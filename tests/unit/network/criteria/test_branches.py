"""What a branch carries of what it is added to, and the error curves that follow it."""

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.network.calibration.moments import gather
from autoprune.network.criteria.branches import removal_errors, with_depth
from autoprune.network.criteria.learning import learn
from autoprune.network.data.samples import Pool, TensorSplit, Transform
from autoprune.network.graph.modules import evaluating
from autoprune.network.models.building import build_model
from autoprune.network.repair.compensation import compensate
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.stand_ins import UniformNorm
from autoprune.network.tracing.removable import with_removable
from autoprune.network.tracing.trace import trace

NONE = np.empty(0, dtype=np.int64)


class Branch(nn.Module):
    """A linear branch of two layers, `scale` times as large as it is born."""

    def __init__(self, scale):
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(6, 10), nn.Linear(10, 6), scale

    def forward(self, x):
        return x + self.scale * self.down(self.up(x) + 1.0)


class Residual(nn.Module):
    """A plain layer, two branches of different weight, a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.weak, self.strong = nn.Linear(4, 6), Branch(0.3), Branch(2.0)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.strong(self.weak(self.stem(x))))


def residual():
    torch.manual_seed(0)
    return Residual().eval()


def errors_of(network, x):
    return removal_errors(network, x, gather(network, [x]))


def test_the_error_is_the_part_of_the_sum_s_variance_that_goes():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    network = trace(residual(), x[:2])
    found = errors_of(network, x)
    assert set(found) == {"weak.up", "strong.up"}  # the stem and the stream itself have no path around them
    with torch.no_grad():
        h = network.model.stem(x)
        for name in ("weak", "strong"):
            block = getattr(network.model, name)
            out = block(h)
            expected = float((out - h).double().var(0, correction=0).sum() / out.double().var(0, correction=0).sum())
            assert found[f"{name}.up"] == pytest.approx(expected, rel=1e-4)
            h = out
    assert found["weak.up"] < 0.2 < found["strong.up"]


@pytest.mark.parametrize("norm", [False, True])
def test_it_is_the_error_of_the_network_that_is_cut_and_refitted(norm):
    torch.manual_seed(0)
    if norm:
        model, name, block = build_model(name="resnet20", num_classes=10), "layer2.1.conv1", "layer2.1"
        x = torch.randn(64, 3, 8, 8)
        with torch.no_grad():
            model.train()(x)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = None
                    module.reset_running_stats()
            model(x)  # statistics of these very images
    else:
        model, name, block = residual(), "weak.up", "weak"
        x = torch.randn(64, 4)
    network, _ = with_removable(trace(model.eval(), x[:2]), [name])
    statistics = gather(network, [x])
    found = removal_errors(network, x, statistics)[name]
    small = cut(network, {name: NONE})
    compensate(network, small, {name: NONE}, statistics)
    seen = []
    for one in (network.model, small):
        handle = one.get_submodule(block).register_forward_hook(lambda m, a, out: seen.append((a[0], out.double())))
        with torch.no_grad(), evaluating(one):
            for module in one.modules():
                if isinstance(module, UniformNorm):
                    module.running_mean.zero_()  # as recalibration finds it: what it reads is zero everywhere
            one(x)
        handle.remove()
    torch.testing.assert_close(seen[0][0], seen[1][0])
    dense, removed = seen[0][1], seen[1][1]
    error = float((dense - removed).square().mean(0).sum() / dense.var(0, correction=0).sum())
    assert found == pytest.approx(error, rel=1e-3)
    assert 0.0 < found < 1.0


def test_measuring_leaves_the_model_alone():
    x = torch.randn(8, 4)
    network = trace(residual(), x[:2])
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    first = errors_of(network, x)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.model.state_dict().items())
    assert not any(module._forward_hooks for module in network.model.modules())
    assert errors_of(network, x) == first


def test_a_layer_that_all_runs_through_and_one_with_other_inputs_are_left_out():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(4, 6), nn.Linear(11, 3)

        def forward(self, x):
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    x = torch.randn(16, 4)
    chain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    for model in (chain, Joined().eval()):
        assert errors_of(trace(model, x[:2]), x) == {}


def test_curves_keep_their_form_and_end_at_the_error_of_the_removal():
    tables = {"a": {"l1": (2.0, 1.0, 0.5, 0.0)}, "b": {"l1": (1.0, 0.4, 0.0)}, "dead": {"l1": (0.0, 0.0)}}
    found = with_depth(tables, {"a": 0.1, "dead": 0.3})
    assert found["a"]["l1"] == pytest.approx((0.1, 0.05, 0.025, 0.0))
    assert found["b"] == tables["b"]
    assert found["dead"]["l1"] == (0.0, 0.0)


def test_what_is_learnt_of_a_network_knows_that_a_weak_branch_is_cheap():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    network = trace(residual(), x[:2])
    split = TensorSplit(Pool(x, torch.zeros(64, dtype=torch.int64)), torch.arange(64), Transform(), 3)
    tables = learn(network, split, criteria=["l1"]).tables
    assert tables["weak.up"]["l1"][0] == pytest.approx(errors_of(network, x)["weak.up"], rel=1e-6)
    assert tables["weak.up"]["l1"][5] < 0.2 * tables["strong.up"]["l1"][5]
