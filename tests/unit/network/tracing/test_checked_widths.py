"""Code that checks its own widths: the attributes that it compares with them follow, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.network.artifacts.saved import load, model_document, save_model
from autoprune.network.graph.network import Network
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.narrowing import narrowed
from autoprune.network.surgery.twin import masked_twin, relative_error
from autoprune.network.tracing.cache import trace_or_read
from autoprune.network.tracing.counting import count_macs, count_params
from autoprune.network.tracing.trace import trace
from autoprune.network.tracing.verify import halved


class Asserting(nn.Module):
    """As the upsampling of diffusion U-Nets; `steps` only happens to be as large, and is read there too."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.steps, self.period = channels, channels, channels
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return self.conv(F.interpolate(x, scale_factor=2.0)) / self.steps


class Raising(nn.Module):
    """Checks what comes in and what goes out, both of one size, in a method and through a property."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_channels, self._out = channels, channels
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    @property
    def out_channels(self) -> int:
        return self._out

    def check(self, x: Tensor, width: int) -> None:
        if x.size(1) != width:
            raise ValueError(f"{x.size(1)} channels where {width} were expected")

    def forward(self, x: Tensor) -> Tensor:
        self.check(x, self.in_channels)
        y = self.norm(self.conv(x))
        if y.shape[1] != self.out_channels:
            raise RuntimeError("wrong output")
        return y


class Looking(nn.Module):
    """Looks at numbers, so that it does not run without them, and checks its width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.width, self.conv = channels, nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and bool(x.isnan().any()):
            raise ArithmeticError
        assert x.shape[1] == self.width, "width"
        return self.conv(x)


class Residual(nn.Module):
    """Takes another way where its two numbers differ: they must not follow, since nothing asks for it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inputs, self.outputs = channels, channels
        self.a, self.b = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        return x + y if self.inputs == self.outputs else y


def around(block: Callable[[int], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 24, 3), nn.SiLU(), block(24), nn.SiLU(), nn.Conv2d(24, 3, 3))


X = torch.randn(2, 3, 8, 8)


def exactly(network: Network) -> nn.Module:
    selection = halved(network, [group.name for group in network.groups])
    small = cut(network, selection).eval()
    with torch.no_grad():
        assert relative_error(small(X), masked_twin(network, selection).eval()(X)) < 1e-5
    costs = network.cost_model.costs({name: len(kept) for name, kept in selection.items()})
    assert (costs["macs"], costs["params"]) == (count_macs(cut(network, selection), (X,)), count_params(small))
    return small


@pytest.mark.parametrize("block", [Asserting, Raising, Looking])
def test_a_width_that_code_checks_follows_what_comes_in(block: Callable[[int], nn.Module]) -> None:
    network = trace(around(block).eval(), X)
    assert network.broken == {}
    assert {group.name: group.size for group in network.groups} == {"0": 24, "2.conv": 24}
    exactly(network)


def test_each_check_gets_the_width_that_it_is_about() -> None:
    network = trace(around(Raising).eval(), X)
    small = cut(network, {"0": np.arange(5), "2.conv": np.arange(11)}).get_submodule("2")
    assert (small.in_channels, small.out_channels) == (5, 11)


def test_numbers_that_no_check_is_about_stay() -> None:
    network = trace(around(Asserting).eval(), X)
    small = cut(network, {"0": np.arange(5), "2.conv": np.arange(11)}).get_submodule("2")
    assert (small.channels, small.steps, small.period) == (5, 24, 24)


def test_numbers_stay_where_nothing_breaks() -> None:
    network = trace(around(Residual).eval(), X)
    assert {group.name: group.size for group in network.groups} == {"0": 24, "2.a": 24}
    assert network.checked == ()
    small = exactly(network).get_submodule("2")
    assert (small.inputs, small.outputs) == (24, 24)


class Mixed(nn.Module):
    """A check that can be met behind one that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.strict, self.up = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 20, 1), Asserting(20)
        self.last = nn.Conv2d(20, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        assert y.shape[1] == 24
        return self.last(self.up(self.strict(y).relu()).relu())


def test_a_check_of_a_number_in_the_code_keeps_its_own_channels_alone() -> None:
    network = trace(Mixed().eval(), X)
    assert {group.name for group in network.groups} == {"strict", "up.conv"}
    assert "AssertionError" in {frozen.name: frozen.reason for frozen in network.frozen}["first"]
    exactly(network)


def test_a_network_with_checks_loads_back_and_is_cut_twice(tmp_path: Path) -> None:
    network = trace(around(Raising).eval(), X)
    selection = {"0": np.arange(9), "2.conv": np.arange(13)}
    small = cut(network, selection).eval()
    save_model(tmp_path / "model", small, model_document(network, None, selection, {}, {}))
    back = load(tmp_path / "model", lambda: around(Raising))
    again = cut(narrowed(network, selection, small), {"0": np.arange(4), "2.conv": np.arange(6)}).eval()
    with torch.no_grad():
        assert torch.equal(back(X), small(X))
        assert again(X).shape == (2, 3, 4, 4)


def test_a_kept_trace_knows_the_widths_that_are_checked(tmp_path: Path) -> None:
    first = trace_or_read(around(Asserting).eval(), X, pruning="channel", folder=tmp_path, note=print)
    files = list(tmp_path.iterdir())
    notes: list[str] = []
    second = trace_or_read(around(Asserting).eval(), X, pruning="channel", folder=tmp_path, note=notes.append)
    assert (len(files), notes) == (1, [])
    assert (
        [(c.module, c.name) for c in first.checked]
        == [(c.module, c.name) for c in second.checked]
        == [("2", "channels")]
    )
    exactly(second)
