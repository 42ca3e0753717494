"""Weights that hooks compute, and tensors that an earlier pass left on a module: copied, pruned, or refused."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as masks

import autoprune
from autoprune.errors import TraceError
from autoprune.network.artifacts.saved import load, model_document, save_model
from autoprune.network.graph.copies import held_tensors
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.twin import masked_twin, relative_error
from autoprune.network.tracing.counting import count_bytes, count_macs, count_params
from autoprune.network.tracing.trace import trace
from autoprune.network.tracing.verify import halved

Wrap = Callable[[nn.Module], nn.Module]


def old_weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(module)


def masked_weights(module: nn.Module) -> nn.Module:
    return masks.random_unstructured(module, "weight", 0.3)


def masked_twice(module: nn.Module) -> nn.Module:
    return masks.ln_structured(masks.random_unstructured(module, "weight", 0.3), "weight", 0.2, n=2, dim=0)


class Wrapped(nn.Module):
    def __init__(self, wrap: Wrap) -> None:
        super().__init__()
        self.a, self.b = wrap(nn.Conv1d(2, 8, 3)), wrap(nn.Conv1d(8, 12, 3))
        self.c, self.out = wrap(nn.Linear(12, 10)), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.c(self.b(self.a(x).relu()).relu().mean(-1)).relu())


X = torch.randn(2, 2, 9)


@pytest.mark.parametrize("wrap", [old_weight_norm, masked_weights, masked_twice])
def test_a_network_whose_weights_are_computed_by_hooks_is_pruned_trained_and_loaded(wrap: Wrap, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Wrapped(wrap).eval()
    before = model(X).detach()
    network = trace(model, X)
    assert {group.name: group.size for group in network.groups} == {"a": 8, "b": 12, "c": 10}
    assert torch.equal(model(X), before)
    selection = halved(network, ["a", "b", "c"])
    small = cut(network, selection).eval()
    assert small.get_submodule("b").weight.shape == (len(selection["b"]), len(selection["a"]), 3)
    assert small.get_submodule("b").in_channels == len(selection["a"])
    with torch.no_grad():
        assert relative_error(small(X), masked_twin(network, selection).eval()(X)) < 1e-5
    costs = network.cost_model.costs({name: len(kept) for name, kept in selection.items()})
    assert costs["macs"] == count_macs(small, (X,))
    assert costs["params"] == count_params(small)
    assert costs["size_bytes"] == count_bytes(small)
    save_model(tmp_path / "model", small, model_document(network, None, selection, {}, {}))
    torch.manual_seed(0)
    back = load(tmp_path / "model", lambda: Wrapped(wrap))
    with torch.no_grad():
        assert torch.equal(back(X), small(X))
    small.train()(X).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("wrap", [old_weight_norm, masked_weights])
def test_calibrated_pruning_and_gradients_work_with_such_weights(wrap: Wrap) -> None:
    network = trace(Wrapped(wrap).eval(), X)
    batch = (torch.randn(32, 2, 9), torch.randint(0, 2, (32,)))
    for criterion in ("l2", "taylor"):
        small = autoprune.prune(network, 0.5, criterion=criterion, calibration=[batch])
        assert small(X).shape == (2, 2)


def test_the_old_spectral_norm_is_refused_with_its_layers_and_the_remedy() -> None:
    model = Wrapped(torch.nn.utils.spectral_norm).eval()
    with pytest.raises(TraceError, match=r"a, b, c\n.*remove_spectral_norm"):
        trace(model, X)
    for name in ("a", "b", "c"):
        torch.nn.utils.remove_spectral_norm(model.get_submodule(name))
    assert len(trace(model, X).groups) == 3


class Keeping(nn.Module):
    """Keeps what it computed: an attention map for a plot, features in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(9, 12), nn.Linear(12, 10), nn.Linear(10, 2)
        self.features: list[Tensor] = []
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        self.features[:] = [y]
        self.kept = self.b(y)
        return self.c(self.kept.relu())


def test_activations_that_are_kept_from_a_pass_with_gradients_do_not_hinder() -> None:
    model = Keeping().eval()
    model(X)
    kept, features = model.kept, model.features[0]
    assert kept is not None
    assert kept.requires_grad
    network = trace(model, X)
    assert len(network.groups) == 2
    small = autoprune.prune(network, 0.5)
    assert small(X).shape == (2, 2, 2)
    assert model.kept is kept
    assert model.features[0] is features
    assert network.model.get_parameter("a.weight") is model.a.weight
    model(X)  # what is kept is of another pass, and the network goes on
    assert autoprune.prune(network, 0.25)(X).shape == (2, 2, 2)


def test_what_cannot_be_copied_is_refused_by_name() -> None:
    model = Keeping().eval()
    model.b.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(TraceError, match=r"cannot be copied(.|\n)*held by b\.lock"):
        trace(model, X)


def test_every_tensor_that_modules_hold_is_found() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)))
    for number, module in enumerate(model):
        module.extra = torch.full((1,), float(number))
    found = {id(tensor) for tensor in held_tensors(model)}
    assert all(id(module.extra) in found for module in model)
