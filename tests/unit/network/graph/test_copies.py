"""Copies that have a model's own tensors, and whether a model runs on images that lie channels-last."""

import pytest
import torch
from torch import nn

import autoprune
from autoprune.errors import TraceError
from autoprune.network.graph.copies import channels_last, held_tensors, runs_channels_last, sharing_copy


class Keeping(nn.Module):
    """Keeps what it computed on itself, over a class attribute, in a list and in a dict."""

    grid = torch.empty(0)

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.seen: list = []
        self.sizes: dict = {}

    def forward(self, x):
        y = self.out(self.conv(x).relu())
        if self.grid.numel() != y.shape[-1]:
            self.grid = torch.arange(y.shape[-1], dtype=x.dtype)
        self.seen.append(y)
        self.sizes["last"] = y.mean()
        return y + self.grid


X = torch.randn(2, 3, 8, 8)


def test_a_trace_leaves_nothing_behind_in_the_model():
    model = Keeping().eval()
    before = dict(vars(model))
    autoprune.prune(autoprune.trace(model, X), 0.5)
    assert vars(model).keys() == before.keys()
    assert model.seen == []
    assert model.sizes == {}
    assert type(model(X)) is torch.Tensor


def test_a_trace_that_fails_leaves_nothing_behind_either():
    class Failing(Keeping):
        def forward(self, x):
            y = super().forward(x)
            return y[: int(y.sum())]

    model = Failing().train()
    with pytest.raises(TraceError):
        autoprune.trace(model, X)
    assert model.seen == []
    assert "grid" not in vars(model)
    assert all(module.training for module in model.modules())


def test_a_copy_shares_every_tensor_and_nothing_else():
    model = Keeping()
    model(X)  # with gradients: what it keeps is no leaf, which deepcopy alone refuses
    twin = sharing_copy(model)
    assert twin.conv.weight is model.conv.weight
    assert twin.seen[0] is model.seen[0]
    assert twin.sizes["last"] is model.sizes["last"]
    assert twin.seen is not model.seen
    assert twin.conv is not model.conv
    assert {id(t) for t in held_tensors(model)} == {id(t) for t in held_tensors(twin)}


def test_a_frozen_copy_wants_no_gradients_and_has_the_same_memory():
    model = nn.Linear(3, 3)
    model.tied = model.weight
    twin = sharing_copy(model, frozen=True)
    assert not any(p.requires_grad for p in twin.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert twin.weight.data_ptr() == model.weight.data_ptr()
    assert twin.tied is twin.weight


class Viewing(nn.Module):
    def __init__(self, flat):
        super().__init__()
        self.conv, self.head, self.flat = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 5), flat

    def forward(self, x):
        return self.head(self.flat(self.conv(x).relu()))


def viewed(y):
    return y.view(y.size(0), -1)


def strided(y):
    y = y + 0.0
    return y.as_strided((y.size(0), y[0].numel()), (y.stride(0), 1))


@pytest.mark.parametrize(
    ("flat", "runs"),
    [(viewed, False), (strided, False), (lambda y: y.flatten(1), True), (lambda y: y.reshape(y.size(0), -1), True)],
    ids=["view", "as_strided", "flatten", "reshape"],
)
def test_code_that_depends_on_how_images_lie_is_told_from_code_that_does_not(flat, runs):
    model = Viewing(flat).eval()
    weights = model.conv.weight.stride()
    assert runs_channels_last(model, (X,)) is runs
    assert model.conv.weight.stride() == weights
    if flat is not strided:  # which has no rule, so that nothing is left to prune
        assert autoprune.trace(model, X).channels_last is runs


def test_calibrated_pruning_behind_a_view_gives_what_a_flatten_gives():
    x = torch.randn(64, 3, 8, 8)
    first, second = Viewing(viewed), Viewing(lambda y: y.flatten(1))
    second.load_state_dict(first.state_dict())
    outputs = [autoprune.prune(autoprune.trace(m.eval(), x[:2]), 0.5, calibration=[x])(x) for m in (first, second)]
    assert torch.allclose(*outputs, atol=1e-4)


def test_only_four_dimensions_are_laid_out():
    assert channels_last(X).is_contiguous(memory_format=torch.channels_last)
    tokens = torch.arange(6).reshape(2, 3)
    assert channels_last(tokens) is tokens
