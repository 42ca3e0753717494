"""What every test of traced networks needs: pruning, checked against the masked twin and PyTorch's own counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.network.criteria.learning import learn
from autoprune.network.data.loading import DataSettings, as_splits
from autoprune.network.devices.precision import Precision
from autoprune.network.graph.modules import evaluating
from autoprune.network.graph.network import Network
from autoprune.network.preparing import Ingredients
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.twin import masked_twin, relative_error
from autoprune.network.tracing.counting import count_bytes, count_macs, count_params
from autoprune.network.tracing.trace import trace
from autoprune.network.training.recipe import Recipe, fine_tune
from autoprune.network.workbench import Workbench
from autoprune.policy import Group, feasible_widths

CONVOLUTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"stride": 2},
    {"padding": 1},
    {"padding": (0, 2), "stride": (2, 1)},
    {"dilation": 2, "padding": 2},
    {"padding": "same"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "circular", "dilation": 2},
    {"groups": 3, "padding": 1},
)


@pytest.fixture(params=CONVOLUTIONS, ids=str)
def convolution_options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Every way in which a convolution of three channels lays out its patches."""
    return dict(request.param)


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter and batch norm statistic anew, so that no channel is neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                module.running_mean.normal_(0.0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
            for parameter in module.parameters(recurse=False):
                if parameter.ndim == 1:
                    parameter.uniform_(0.3, 1.0, generator=generator)
    return model


def pick(network: Network, ratio: float = 0.5, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns a selection of random channels in every group."""
    rng = np.random.default_rng(seed)
    return {
        g.name: np.sort(rng.choice(g.size, max(1, round(g.size * (1 - ratio))), replace=False)) for g in network.groups
    }


def run(model: nn.Module, *inputs: torch.Tensor) -> Any:
    """Returns the model's output in eval mode."""
    with evaluating(model), torch.no_grad():
        return model(*inputs)


def assert_costs(network: Network, model: nn.Module, selection: Mapping[str, np.ndarray]) -> None:
    """The cost model's numbers are PyTorch's own."""
    costs = network.cost_model.costs({name: len(kept) for name, kept in selection.items()})
    assert costs["macs"] == count_macs(model, network.example_inputs)
    assert costs["params"] == count_params(model)
    assert costs["size_bytes"] == count_bytes(model)


def assert_exact(
    model: nn.Module, *inputs: torch.Tensor, ratio: float = 0.5, twin: bool = True, shows: bool = True
) -> Network:
    """Traces `model`, prunes every group, and checks twin, costs, and that nothing was frozen by verification."""
    network = trace(lively(model), inputs)
    assert network.broken == {}
    assert_pruned(network, *inputs, ratio=ratio, twin=twin, shows=shows)
    return network


def assert_pruned(
    network: Network, *inputs: torch.Tensor, ratio: float = 0.5, twin: bool = True, shows: bool = True
) -> nn.Module:
    """Prunes every group of `network` and checks twin and costs; returns the pruned network."""
    selection = pick(network, ratio)
    small = cut(network, selection)
    output = run(small, *inputs)
    if twin:
        expected = run(masked_twin(network, selection), *inputs)
        assert relative_error(output, expected) < 1e-4
        if shows:
            assert relative_error(run(network.model, *inputs), expected) > 1e-3, "pruning must show in the output"
    assert_costs(network, small, selection)
    return small


@pytest.fixture
def exact() -> Callable[..., Network]:
    return assert_exact


@pytest.fixture
def pruned() -> Callable[..., nn.Module]:
    return assert_pruned


@pytest.fixture
def select() -> Callable[..., dict[str, np.ndarray]]:
    return pick


@pytest.fixture
def output() -> Callable[..., Any]:
    return run


CRITERIA = ("l2", "obs", "taylor", "random")


@pytest.fixture(scope="session")
def trained() -> Ingredients:
    """A small convolutional network that has learnt to tell four kinds of stripes apart, and its data."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(480) % 4
    patterns = torch.randn(4, 2, 6, 6, generator=generator)
    x = patterns[y] + 0.8 * torch.randn(480, 2, 6, 6, generator=generator)
    splits = as_splits(
        {"train": (x[:320], y[:320]), "val": (x[320:400], y[320:400]), "test": (x[400:], y[400:])},
        settings=DataSettings(calibration=64),
    )
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    recipe = Recipe(batch_size=32, distillation=None, precision="float32")
    fine_tune(model, splits.train, recipe=recipe, epochs=4, lr=0.1, precision=Precision(autocast_dtype=None))
    return Ingredients(model.eval(), splits, {}, "stripes")


@pytest.fixture(scope="session")
def bench(trained: Ingredients) -> Workbench:
    """A workbench for the trained network."""
    network = trace(trained.model, torch.zeros(2, 2, 6, 6))
    plain = Precision(autocast_dtype=None)
    return Workbench(
        network=network,
        groups=tuple(Group(g.name, g.size, feasible_widths(g.size)) for g in network.groups),
        splits=trained.splits,
        recipe=Recipe(batch_size=32, precision="float32"),
        knowledge=learn(network, trained.splits.calibration, criteria=CRITERIA, device="cpu", seed=0),
        precision=plain,
        training_precision=plain,
    )
