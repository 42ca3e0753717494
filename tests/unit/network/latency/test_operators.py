"""Operators beside the common layers: gating, shuffles, products written by hand, statistics, indices, weights.

Each is shown on a tiny network that is pruned and compared with its masked twin.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from autoprune.errors import TraceError
from autoprune.network import trace
from autoprune.network.artifacts.saved import model_document, save_model, shrink_to
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.twin import relative_error

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """A convolution, an operation on what it makes, and a convolution that reads the result."""

    def __init__(self, operation, *, made=8, read=8, **modules):
        super().__init__()
        self.first = nn.Conv2d(3, made, 3, padding=1)
        self.last = nn.Conv2d(read, 6, 1)
        self.head = nn.Linear(6, 4)
        self.operation = operation
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        y = self.operation(self, self.first(x))
        return self.head(F.relu(self.last(y)).mean((2, 3)))


class Sequence(nn.Module):
    """The same for sequences `(B, T, C)`, with linear layers."""

    def __init__(self, operation, *, made=8, read=8, **modules):
        super().__init__()
        self.first, self.last, self.head = nn.Linear(5, made), nn.Linear(read, 6), nn.Linear(6, 3)
        self.operation = operation
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.head(F.relu(self.last(self.operation(self, self.first(x)))))


T = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1))


def sizes(network):
    return {group.name: group.size for group in network.groups}


def reason(network, name):
    return next(f.reason for f in network.frozen if f.name == name)


# --- followed exactly: (operation, channels made, channels read, size of the group of `first`) --------------------

FOLLOWED = {
    "glu": (lambda m, y: F.glu(y, 1), 8, 4, 4),
    "glu by a negative dimension": (lambda m, y: F.glu(y, dim=-3), 8, 4, 4),
    "chunk into three": (lambda m, y: sum(y.chunk(3, 1)), 9, 3, 3),
    "pixel shuffle": (lambda m, y: F.pixel_shuffle(y, 2), 8, 2, 2),
    "pixel unshuffle": (lambda m, y: F.pixel_unshuffle(y, 2), 4, 16, 4),
    "space to depth by hand": (
        lambda m, y: torch.cat([y[..., ::2, ::2], y[..., 1::2, ::2], y[..., ::2, 1::2], y[..., 1::2, 1::2]], 1),
        4,
        16,
        4,
    ),
    "channel shuffle": (lambda m, y: torch.channel_shuffle(y, 2), 8, 8, 4),
    "unfold": (lambda m, y: F.unfold(y, 3, padding=1).view(y.shape[0], -1, *y.shape[2:]), 4, 36, 4),
    "fold of unfold": (lambda m, y: F.fold(F.unfold(y, 3, padding=1), y.shape[2:], 3, padding=1), 4, 4, 4),
    "repeat_interleave": (lambda m, y: y.repeat_interleave(2, dim=1), 4, 8, 4),
    "tile": (lambda m, y: y.tile(1, 2, 1, 1), 4, 8, 4),
    "movedim there and back": (lambda m, y: y.movedim(1, -1).exp().movedim(3, 1), 8, 8, 8),
    "stack and sum": (lambda m, y: torch.stack([y, y.sin()], dim=1).sum(1), 8, 8, 8),
    "stack and unbind": (lambda m, y: torch.maximum(*torch.stack([y, y.sin()]).unbind(0)), 8, 8, 8),
    "flatten and unflatten": (lambda m, y: (y.flatten(1) * 2).view(y.shape[0], -1, 8, 8), 8, 8, 8),
    "interpolate": (lambda m, y: F.interpolate(y, scale_factor=2.0, mode="bicubic", align_corners=True), 8, 8, 8),
    "interpolate by size": (lambda m, y: F.interpolate(y, size=(5, 9), mode="nearest-exact"), 8, 8, 8),
    "antialiased": (lambda m, y: F.interpolate(y, size=(4, 4), mode="bilinear", antialias=True), 8, 8, 8),
    "area": (lambda m, y: F.interpolate(y, size=(4, 4), mode="area"), 8, 8, 8),
    "adaptive pools": (lambda m, y: F.adaptive_avg_pool2d(y, (3, 2)) + F.adaptive_max_pool2d(y, (3, 2)), 8, 8, 8),
    "lp pool": (lambda m, y: F.lp_pool2d(y.abs() + 1, 2, 2), 8, 8, 8),
    "max pool with indices": (lambda m, y: F.max_pool2d(y, 2, return_indices=True)[0], 8, 8, 8),
    "circular padding": (lambda m, y: F.pad(y, (1, 1, 1, 1), mode="circular"), 8, 8, 8),
    "replicated padding": (lambda m, y: F.pad(y, (1, 0, 0, 1), mode="replicate"), 8, 8, 8),
    "statistics over space": (
        lambda m, y: y / (y.std((2, 3), keepdim=True) + y.norm(dim=(2, 3), keepdim=True) + y.var((2, 3), keepdim=True)),
        8,
        8,
        8,
    ),
    "softmax over space": (lambda m, y: y * y.flatten(2).softmax(-1).view_as(y), 8, 8, 8),
    "logsumexp over space": (lambda m, y: y - y.logsumexp((2, 3), keepdim=True), 8, 8, 8),
    "maximum over a dimension of space": (lambda m, y: y - y.max(3, keepdim=True).values, 8, 8, 8),
    "maximum of two": (lambda m, y: torch.max(y, -y) + torch.min(input=y, other=y * 2), 8, 8, 8),
    "cumsum over space": (lambda m, y: y.cumsum(2).cumsum(dim=3), 8, 8, 8),
    "masked fill": (lambda m, y: y.masked_fill(y < 0.1, 0.5), 8, 8, 8),
    "where": (lambda m, y: torch.where(y > 0, y, -0.1 * y), 8, 8, 8),
    "copy into zeros of its shape": (lambda m, y: torch.zeros_like(y).copy_(y), 8, 8, 8),
    "clamp and lerp": (lambda m, y: torch.lerp(y.clamp(-1, 1), y, 0.3), 8, 8, 8),
    "addcmul": (lambda m, y: torch.addcmul(y, y, y, value=0.5), 8, 8, 8),
    "einsum as a permutation": (lambda m, y: torch.einsum("bchw->bcwh", y), 8, 8, 8),
    "gate by einsum": (lambda m, y: torch.einsum("bchw,bc->bchw", y, y.mean((2, 3)).sigmoid()), 8, 8, 8),
    "gram matrix times itself": (
        lambda m, y: torch.einsum("bcs,bst->bct", y.flatten(2), torch.ones(2, 64, 64) / 64).view(2, -1, 8, 8),
        8,
        8,
        8,
    ),
    "rows picked in space": (lambda m, y: y.index_select(2, torch.tensor([0, 3, 5])), 8, 8, 8),
    "indexed in space": (lambda m, y: y[:, :, torch.tensor([0, 3, 5])], 8, 8, 8),
    "grid sample": (lambda m, y: F.grid_sample(y, torch.zeros(2, 4, 4, 2) + 0.1, align_corners=False), 8, 8, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_operator_is_followed_exactly(exact, name):
    operation, made, read, group = FOLLOWED[name]
    network = exact(Between(operation, made=made, read=read), X)
    assert sizes(network) == {"first": group, "last": 6}
    assert network.notes == ()


SEQUENCES = {
    "mm by a parameter": (lambda m, y: y @ m.own.weight.T, {"first": 8, "own": 8, "last": 6}),
    "addmm": (
        lambda m, y: torch.addmm(m.own.bias, y.flatten(0, 1), m.own.weight.t()).view(2, 7, -1),
        {"first": 8, "own": 8, "last": 6},
    ),
    "einsum with a parameter": (
        lambda m, y: torch.einsum("btc,oc->bto", y, m.own.weight),
        {"first": 8, "own": 8, "last": 6},
    ),
    "einsum with an ellipsis": (
        lambda m, y: torch.einsum("...c,oc->...o", y, m.own.weight),
        {"first": 8, "own": 8, "last": 6},
    ),
    "by name": (
        lambda m, y: F.linear(input=y, weight=m.own.weight, bias=m.own.bias),
        {"first": 8, "own": 8, "last": 6},
    ),
    "glu over the last dimension": (lambda m, y: F.glu(torch.cat([y, y.sin()], -1)), {"first": 8, "last": 6}),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_products_written_by_hand_are_layers(exact, name):
    operation, expected = SEQUENCES[name]
    assert sizes(exact(Sequence(operation, own=nn.Linear(8, 8)), T)) == expected


def test_a_matrix_that_is_a_bare_parameter_is_a_layer(exact):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(8, 3))

        def forward(self, x):
            return torch.matmul(torch.relu(x @ self.first), self.second)

    assert sizes(exact(Bare(), T)) == {"first": 8}


def test_the_channels_of_an_embedding_bag_are_pruned_and_its_vocabulary_stays(exact):
    model = nn.Sequential(nn.EmbeddingBag(11, 8, mode="mean"), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    network = exact(model, torch.randint(0, 11, (2, 4)))
    assert sizes(network) == {"0": 8, "1": 6}


# --- approximate: channels share a statistic ----------------------------------------------------------------------

SHARED = {
    "F.normalize": lambda m, y: F.normalize(y, dim=1),
    "root mean square": lambda m, y: y * torch.rsqrt(y.pow(2).mean(1, keepdim=True) + 1e-5),
    "rms_norm": lambda m, y: F.rms_norm(y.permute(0, 2, 3, 1), (y.shape[1],)).permute(0, 3, 1, 2),
    "standardised": lambda m, y: (y - y.mean(1, keepdim=True)) / y.std(1, keepdim=True),
    "spatial attention": lambda m, y: y * torch.sigmoid(m.gate(torch.cat([y.mean(1, True), y.amax(1, True)], 1))),
    "efficient channel attention": lambda m, y: y * m.eca(y.mean((2, 3)).unsqueeze(1)).sigmoid().view(2, -1, 1, 1),
}


@pytest.mark.parametrize("name", SHARED)
def test_channels_that_share_a_statistic_are_pruned_and_marked_approximate(exact, name):
    modules = {"gate": nn.Conv2d(2, 1, 3, padding=1), "eca": nn.Conv1d(1, 1, 3, padding=1)}
    network = exact(Between(SHARED[name], **modules), X, twin=False)
    assert sizes(network) == {"first": 8, "last": 6}
    assert network.group("first").approximate
    assert network.group("last").approximate is None


# --- frozen, with the reason --------------------------------------------------------------------------------------

FROZEN = {
    "reduced over channels": lambda m, y: y * y.sum(1).unsqueeze(1).sin(),
    "normalised over channels": lambda m, y: y.softmax(1),
    "summed up over channels": lambda m, y: y.cumsum(1),
    "taken apart one by one": lambda m, y: torch.stack(y.unbind(1), 1),
    "looked up by number": lambda m, y: y[:, torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])],
    "cut into windows": lambda m, y: y.unfold(1, 8, 1).squeeze(1).permute(0, 3, 1, 2),
    "no rule for the operator aten.sort": lambda m, y: y.sort(1).values,
    "no rule for the operator aten.gather": lambda m, y: y.gather(1, torch.zeros(2, 8, 8, 8, dtype=torch.long)),
    "no rule for the operator aten.scatter": lambda m, y: y.scatter(1, torch.zeros(2, 1, 8, 8, dtype=torch.long), 0.5),
    "a tensor of fixed width": lambda m, y: torch.arange(8.0).view(1, 8, 1, 1).expand(2, 8, 8, 8).clone().copy_(y),
    "filters them by a constant": lambda m, y: F.conv2d(y, torch.ones(8, 1, 3, 3) / 9, padding=1, groups=8),
}


@pytest.mark.parametrize("expected", FROZEN)
def test_what_cannot_be_followed_is_frozen_and_says_why(exact, expected):
    network = exact(Between(FROZEN[expected]), X, shows=True)
    assert sizes(network) == {"last": 6}
    assert expected in reason(network, "first")


def test_writing_into_part_of_a_tensor_joins_what_is_written_with_what_was_there(exact):
    def write(m, y):
        z = m.other(y) * 2
        z[:, :4] = y[:, :4]
        return z

    network = trace(Between(write, other=nn.Conv2d(8, 8, 1)), X)
    assert "last" in sizes(network)
    for group in network.groups:
        assert group.approximate is None


# --- weights that are computed ------------------------------------------------------------------------------------


class Standardised(nn.Conv2d):
    """Weight standardisation as NFNets write it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, weight=self.gain.view(-1), training=True, momentum=0.0)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


