"""Whole architectures: every group pruned at once gives a network that runs, equals its masked twin and costs what was
predicted.
"""

import copy
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.network import load, trace
from autoprune.network.artifacts.saved import model_document, save_model
from autoprune.network.graph.modules import evaluating
from autoprune.network.graph.network import Network
from autoprune.network.models.building import build_model
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.twin import masked_twin, relative_error
from autoprune.network.tracing.counting import count_bytes, count_macs, count_params
from autoprune.policy import Group, feasible_widths, uniform_policy

CLASSES = 10


@dataclass(frozen=True)
class Architecture:
    """A model by name, the size of its input, and how many groups its trace finds."""

    name: str
    groups: int
    size: int = 64


ISSUE = [
    Architecture("resnet20", 9, 32),
    Architecture("vgg16_bn_32", 13, 32),
    Architecture("vgg16_bn", 15),
    Architecture("mobilenet_v2", 25),
    Architecture("densenet121", 120),
    Architecture("shufflenet_v2_x1_0", 19),
    Architecture("efficientnet_b0", 40),
    Architecture("regnet_y_400mf", 53),
]
MORE = [
    Architecture("resnet18", 12),
    Architecture("googlenet", 57),
    Architecture("squeezenet1_1", 25),
    Architecture("mnasnet1_0", 25),
    Architecture("mobilenet_v3_small", 27),
    Architecture("mobilenet_v3_large", 30),
]


def build(architecture):
    """A model with lively batch norms: statistics of a forward pass, then every entry drawn anew around them."""
    generator = torch.Generator().manual_seed(1)
    model = build_model(name=architecture.name, num_classes=CLASSES, seed=0)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, architecture.size, architecture.size, generator=generator))
        for norm in norms:
            spread = norm.running_var.sqrt()
            norm.running_mean += 0.3 * spread * torch.randn(spread.shape, generator=generator)
            norm.running_var *= torch.empty(spread.shape).uniform_(0.7, 1.5, generator=generator)
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(0.0, 0.3, generator=generator)
    return model.eval()


@cache
def _traced(architecture):
    model = build(architecture)
    before = copy.deepcopy(model.state_dict())
    return trace(model, torch.zeros(2, 3, architecture.size, architecture.size)), before


@pytest.fixture(scope="module", params=ISSUE, ids=lambda a: a.name)
def traced(request):
    yield request.param, *_traced(request.param)
    _traced.cache_clear()


@pytest.fixture(scope="module", params=MORE, ids=lambda a: a.name)
def traced_more(request):
    yield request.param, *_traced(request.param)
    _traced.cache_clear()


def groups_of(network: Network):
    return [Group(g.name, g.size, feasible_widths(g.size)) for g in network.groups]


def pruned_at(network: Network, ratio):
    """Random channels: a criterion might prefer those that are easy to remove."""
    rng = np.random.default_rng(0)
    widths = uniform_policy(groups_of(network), ratio, "random").widths(groups_of(network))
    selection = {g.name: np.sort(rng.choice(g.size, widths[g.name], replace=False)) for g in network.groups}
    return selection, widths


def sample(network: Network):
    return torch.randn(network.example_inputs[0].shape, generator=torch.Generator().manual_seed(5))


def output_of(model, x):
    with evaluating(model), torch.no_grad():
        return model(x)


def check_pruning(network, before, ratio):
    """Everything that must hold for a network whose groups are all pruned by `ratio`."""
    selection, widths = pruned_at(network, ratio)
    small, twin, x = cut(network, selection), masked_twin(network, selection), sample(network)
    expected = output_of(twin, x)
    assert relative_error(output_of(small, x), expected) < 1e-4
    assert relative_error(output_of(network.model, x), expected) > 1e-3, "pruning must show in the output"
    costs = network.cost_model.costs(widths)
    assert costs["macs"] == count_macs(small, network.example_inputs)
    assert costs["params"] == count_params(small)
    assert costs["size_bytes"] == count_bytes(small)
    state = network.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items()), "the dense model is unchanged"
    return small, selection


def check_dense(architecture, network):
    assert len(network.groups) == architecture.groups
    assert network.broken == {}
    assert network.notes == ()
    dense = network.cost_model.dense()
    assert dense["macs"] == count_macs(network.model, network.example_inputs)
    assert dense["params"] == count_params(network.model)
    assert dense["size_bytes"] == count_bytes(network.model)


def test_every_group_is_found_and_the_dense_costs_are_exact(traced):
    architecture, network, _ = traced
    check_dense(architecture, network)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_the_pruned_network_equals_its_masked_twin_and_costs_what_was_predicted(traced, ratio):
    _, network, before = traced
    check_pruning(network, before, ratio)


def test_a_saved_model_loads_with_the_same_output(traced, tmp_path):
    architecture, network, _ = traced
    selection, _ = pruned_at(network, 0.5)
    small, x = cut(network, selection), sample(network)
    origin = {"name": architecture.name, "num_classes": CLASSES}
    save_model(tmp_path / "small", small, model_document(network, None, selection, {}, origin))
    loaded = load(tmp_path / "small")
    assert type(loaded) is type(network.model)
    saved = small.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
    # Not bit for bit: where tensors lie in memory decides which kernel sums them up.
    assert relative_error(output_of(loaded, x), output_of(small, x)) < 1e-5


def test_a_pruned_network_trains(traced):
    """Batch norms, dropout and gradients see the smaller shapes too."""
    architecture, network, _ = traced
    selection, _ = pruned_at(network, 0.5)
    small = cut(network, selection).train()
    logits = small(torch.randn(4, 3, architecture.size, architecture.size))
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def test_the_zero_padded_shortcut_freezes_the_residual_widths_and_says_so():
    network, _ = _traced(ISSUE[0])
    assert {g.name for g in network.groups} == {f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in (0, 1, 2)}
    stream = [f for f in network.frozen if f.name == "conv1" or f.name.endswith("conv2")]
    assert len(stream) == 10
    assert all("padded along channels by a constant" in f.reason for f in stream), stream


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_further_architectures_are_pruned_exactly(traced_more, ratio):
    architecture, network, before = traced_more
    check_dense(architecture, network)
    check_pruning(network, before, ratio)


@pytest.mark.slow
def test_resnet18_prunes_its_residual_widths():
    network, before = _traced(MORE[0])
    stream = network.group("conv1")
    assert {"conv1", "layer1.0.conv2", "layer1.1.conv2"} <= set(stream.producers)
    check_pruning(network, before, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_convnext_runs_and_is_marked_approximate(ratio):
    """LayerNorms average over the pruned channels, so there is no exact twin; the costs are exact all the same."""
    network = trace(build_model(name="convnext_tiny", num_classes=CLASSES, seed=0), torch.zeros(2, 3, 64, 64))
    assert any(group.approximate for group in network.groups)
    selection, widths = pruned_at(network, ratio)
    small = cut(network, selection)
    assert output_of(small, sample(network)).shape == (2, CLASSES)
    assert network.cost_model.cost("macs", widths) == count_macs(small, network.example_inputs)
    assert network.cost_model.cost("params", widths) == count_params(small)
