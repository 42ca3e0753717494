"""Sequential compensation: layers are refitted to what they really read."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoprune.network.calibration.moments import gather
from autoprune.network.calibration.targets import gather_targets, refittable_layers
from autoprune.network.repair.compensation import compensated_tensors
from autoprune.network.repair.sequential import refit_sequentially
from autoprune.network.surgery.cut import cut
from autoprune.network.tracing.trace import trace


def images(count=96, size=6, seed=1):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def deep(norm=True, bias=False, groups=1):
    torch.manual_seed(0)
    layers = []
    for a, b in [(3, 12), (12, 12), (12, 12), (12, 8)]:
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=bias, groups=groups if a > 3 else 1)]
        layers += [nn.BatchNorm2d(b)] if norm else []
        layers += [nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(images())
    return model.eval()


def halves(network, seed=0):
    rng = np.random.default_rng(seed)
    return {g.name: np.sort(rng.choice(g.size, g.size // 2, replace=False)) for g in network.groups}


def distance(model, dense, x):
    with torch.no_grad():
        return float((model(x) - dense(x)).square().mean())


def repaired(network, selection, x, ridge=1e-3):
    small = cut(network, selection)
    refit_sequentially(network, small, selection, gather_targets(network, x), ridge=ridge)
    return small


@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"norm": False, "bias": True}, {"norm": False}, {"groups": 2}], ids=str
)
def test_refitting_brings_the_output_nearer_on_images_that_it_did_not_see(options):
    network = trace(deep(**options), images(2))
    selection, fresh = halves(network), images(seed=9)
    bare = cut(network, selection)
    small = repaired(network, selection, images())
    assert distance(small, network.model, fresh) < 0.6 * distance(bare, network.model, fresh)


def test_a_pass_in_bfloat16_repairs_as_well_as_one_in_float32():
    network = trace(deep(), images(2))
    selection, fresh = halves(network), images(seed=9)
    exact, rounded = repaired(network, selection, images()), cut(network, selection)
    targets = gather_targets(network, images())
    with torch.autocast("cpu", torch.bfloat16):
        refit_sequentially(network, rounded, selection, targets)
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    assert distance(rounded, network.model, fresh) < 1.05 * distance(exact, network.model, fresh)
    assert distance(rounded, exact, fresh) < 0.05 * distance(exact, network.model, fresh)


def test_it_is_nearer_than_refitting_every_layer_for_the_dense_networks_inputs():
    network, x = trace(deep(norm=False, bias=True), images(2)), images()
    selection = halves(network)
    cached = cut(network, selection)
    tensors = compensated_tensors(network, selection, gather(network, [x]))
    cached.load_state_dict({**cached.state_dict(), **tensors})
    sequential = repaired(network, selection, x)
    assert distance(sequential, network.model, x) < distance(cached, network.model, x)


def test_a_first_layer_after_the_cut_gets_the_least_squares_solution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).eval()
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(3))
    network, kept = trace(model, x[:2]), np.array([0, 3, 4, 8])
    small = repaired(network, {"0": kept}, x, ridge=0.0)
    with torch.no_grad():
        hidden, wanted = F.relu(model[0](x))[:, kept].double(), model(x).double()
    design = torch.cat([hidden, torch.ones(500, 1)], 1).numpy()
    expected = np.linalg.lstsq(design, wanted.numpy(), rcond=None)[0]
    np.testing.assert_allclose(small[2].weight.detach().T.numpy(), expected[:-1], atol=2e-4)
    np.testing.assert_allclose(small[2].bias.detach().numpy(), expected[-1], atol=2e-4)


def test_keeping_everything_gives_the_dense_weights_back():
    network = trace(deep(norm=False, bias=True), images(2))
    small = repaired(network, {g.name: np.arange(g.size) for g in network.groups}, images())
    for mine, dense in zip(small.parameters(), network.model.parameters(), strict=True):
        torch.testing.assert_close(mine, dense, atol=1e-3, rtol=1e-3)


def test_batch_norms_get_the_statistics_of_what_they_now_read():
    network, x = trace(deep(), images(2)), images()
    small = repaired(network, halves(network), x)
    with torch.no_grad():
        first = small[0](x)
    torch.testing.assert_close(small[1].running_mean, first.mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(small[1].running_var, first.movedim(1, 0).flatten(1).var(1), atol=1e-4, rtol=1e-3)
    assert all(m.momentum == 0.1 for m in small if isinstance(m, nn.BatchNorm2d))
    assert not any(m.training for m in small.modules())


def test_a_dead_layer_keeps_what_it_came_with_and_the_rest_is_refitted():
    model = deep(norm=False, bias=True)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1.0)
    network = trace(model, images(2))
    small = repaired(network, halves(network), images())
    assert all(torch.isfinite(p).all() for p in small.parameters())
    torch.testing.assert_close(small(images()), network.model(images()), atol=1e-3, rtol=1e-2)


def test_a_shared_layer_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.b(torch.relu(self.a(x)))))))

    x = torch.randn(64, 6)
    network = trace(Twice(), x[:2])
    assert set(refittable_layers(network)) == {"a", "c"}
    selection = {"a": np.arange(4)}
    small = repaired(network, selection, x)
    assert torch.equal(small.b.weight, network.model.b.weight[:4, :4])


def test_targets_are_the_dense_layers_outputs_without_bias_and_the_dense_model_is_left_alone():
    network, x = trace(deep(norm=False, bias=True), images(2)), images(8)
    targets = gather_targets(network, x, rows=10**6)
    with torch.no_grad():
        expected = F.conv2d(x, network.model[0].weight, padding=1).movedim(1, -1).reshape(-1, 12)
    drawn = torch.randperm(len(expected), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(targets.outputs["0"][0], expected[drawn].T, atol=1e-5, rtol=1e-4)
    assert all(not m._forward_pre_hooks for m in network.model.modules())


def test_the_same_seed_gives_the_same_network():
    network = trace(deep(), images(2))
    selection = halves(network)
    first, second = (repaired(network, selection, images()) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
