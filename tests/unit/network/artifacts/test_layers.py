"""What a person is told about a traced network."""

import json

import numpy as np
import torch
from torch import nn

from autoprune.network.artifacts.layers import describe, layer_table
from autoprune.network.surgery.cut import cut
from autoprune.network.tracing.counting import count_macs, count_params
from autoprune.network.tracing.trace import trace
from autoprune.policy import Group

X = torch.zeros(2, 3, 8, 8)


def network():
    return trace(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
        ),
        X,
    )  # fmt: skip


def test_the_description_is_plain_json_and_tells_groups_shares_and_frozen_layers():
    traced = network()
    found = json.loads(json.dumps(describe(traced, [Group("0", 8, (2, 4, 8), "stage1")])))
    first, second = found["groups"]
    assert (first["name"], first["size"], first["widths"], first["scope"]) == ("0", 8, [2, 8], "stage1")
    assert (second["name"], second["widths"], second["scope"]) == ("3", None, None)
    assert found["dense"] == traced.cost_model.dense()
    assert found["input_shape"] == [3, 8, 8]
    assert found["narrowest"]["macs"] < found["dense"]["macs"]
    assert found["frozen"] == [{"name": "6", "size": 4, "reason": "the model's output"}]
    assert first["macs_share"] == 64 * (27 * 8 + 9 * 8 + 8 * 6) / found["dense"]["macs"]
    assert second["macs_share"] == (64 * 8 * 6 + 6 * 4) / found["dense"]["macs"]


def test_the_layers_before_and_after_add_up_to_the_two_networks():
    traced = network()
    selection = {"0": np.array([0, 3, 4]), "3": np.array([1, 5])}
    rows = layer_table(traced, selection)
    small = cut(traced, selection)
    assert [(r["module"], r["width_before"], r["width_after"]) for r in rows] == [
        ("0", 8, 3), ("2", 8, 3), ("3", 6, 2), ("6", 4, 4),
    ]  # fmt: skip
    assert sum(r["macs_before"] for r in rows) == count_macs(traced.model, (X,))
    assert sum(r["macs_after"] for r in rows) == count_macs(small, (X,))
    assert sum(r["params_before"] for r in rows) == count_params(traced.model)
    assert sum(r["params_after"] for r in rows) == count_params(small)


def test_nothing_selected_means_nothing_changed():
    assert all(r["width_before"] == r["width_after"] and r["macs_before"] == r["macs_after"]
               for r in layer_table(network(), {}))  # fmt: skip


def test_a_module_that_is_called_twice_has_one_row_with_both_products():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.b(self.a(x))))))

    traced = trace(Twice(), torch.zeros(2, 6))
    (row,) = [r for r in layer_table(traced, {"a": np.arange(4)}) if r["module"] == "b"]
    assert (row["macs_before"], row["macs_after"]) == (2 * 64, 2 * 16)
    assert (row["params_before"], row["params_after"]) == (72, 20)
