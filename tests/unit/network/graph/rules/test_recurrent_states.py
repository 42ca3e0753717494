"""States of recurrent layers: from others, from parameters, out of nothing; and cells that code calls in a loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autoprune.network.artifacts.saved import load, model_document, save_model
from autoprune.network.graph.network import Network
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.twin import masked_twin, relative_error
from autoprune.network.tracing.counting import count_bytes, count_macs, count_params
from autoprune.network.tracing.trace import trace
from autoprune.network.tracing.verify import halved


class EncoderDecoder(nn.Module):
    def __init__(self, cls: type[nn.RNNBase], layers: int = 1) -> None:
        super().__init__()
        self.enc = cls(6, 10, num_layers=layers, batch_first=True)
        self.dec = cls(4, 10, num_layers=layers, batch_first=True)
        self.out = nn.Linear(10, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(self.dec(y, self.enc(x)[1])[0])


class BothWays(nn.Module):
    """The decoder starts from both directions of its encoder, through a layer that brings them together."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.bridge = nn.GRU(6, 8, batch_first=True, bidirectional=True), nn.Linear(16, 12)
        self.dec, self.out = nn.GRU(4, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        last = self.enc(x)[1]  # (2, B, 8)
        start = self.bridge(torch.cat([last[0], last[1]], -1)).tanh()
        return self.out(self.dec(y, start.unsqueeze(0))[0])


class Glued(nn.Module):
    """The decoder's state is that of both directions of its encoder, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.LSTM(6, 8, batch_first=True, bidirectional=True)
        self.dec, self.out = nn.LSTM(4, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h, c = (torch.cat([s[0], s[1]], -1).unsqueeze(0) for s in self.enc(x)[1])
        return self.out(self.dec(y, (h, c))[0])


class Learned(nn.Module):
    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(layers, 1, 12))
        self.cells, self.out = nn.GRU(4, 12, num_layers=layers, batch_first=True), nn.Linear(12, 3)

    def forward(self, y: Tensor) -> Tensor:
        return self.out(self.cells(y, self.start.expand(-1, y.size(0), -1).contiguous())[0])


class Zeros(nn.Module):
    """Zeros as wide as a number in the code, an attribute, or another tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.hidden, self.other = kind, 12, 12
        self.cells, self.out = nn.LSTM(4, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, y: Tensor) -> Tensor:
        if self.kind == "literal":
            zeros = torch.zeros(1, y.size(0), 12, device=y.device)
        elif self.kind == "attribute":
            zeros = y.new_zeros((1, len(y), self.hidden))
        elif self.kind == "moved":
            zeros = torch.zeros(size=(1, len(y), 12), device=y.device).to(y)
        elif self.kind == "layers":
            zeros = torch.full((3, len(y), 12), 0.0, device=y.device)[1].unsqueeze(0)
        else:
            first = self.cells(y)[1]
            zeros = torch.zeros_like(first[0])
        return self.out(self.cells(y, (zeros, zeros))[0])


class Loop(nn.Module):
    """Cells over time, with the state made by hand, by the cells, or by a layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.embed = kind, nn.Linear(4, 6)
        self.first, self.second, self.third = nn.LSTMCell(6, 12), nn.GRUCell(12, 10, bias=False), nn.RNNCell(10, 10)
        self.start, self.out = nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, y: Tensor) -> Tensor:
        h = c = y.new_zeros(y.size(0), 12)
        state, s = (h, c), self.start(y[:, 0]) if self.kind == "layer" else None
        r = None if s is None else torch.zeros_like(s)
        steps = []
        for t in range(y.size(1)):
            state = self.first(self.embed(y[:, t]).relu(), None if self.kind == "none" and t == 0 else state)
            s = self.second(state[0], s)
            r = self.third(s, r)
            steps.append(r)
        return self.out(torch.stack(steps, 1))


class ConvLSTM(nn.Module):
    """A recurrent layer as people write it: the state starts as zeros and is concatenated with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.gates, self.out = 6, nn.Conv2d(2 + 6, 4 * 6, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, _, height, width = x.shape
        h = torch.zeros(batch, self.hidden, height, width, device=x.device)
        c = torch.zeros(batch, self.hidden, height, width, device=x.device)
        for t in range(steps):
            i, f, o, g = self.gates(torch.cat([x[:, t], h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.out(h)


class OwnGRU(nn.Module):
    """A recurrent layer out of two linear layers, and a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.units, self.i, self.h = 8, nn.Linear(4, 16), nn.Linear(8, 16)
        self.w, self.out = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 2)

    def forward(self, y: Tensor) -> Tensor:
        h = y.new_zeros(len(y), self.units)
        for t in range(y.shape[1]):
            gate, new = (self.i(y[:, t]) + self.h(h)).chunk(2, -1)
            h = torch.lerp(new.tanh() @ self.w, h, gate.sigmoid())
        return self.out(h)


class Collected(nn.Module):
    """Outputs are written into zeros step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.mid, self.out = nn.GRUCell(4, 10), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, y: Tensor) -> Tensor:
        found, h = torch.zeros(y.size(0), y.size(1), 10, device=y.device), None
        for t in range(y.size(1)):
            h = self.cell(y[:, t], h)
            found[:, t] = h
        return self.out(self.mid(found).relu())


X, Y = torch.randn(2, 5, 6), torch.randn(2, 4, 4)
CASES: list[tuple[nn.Module, tuple[Tensor, ...], dict[str, int]]] = [
    *((EncoderDecoder(cls, layers), (X, Y), {"enc": 10}) for cls in (nn.LSTM, nn.GRU, nn.RNN) for layers in (1, 2)),
    (BothWays(), (X, Y), {"enc": 8, "bridge": 12}),
    (Glued(), (X, Y), {"enc": 8}),
    (Learned(), (Y,), {"cells": 12}),
    (Learned(2), (Y,), {"cells": 12}),
    *((Zeros(kind), (Y,), {"cells": 12}) for kind in ("literal", "attribute", "moved", "like")),
    *((Loop(kind), (Y,), {"embed": 6, "first": 12, "second": 10, "third": 10}) for kind in ("none", "zeros")),
    (Loop("layer"), (Y,), {"embed": 6, "first": 12, "start": 10}),
    (ConvLSTM(), (torch.randn(2, 3, 2, 5, 5),), {"gates": 6}),
    (OwnGRU(), (Y,), {"i": 8}),
    (Collected(), (Y,), {"cell": 10, "mid": 8}),
]


def halved_exactly(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Network, nn.Module]:
    network = trace(model.eval(), inputs)
    selection = halved(network, [group.name for group in network.groups])
    small = cut(network, selection).eval()
    with torch.no_grad():
        assert relative_error(small(*inputs), masked_twin(network, selection).eval()(*inputs)) < 1e-5
    costs = network.cost_model.costs({name: len(kept) for name, kept in selection.items()})
    assert costs["macs"] == count_macs(cut(network, selection), inputs)
    assert costs["params"] == count_params(small)
    assert costs["size_bytes"] == count_bytes(small)
    return network, small


@pytest.mark.parametrize(("model", "inputs", "groups"), CASES)
def test_hidden_units_go_with_the_states_that_they_start_from(
    model: nn.Module, inputs: tuple[Tensor, ...], groups: dict[str, int]
) -> None:
    network, _ = halved_exactly(model, inputs)
    assert network.broken == {}
    assert {group.name: group.size for group in network.groups} == groups


def test_the_attribute_that_makes_zeros_follows() -> None:
    _, small = halved_exactly(Zeros("attribute"), (Y,))
    assert small.hidden == small.get_submodule("cells").hidden_size == 6


def test_a_state_that_is_an_input_keeps_the_units_of_a_cell() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.cell, self.out = nn.Linear(4, 6), nn.GRUCell(6, 8), nn.Linear(8, 2)

        def forward(self, y: Tensor, h: Tensor) -> Tensor:
            return self.out(self.cell(self.embed(y), h))

    network = trace(Given().eval(), (torch.randn(2, 4), torch.randn(2, 8)))
    assert [group.name for group in network.groups] == ["embed"]
    assert "initial state of cell is given from outside" in {f.name: f.reason for f in network.frozen}["cell"]


def test_a_sequence_without_a_batch_is_pruned_too() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.out = nn.LSTM(4, 12), nn.Linear(12, 2)

        def forward(self, y: Tensor) -> Tensor:
            return self.out(self.cells(y)[1][0])

    halved_exactly(Single(), (torch.randn(5, 4),))


@pytest.mark.parametrize("kind", ["literal", "attribute"])
def test_told_zeros_come_back_from_disk_and_train(kind: str, tmp_path: Path) -> None:
    network = trace(Zeros(kind).eval(), Y)
    selection = halved(network, ["cells"])
    small = cut(network, selection).eval()
    save_model(tmp_path / "model", small, model_document(network, None, selection, {}, {}))
    back = load(tmp_path / "model", lambda: Zeros(kind))
    with torch.no_grad():
        assert torch.equal(back(Y), small(Y))
    back.train()(Y).sum().backward()
    assert all(p.grad is not None for p in back.parameters())


def test_a_norm_whose_width_is_written_into_the_code_is_told_it() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 24), nn.Conv1d(24, 16, 1), nn.Conv1d(16, 2, 1)

        def forward(self, y: Tensor) -> Tensor:
            wide = nn.functional.layer_norm(self.a(y), [24])
            return self.c(nn.functional.group_norm(self.b(wide.transpose(1, 2)), 16))

    network = trace(Written().eval(), Y)
    assert {group.name: group.size for group in network.groups} == {"a": 24, "b": 16}
    small = cut(network, halved(network, ["a", "b"]))
    with torch.no_grad():
        assert small(Y).shape == (2, 2, 4)
