"""Counts that PyTorch itself takes of a concrete network."""

import torch
from torch import nn

from autoprune.network.tracing.counting import count_bytes, count_macs, count_params


def test_macs_are_counted_for_one_sample_and_are_half_the_flops():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5))
    assert count_macs(model, (torch.zeros(3, 3, 4, 4),)) == 16 * 8 * 27 + 8 * 16 * 5


def test_fused_attention_is_counted_by_its_products():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    tokens, width, hidden = 5, 8, 16
    projections = 4 * tokens * width * width + 2 * tokens * width * hidden
    assert count_macs(layer, (torch.zeros(2, tokens, width),)) == projections + 2 * tokens * tokens * width


def test_constants_that_a_forward_pass_makes_or_holds_do_no_harm():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.held = nn.Linear(4, 3), torch.ones(4)

        def forward(self, x):
            return self.fc(x * self.held + torch.arange(4)) + torch.zeros(3)

    model = Constant()
    assert count_macs(model, (torch.zeros(2, 4),)) == 12
    assert model.held.device.type == "cpu"


def test_counting_leaves_the_model_and_its_mode_alone():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    count_macs(model, (torch.zeros(2, 4),))
    assert model.training
    assert model[1].training
    assert model[1].num_batches_tracked == 0
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_tied_tensors_count_once_and_buffers_only_as_bytes():
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    model = nn.Sequential(a, b, nn.BatchNorm1d(4))
    assert count_params(model) == 16 + 8
    assert count_bytes(model) == 4 * (16 + 8 + 8) + 8


def test_buffers_that_are_not_in_the_state_dict_do_not_count_as_its_bytes():
    model = nn.Linear(4, 4, bias=False)
    model.register_buffer("cache", torch.zeros(100), persistent=False)
    model.register_buffer("kept", torch.zeros(3))
    assert count_bytes(model) == 4 * (16 + 3) == sum(t.numel() * 4 for t in model.state_dict().values())
