"""Batch norms folded away where a network only runs forward: the same output, and nothing left behind."""

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.network.devices.precision import Precision
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.folding import foldable, folded, folded_copy
from autoprune.network.tracing.trace import trace
from autoprune.policy import uniform_policy
from autoprune.results import Fidelity

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))


class Reading(nn.Module):
    """A batch norm whose numbers are read by hand."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        norm = self.norm
        return nn.functional.batch_norm(self.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias)


class Twice(nn.Module):
    """Two convolutions that one batch norm reads."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.a(x)) + self.norm(self.b(x))


def net(*middle, bias=False, affine=True):
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8, affine=affine), nn.ReLU()]
    second = [nn.Conv2d(8, 8, 3, groups=2, bias=bias), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*first, *second, *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                if module.affine:
                    module.weight.normal_()
                    module.bias.normal_()
    return model.eval()


def run(model, x=X):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("bias", [False, True])
def test_a_folded_network_gives_the_same_and_is_what_it_was_afterwards(bias):
    network = trace(net(bias=bias), X)
    pairs = foldable(network)
    assert pairs == (("0", "1"), ("3", "4"))
    model = network.model
    before, expected = dict(model.named_parameters()), run(model)
    with folded(model, pairs):
        assert model[1](X) is X
        torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-4)
    assert list(model.named_parameters()) == list(before.items())
    assert all(a is b for a, b in zip(model.parameters(), before.values(), strict=True))
    assert torch.equal(run(model), expected)


def test_it_is_what_it_was_after_an_error_too():
    model = net()
    expected = run(model)
    with pytest.raises(ZeroDivisionError), folded(model, (("0", "1"),)):
        raise ZeroDivisionError
    assert torch.equal(run(model), expected)


def test_a_pruned_network_is_folded_by_the_pairs_of_the_dense_one_and_a_copy_stays_folded():
    network = trace(net(), X)
    small = cut(network, {group.name: np.arange(0, group.size, 2) for group in network.groups}).eval()
    expected = run(small)
    with folded(small, foldable(network)):
        torch.testing.assert_close(run(small), expected, atol=1e-5, rtol=1e-4)
    twin = folded_copy(small, foldable(network))
    torch.testing.assert_close(run(twin), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(run(small), expected)
    assert folded_copy(small, ()) is small


@pytest.mark.parametrize(
    ("model", "pairs"),
    [
        (net(Reading()), ()),
        (net(Twice()), (("0", "1"), ("3", "4"))),
        (net(affine=False), (("3", "4"),)),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), ()),
    ],
    ids=["a norm read by hand", "a norm used twice", "a norm without a weight", "no norm"],
)
def test_what_cannot_be_folded_is_left_alone(model, pairs):
    assert foldable(trace(model, X)) == pairs


def test_a_norm_that_is_still_to_be_recalibrated_counts_as_it_is_when_it_is_folded():
    model = net()
    with torch.no_grad():
        model[1].running_mean.add_(1.0)
    expected = run(model)
    with folded(model, (("0", "1"),)):
        torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-4)


def test_a_candidate_scores_the_same_and_its_training_goes_on_unfolded(bench):
    from dataclasses import replace

    bench = replace(bench, precision=Precision(None))
    policy = uniform_policy(bench.groups, 0.5, "l2")
    folding = replace(bench, folds=foldable(bench.network))
    assert folding.folds
    plain, quick = (b.evaluate(policy, Fidelity("screen")) for b in (bench, folding))
    assert quick.metrics["val_accuracy"] == pytest.approx(plain.metrics["val_accuracy"], abs=0.01)
    assert quick.metrics["val_loss"] == pytest.approx(plain.metrics["val_loss"], rel=1e-3)
    tuned = folding.evaluate(policy, Fidelity("tune", epochs=0.1))
    assert "val_accuracy_tuned" in tuned.metrics
    assert all("forward" not in vars(module) for module in folding.network.model.modules())
