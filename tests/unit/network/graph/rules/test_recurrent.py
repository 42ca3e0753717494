"""Recurrent modules: hidden units go from every gate, layer, direction and consumer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.network.artifacts.layers import layer_table
from autoprune.network.artifacts.saved import load, model_document, save_model
from autoprune.network.graph.network import Network
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.twin import masked_twin, relative_error
from autoprune.network.tracing.counting import count_bytes, count_macs, count_params
from autoprune.network.tracing.trace import trace
from autoprune.network.tracing.verify import halved

CASES = [
    (cls, options)
    for cls in (nn.LSTM, nn.GRU, nn.RNN)
    for options in (
        {},
        {"num_layers": 2, "bidirectional": True},
        {"bias": False},
        {"batch_first": False},
        {"proj_size": 6},
        {"num_layers": 2, "bidirectional": True, "proj_size": 6},
    )
    if cls is nn.LSTM or "proj_size" not in options
]


class Reader(nn.Module):
    def __init__(self, cls: type[nn.RNNBase], options: dict[str, object]) -> None:
        super().__init__()
        self.batch_first = bool(options.get("batch_first", True))
        self.embed = nn.Linear(8, 12)
        self.cells = cls(12, 16, **{"batch_first": True, **options})
        width = int(options.get("proj_size", 16)) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, _ = self.cells(self.embed(x).relu())
        return self.head(out[:, -1] if self.batch_first else out[-1])


def traced(cls: type[nn.RNNBase], options: dict[str, object]) -> tuple[Network, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8)
    return trace(Reader(cls, options).eval(), x), x


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_a_pruned_recurrent_network_is_its_masked_twin_and_costs_what_was_predicted(
    cls: type[nn.RNNBase], options: dict[str, object]
) -> None:
    network, x = traced(cls, options)
    names = [group.name for group in network.groups]
    assert {"embed", "cells"} <= set(names)
    assert network.broken == {}
    selection = halved(network, names)
    small = cut(network, selection).eval()
    with torch.no_grad():
        assert relative_error(small(x), masked_twin(network, selection).eval()(x)) < 1e-5
    costs = network.cost_model.costs({name: len(kept) for name, kept in selection.items()})
    assert costs["macs"] == count_macs(small, (x,))
    assert costs["params"] == count_params(small)
    assert costs["size_bytes"] == count_bytes(small)
    assert small.get_submodule("cells").hidden_size == len(selection["cells"])
    assert small.get_submodule("cells").input_size == len(selection["embed"])


def test_every_gate_keeps_the_same_units() -> None:
    network, _ = traced(nn.LSTM, {})
    kept = np.array([1, 4, 9])
    small = cut(network, {"cells": kept})
    dense_weight = network.model.get_parameter("cells.weight_hh_l0").reshape(4, 16, 16)
    expected = dense_weight[:, kept][:, :, kept].reshape(12, 3)
    assert torch.equal(small.get_parameter("cells.weight_hh_l0"), expected)


def test_a_pruned_recurrent_network_trains_and_loads_back(tmp_path: object) -> None:
    from pathlib import Path

    network, x = traced(nn.LSTM, {"num_layers": 2})
    selection = halved(network, ["cells"])
    small = cut(network, selection).train()
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    folder = Path(str(tmp_path)) / "model"
    save_model(folder, small, model_document(network, None, selection, {}, {}))
    back = load(folder, lambda: Reader(nn.LSTM, {"num_layers": 2}))
    with torch.no_grad():
        assert torch.equal(back(x), small.eval()(x))


def test_a_state_given_from_outside_freezes_the_units() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 12)
            self.cells = nn.GRU(12, 16, batch_first=True)
            self.head = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
            return self.head(self.cells(self.embed(x), state)[0][:, -1])

    network = trace(Stateful().eval(), (torch.randn(2, 6, 8), torch.randn(1, 2, 16)))
    assert [group.name for group in network.groups] == ["embed"]
    reasons = {frozen.name: frozen.reason for frozen in network.frozen}
    assert "initial state of cells is given from outside" in reasons["cells"]


def test_the_layer_table_counts_hidden_units_once_and_every_parameter() -> None:
    network, _ = traced(nn.LSTM, {"num_layers": 2, "bidirectional": True})
    rows = {row["module"]: row for row in layer_table(network, halved(network, ["cells"]))}
    assert (rows["cells"]["width_before"], rows["cells"]["width_after"]) == (16, 8)
    assert sum(row["params_before"] for row in rows.values()) == count_params(network.model)
    assert sum(row["macs_before"] for row in rows.values()) == network.cost_model.dense()["macs"]
