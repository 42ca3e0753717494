"""What refits read at drawn positions."""

import pytest
import torch
from torch import nn

from autoprune.network.calibration.patches import patch_rows, tap_entries, tap_major, weight_of


def images(count=2, size=7, channels=3):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def order(count, seed=0):
    """The positions in the order in which they are drawn."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_patches_times_weights_are_the_layers_output(convolution_options, memory):
    layer, x = nn.Conv2d(3, 6, 3, bias=False, **convolution_options), images().contiguous(memory_format=memory)
    rows = patch_rows(layer, x, 10**6, 0)  # (G, rows, taps * C/G)
    found = torch.cat(list((rows @ tap_major(layer.weight.detach(), rows.shape[0])).unbind(0)), 1)
    expected = layer(x).detach().movedim(1, -1).reshape(-1, 6)
    torch.testing.assert_close(found, expected[order(len(expected))], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_patches_of_other_ranks_are_right_too(rank):
    layer = getattr(nn, f"Conv{rank}d")(2, 4, 3, stride=2, padding=1, bias=False)
    x = torch.randn(2, 2, *[5] * rank)
    found = patch_rows(layer, x, 10**6, 0)[0] @ tap_major(layer.weight.detach(), 1)[0]
    expected = layer(x).detach().movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(found, expected[order(len(expected))], atol=1e-5, rtol=1e-5)


def test_a_seed_draws_the_same_positions_whatever_the_number_of_channels_and_the_type():
    x = images(channels=6)
    wide, narrow = nn.Conv2d(6, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
    whole = patch_rows(wide, x, 50, 3)[0].view(50, 9, 6)
    part = patch_rows(narrow, x[:, [1, 4]].bfloat16(), 50, 3)[0].view(50, 9, 2)
    assert part.dtype == torch.bfloat16
    assert torch.equal(part, whole[:, :, [1, 4]].bfloat16())
    assert torch.equal(patch_rows(wide, x, 20, 3)[0].view(20, 9, 6), whole[:20])
    assert not torch.equal(patch_rows(wide, x, 50, 4)[0].view(50, 9, 6), whole)


def test_rows_of_a_linear_layer_are_drawn_without_repetition():
    layer, x = nn.Linear(2, 3), torch.arange(40.0).reshape(4, 5, 2)
    rows = patch_rows(layer, x, 7, 0)
    assert rows.shape == (1, 7, 2)
    assert len(rows[0].unique(dim=0)) == 7
    assert torch.equal(patch_rows(layer, x, 100, 0)[0, :7], rows[0])
    assert torch.equal(patch_rows(layer, x, 100, 0)[0], x.reshape(20, 2)[order(20)])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_weight_survives_the_order_of_its_entries(groups):
    weight = torch.randn(6, 4, 3, 2)
    assert torch.equal(weight_of(tap_major(weight, groups), weight.shape), weight)


def test_entries_of_channels_are_found_in_a_channel_major_patch():
    weight = torch.arange(24.0).reshape(1, 4, 2, 3)
    kept = weight[:, [0, 3]]
    assert torch.equal(weight.flatten()[tap_entries([0, 3], 6)], tap_major(kept, 1).flatten())


def test_what_is_read_is_memory_of_its_own():
    x = images().contiguous(memory_format=torch.channels_last)
    before = x.clone()
    patch_rows(nn.Conv2d(3, 6, 3, padding=1), x, 40, 0).zero_()
    assert torch.equal(x, before)
