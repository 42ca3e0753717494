"""Norms that are told a width, or keep one beside parameters that they may not have: the width follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.network.artifacts.saved import load, model_document, save_model
from autoprune.network.graph.network import Network
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.twin import masked_twin, relative_error
from autoprune.network.tracing.counting import count_bytes, count_macs, count_params
from autoprune.network.tracing.trace import trace
from autoprune.network.tracing.verify import halved

WIDTH = 24


class IntegerNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dim, self.rounds = width, 7

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,))


class ShapeNorm(nn.Module):
    """Keeps its width as a `torch.Size`, and a number of nothing as wide in another list."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape, self.others = torch.Size([width]), [width, 3]
        self.gain = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.shape, self.gain)


class OwnRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden_size, self.weight = width, nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class ChannelsFirst(nn.LayerNorm):
    """As timm's LayerNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias).permute(0, 3, 1, 2)


TOKEN_NORMS: list[Callable[[int], nn.Module]] = [
    nn.RMSNorm,
    lambda n: nn.RMSNorm(n, elementwise_affine=False),
    lambda n: nn.LayerNorm(n, elementwise_affine=False),
    lambda n: nn.LayerNorm(n, bias=False),
    lambda n: nn.LayerNorm([5, n], elementwise_affine=False),
    lambda n: nn.RMSNorm([5, n], elementwise_affine=False),
    lambda n: nn.LayerNorm([5, n]),
    IntegerNorm,
    ShapeNorm,
    OwnRMSNorm,
]
IMAGE_NORMS: list[tuple[Callable[[int], nn.Module], bool]] = [
    (ChannelsFirst, False),
    (lambda n: nn.LayerNorm([n, 6, 6], elementwise_affine=False), False),
    (lambda n: nn.GroupNorm(4, n, affine=False), False),
    (lambda n: nn.GroupNorm(1, n), False),
    (lambda n: nn.GroupNorm(n, n), True),
    (lambda n: nn.GroupNorm(n, n, affine=False), True),
    (nn.InstanceNorm2d, True),
    (lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True), True),
    (lambda n: nn.BatchNorm2d(n, affine=False), True),
    (lambda n: nn.BatchNorm2d(n, affine=False, track_running_stats=False), True),
]


class Tokens(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(8, WIDTH), norm(WIDTH)
        self.a, self.b, self.head = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.b(self.a(self.norm(x)).relu()))


def images(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), norm(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, 5, 3))


def costs_are_exact(network: Network, x: Tensor) -> nn.Module:
    selection = halved(network, [group.name for group in network.groups])
    small = cut(network, selection).eval()
    costs = network.cost_model.costs({name: len(kept) for name, kept in selection.items()})
    assert costs["macs"] == count_macs(cut(network, selection), (x,))
    assert costs["params"] == count_params(small)
    assert costs["size_bytes"] == count_bytes(small)
    return small


@pytest.mark.parametrize("norm", TOKEN_NORMS)
def test_a_norm_over_a_residual_width_follows_it_and_is_approximate(norm: Callable[[int], nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    network = trace(Tokens(norm).eval(), x)
    assert network.broken == {}
    assert [group.name for group in network.groups] == ["stem", "a"]
    assert network.group("stem").approximate is not None
    assert network.group("a").approximate is None
    costs_are_exact(network, x)(x)


@pytest.mark.parametrize(("norm", "exact"), IMAGE_NORMS)
def test_a_norm_over_images_follows_its_channels(norm: Callable[[int], nn.Module], exact: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    network = trace(images(norm).eval(), x)
    assert network.broken == {}
    assert (network.group("0").approximate is None) == exact
    small = costs_are_exact(network, x)
    # Warnings are errors here: InstanceNorm warns where its number of channels is another one.
    with torch.no_grad():
        output = small(x)
    if exact:
        selection = halved(network, ["0"])
        with torch.no_grad():
            assert relative_error(output, masked_twin(network, selection).eval()(x)) < 1e-4
        written = {"num_features", "num_channels", "num_groups"} & vars(small.get_submodule("1")).keys()
        assert {getattr(small.get_submodule("1"), name) for name in written} == {len(selection["0"])}


def test_groups_of_several_channels_lose_the_same_channels_each() -> None:
    network = trace(images(lambda n: nn.GroupNorm(4, n)).eval(), torch.randn(2, 3, 8, 8))
    assert network.group("0").size == WIDTH // 4
    small = cut(network, {"0": torch.arange(2).numpy()})
    norm = small.get_submodule("1")
    assert (norm.num_groups, norm.num_channels) == (4, 8)


def test_numbers_that_only_happen_to_be_the_width_stay() -> None:
    network = trace(Tokens(ShapeNorm).eval(), torch.randn(2, 5, 8))
    small = cut(network, {"stem": torch.arange(10).numpy()})
    norm = small.get_submodule("norm")
    assert norm.shape == torch.Size([10])
    assert type(norm.shape) is torch.Size
    assert norm.others == [WIDTH, 3]


@pytest.mark.parametrize("norm", [TOKEN_NORMS[1], TOKEN_NORMS[4], IntegerNorm, ShapeNorm])
def test_a_narrower_norm_without_weights_comes_back_from_disk(norm: Callable[[int], nn.Module], tmp_path: Path) -> None:
    x = torch.randn(2, 5, 8)
    network = trace(Tokens(norm).eval(), x)
    selection = halved(network, ["stem", "a"])
    small = cut(network, selection).eval()
    save_model(tmp_path / "model", small, model_document(network, None, selection, {}, {}))
    back = load(tmp_path / "model", lambda: Tokens(norm))
    with torch.no_grad():
        assert torch.equal(back(x), small(x))