def test_a_standardised_weight_loses_filters_exactly_and_inputs_approximately(exact):
    body = nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), Standardised(6, 4, 1))
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    network = exact(model, X, twin=False)
    assert sizes(network) == {"0.0": 8, "0.2": 6, "0.4": 4}
    assert [group.approximate is None for group in network.groups] == [True, False, True]


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm], ids=lambda f: f.__name__
)
def test_a_parametrised_weight_is_pruned_or_frozen_but_never_wrong(wrap):
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), wrap(nn.Conv2d(8, 6, 1)), nn.ReLU(), nn.Conv2d(6, 4, 1))
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    network = trace(model, X)
    names = {*sizes(network), *(f.name for f in network.frozen)}
    assert "0.0" in names
    assert "0.4" in sizes(network)


def test_a_network_in_which_all_is_frozen_says_why():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = nn.Linear(5, 4)

        def forward(self, x):
            return self.only(x).sort(-1).values

    with pytest.raises(TraceError, match=r"only \(4\): no rule for the operator aten.sort"):
        trace(Sorted(), T)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_transposed_convolution_loads_back(tmp_path, select, output, groups):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2, stride=2, groups=groups), nn.Conv2d(8, 2, 1)
        )

    network = trace(build(), X)
    selection = select(network)
    small = cut(network, selection)
    document = model_document(network, None, selection, {}, {})
    save_model(tmp_path / "m", small, document)
    back = shrink_to(build(), tmp_path / "m", document)
    assert relative_error(output(back, X), output(small, X)) < 1e-6
