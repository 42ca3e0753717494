"""Layers that run in training alone: they fit after the cut, or what they read stays."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from autoprune.network.artifacts.saved import load, model_document, save_model
from autoprune.network.graph.network import Network
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.twin import masked_twin, relative_error
from autoprune.network.tracing.counting import count_bytes, count_macs, count_params
from autoprune.network.tracing.trace import trace
from autoprune.network.tracing.verify import halved


class Auxiliary(nn.Module):
    """A head of convolution, norm and a flattened linear layer with a hidden width of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(channels, 6, 1), nn.BatchNorm2d(6), nn.Linear(6 * 4, 5)
        self.scale = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.fc(nn.functional.adaptive_avg_pool2d(self.norm(self.conv(x)).relu(), 2).flatten(1))


class Deep(nn.Module):
    def __init__(self, *, raw: bool = False, targets: bool = False) -> None:
        super().__init__()
        self.raw, self.targets = raw, targets
        self.one, self.two, self.three = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 20, 1)
        self.drop, self.aux, self.head = nn.Dropout(0.5), Auxiliary(16), nn.Linear(20, 5)
        self.unused = nn.Linear(3, 4)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        early = self.one(x).relu()
        late = self.two(early).relu()
        out = self.head(self.drop(self.three(late).relu().mean((2, 3))))
        if not self.training:
            return out
        if self.targets:
            assert target is not None
        return (out, self.aux(early), late) if self.raw else (out, self.aux(early))


X = torch.randn(4, 3, 9, 9)


def halved_exactly(network: Network) -> nn.Module:
    selection = halved(network, [group.name for group in network.groups])
    small = cut(network, selection).eval()
    costs = network.cost_model.costs({name: len(kept) for name, kept in selection.items()})
    assert (costs["params"], costs["size_bytes"]) == (count_params(small), count_bytes(small))
    assert costs["macs"] == count_macs(small, (X,))
    with torch.no_grad():
        exact = {name: kept for name, kept in selection.items() if not network.group(name).approximate}
        pruned, twin = cut(network, exact).eval(), masked_twin(network, exact).eval()
        assert relative_error(pruned(X), twin(X)) < 1e-5
    return small


def test_a_head_of_the_training_alone_loses_the_inputs_that_its_producer_loses(tmp_path: Path) -> None:
    network = trace(Deep().eval(), X)
    assert {group.name: group.size for group in network.groups} == {"one": 16, "two": 24, "three": 20}
    small = halved_exactly(network)
    narrow = small.get_submodule("one").out_channels
    assert small.get_submodule("aux.conv").weight.shape == (6, narrow, 1, 1)
    assert small.get_submodule("aux.scale").normalized_shape == (narrow,)
    out, aux = small.train()(X)
    (out.sum() + aux.sum()).backward()
    assert all(p.grad is not None for name, p in small.named_parameters() if not name.startswith("unused"))
    selection = halved(network, [group.name for group in network.groups])
    save_model(tmp_path / "model", small, model_document(network, None, selection, {}, {}))
    back = load(tmp_path / "model", Deep)
    with torch.no_grad():
        assert torch.equal(back(X), small.eval()(X))
    assert back.train()(X)[1].shape == (4, 5)


def test_what_training_alone_gives_out_stays_and_says_so() -> None:
    network = trace(Deep(raw=True).eval(), X)
    assert {group.name for group in network.groups} == {"one", "three"}
    assert {frozen.name: frozen.reason for frozen in network.frozen}["two"] == "the model's output in training"
    assert halved_exactly(network).train()(X)[2].shape[1] == 24


def test_a_network_that_cannot_be_run_in_training_is_traced_as_before() -> None:
    network = trace(Deep(targets=True).eval(), X)
    assert {group.name for group in network.groups} == {"one", "two", "three"}
    halved_exactly(network)(X)


class Literal(nn.Module):
    """Reads its head's inputs by a number in the code, in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux = nn.Linear(9, 16), nn.Linear(16, 12), nn.Linear(16, 2)
        self.out = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.a(x).relu()
        out = self.out(self.b(y).relu())
        return (out, self.aux(y.reshape(-1, 16))) if self.training else out


def test_what_breaks_in_training_is_frozen_with_the_reason() -> None:
    x = torch.randn(2, 9)
    network = trace(Literal().eval(), x)
    assert [group.name for group in network.groups] == ["b"]
    assert "does not run in training" in {frozen.name: frozen.reason for frozen in network.frozen}["a"]
    cut(network, halved(network, ["b"])).train()(x)


def test_tracing_leaves_statistics_modes_and_random_numbers_alone() -> None:
    model = Deep().train()
    model.one.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    trace(model, X)
    assert torch.equal(torch.rand(1), expected)
    assert (model.training, model.one.training, model.aux.training) == (True, False, True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
