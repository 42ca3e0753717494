"""MACs of whole architectures against the formulas of their papers, worked out by hand."""

import pytest
import torch
from torch import nn

from autoprune.network.models.building import build_model
from autoprune.network.tracing.trace import trace


def macs(name, size):
    model = build_model(name=name, arguments={}, num_classes=1000, seed=0).eval()
    return trace(model, torch.zeros(2, 3, size, size), verify=False).cost_model.dense()["macs"]


@pytest.mark.slow
def test_macs_of_vit_b_16_are_those_of_its_formula():
    tokens, width, hidden = 14 * 14 + 1, 768, 3072
    layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden
    expected = 14 * 14 * width * 3 * 16 * 16 + 12 * layer + width * 1000
    assert macs("vit_b_16", 224) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_macs_of_swin_t_are_those_of_its_formula():
    expected, tokens, width = 56 * 56 * 96 * 3 * 4 * 4, 56 * 56, 96
    for stage, depth in enumerate((2, 2, 6, 2)):
        block = 4 * tokens * width**2 + 2 * tokens * 49 * width + 2 * tokens * width * 4 * width
        expected += depth * block
        if stage < 3:
            tokens, width = tokens // 4, 2 * width
            expected += tokens * 2 * width * width  # four neighbours of half the width become one of twice that
    assert macs("swin_t", 224) == pytest.approx(expected + width * 1000, rel=1e-3)


@pytest.mark.parametrize(("directions", "layers"), [(1, 1), (2, 2)])
def test_macs_of_an_lstm_are_four_gates_of_inputs_and_states_a_step(directions, layers):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 10, layers, batch_first=True, bidirectional=directions == 2)
            self.head = nn.Linear(10 * directions, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    steps, hidden = 9, 10
    expected = steps * directions * 4 * hidden * (6 + hidden)
    expected += (layers - 1) * steps * directions * 4 * hidden * (directions * hidden + hidden)
    found = trace(Rows().eval(), torch.zeros(2, steps, 6)).cost_model.dense()["macs"]
    assert found == expected + directions * hidden * 3
