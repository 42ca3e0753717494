"""Networks as people write them: two inputs and dict outputs, tied weights, gates, packed sequences, masks, dispatch.

What is pruned equals its masked twin and costs what was predicted; what cannot be pruned says why in words.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from autoprune.errors import TraceError
from autoprune.network import trace
from autoprune.network.graph.modules import evaluating
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.twin import masked_twin, relative_error
from autoprune.network.tracing.counting import count_bytes, count_macs, count_params


class TwoInputs(nn.Module):
    """An image and a table in, a dict out."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.table = nn.Sequential(nn.Linear(5, 12), nn.ReLU())
        self.joint = nn.Linear(20, 16)
        self.heads = nn.ModuleDict({"label": nn.Linear(16, 4), "age": nn.Linear(16, 1)})

    def forward(self, image, table):
        both = torch.cat([self.image(image).flatten(1), self.table(table)], 1)
        hidden = F.gelu(self.joint(both))
        return {"label": self.heads["label"](hidden), "age": self.heads["age"](hidden).squeeze(1), "hidden": None}


class Tied(nn.Module):
    """A small language model whose head is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.block = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(self.norm(x + self.block(x)))


class Gated(nn.Module):
    """A U-Net with an attention gate on its skip connection."""

    def __init__(self):
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.gate_x, self.gate_g, self.psi = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 1, 1)
        self.out = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x):
        skip = F.relu(self.down(x))
        up = self.up(F.relu(self.deep(F.max_pool2d(skip, 2))))
        attention = torch.sigmoid(self.psi(F.relu(self.gate_x(skip) + self.gate_g(up))))
        return self.out(torch.cat([skip * attention, up], 1))


class Siamese(nn.Module):
    """One encoder for both inputs; their distance and their product are compared."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(48, 10),
        )  # fmt: skip
        self.verdict = nn.Linear(20, 1)

    def forward(self, a, b):
        a, b = self.encoder(a), self.encoder(b)
        return torch.sigmoid(self.verdict(torch.cat([(a - b).abs(), a * b], dim=-1)))


class Einsum(nn.Module):
    """Parameters that are multiplied by hand, and a bias that is added by hand."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 10)
        self.mix = nn.Parameter(torch.randn(10, 14) * 0.3)
        self.shift = nn.Parameter(torch.randn(14))
        self.head = nn.Parameter(torch.randn(14, 3) * 0.3)

    def forward(self, x):
        x = torch.einsum("bti,io->bto", torch.relu(self.fc(x)), self.mix) + self.shift
        return torch.relu(x).mean(1) @ self.head


class Dispatch(nn.Module):
    """Branches chosen by name from a dict of modules, in a list that the constructor was told."""

    def __init__(self, route=("wide", "narrow")):
        super().__init__()
        self.route = route
        self.branches = nn.ModuleDict({
            "wide": nn.Sequential(nn.Conv2d(6, 12, 3, padding=1), nn.BatchNorm2d(12), nn.SiLU(), nn.Conv2d(12, 6, 1)),
            "narrow": nn.Conv2d(6, 6, 3, padding=1, groups=3),
            "unused": nn.Conv2d(6, 6, 1),
        })  # fmt: skip
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        for name in self.route:
            x = x + self.branches[name](x)
        return self.head(x.mean((2, 3)))


class MaskedConv(nn.Conv2d):
    """A convolution that sees only what lies above and to the left, as PixelCNN's does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        mask = torch.ones(1, 1, *self.kernel_size)
        mask[..., self.kernel_size[0] // 2, self.kernel_size[1] // 2 + 1 :] = 0
        mask[..., self.kernel_size[0] // 2 + 1 :, :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


def pixels():
    return nn.Sequential(
        MaskedConv(1, 8, 5, padding=2), nn.ReLU(), MaskedConv(8, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 4, 1)
    )


class Hybrid(nn.Module):
    """A CNN over frames, and a GRU over packed sequences of known lengths."""

    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 12, 3, padding=1), nn.ReLU())
        self.gru = nn.GRU(12, 10, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x = self.cnn(x).transpose(1, 2)
        packed = pack_padded_sequence(x, torch.full((x.shape[0],), x.shape[1]), batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        return self.head(out[:, -1])


class Film(nn.Module):
    """A condition scales and shifts the channels of a convolution; both come out of one linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8, affine=False), nn.Conv2d(8, 2, 3)
        self.film = nn.Sequential(nn.Linear(4, 9), nn.SiLU(), nn.Linear(9, 16))

    def forward(self, x, condition):
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)
        return self.out(F.silu(self.norm(self.conv(x)) * (1 + scale) + shift))


class Experts(nn.Module):
    """A soft mixture of experts: stacked outputs, weighted by a gate."""

    def __init__(self):
        super().__init__()
        self.stem, self.gate = nn.Linear(5, 8), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        weights = self.gate(x).softmax(-1)
        out = torch.stack([expert(x) for expert in self.experts], dim=1)
        return self.head((weights.unsqueeze(-1) * out).sum(1))


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


NETWORKS = {
    "two inputs, dict outputs": (TwoInputs, (noise(2, 3, 8, 8), noise(2, 5))),
    "head tied to embedding": (Tied, (torch.arange(14).view(2, 7),)),
    "attention gate": (Gated, (noise(2, 3, 8, 8),)),
    "siamese": (Siamese, (noise(2, 1, 9, 9), noise(2, 1, 9, 9).flip(0))),
    "einsum": (Einsum, (noise(2, 5, 6),)),
    "dispatch": (Dispatch, (noise(2, 3, 8, 8),)),
    "masked convolution": (pixels, (noise(2, 1, 8, 8),)),
    "packed sequences": (Hybrid, (noise(2, 4, 7),)),
    "film": (Film, (noise(2, 3, 8, 8), noise(2, 4))),
    "experts": (Experts, (noise(2, 5),)),
}


def lively(model):
    """Draws what starts as zeros or ones anew, so that no channel is neutral."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim == 1 and not name.endswith("mask"):
                tensor.uniform_(0.5 if name.endswith(("var", "weight")) else -0.5, 1.0, generator=generator)
    return model.eval()


class LeNet(nn.Module):
    """The flattened size is written down as a number, with the batch told or left open."""

    def __init__(self, told=False):
        super().__init__()
        self.told = told
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 10, 3)
        self.fc1, self.fc2 = nn.Linear(10 * 2 * 2, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), 40) if self.told else x.view(-1, 10 * 2 * 2)
        return self.fc2(F.relu(self.fc1(x)))


def normed():
    """Convolutions with weight normalisation, as in audio networks."""
    norm = nn.utils.parametrizations.weight_norm
    layers = norm(nn.Conv1d(2, 8, 3)), nn.ELU(), norm(nn.Conv1d(8, 10, 3, dilation=2)), nn.ELU(), nn.Conv1d(10, 2, 1)
    return nn.Sequential(*layers)


NETWORKS |= {
    "flattened to a number": (LeNet, (noise(2, 1, 14, 14),)),
    "flattened to a number, batch told": (lambda: LeNet(told=True), (noise(2, 1, 14, 14),)),
    "weight norm": (normed, (noise(2, 2, 16),)),
}
PRUNED = {
    "two inputs, dict outputs": {"image.0": 8, "table.0": 12, "joint": 16},
    "head tied to embedding": {"embedding": 16, "block.0": 24},
    "attention gate": {"down": 8, "deep": 16, "up": 8, "gate_x": 6},
    "siamese": {"encoder.0": 8, "encoder.2": 12, "encoder.6": 10},
    "einsum": {"fc": 10, "mix": 14},
    "dispatch": {"stem": 2, "branches.wide.0": 12},
    "masked convolution": {"0": 8, "2": 10},
    "film": {"film.0": 9, "film.2": 8},
    "experts": {"stem": 8, "experts.0.0": 12, "experts.0.2": 8, "experts.1.0": 12, "experts.2.0": 12},
    "flattened to a number": {"conv1": 6, "conv2": 10, "fc1": 16},
    "flattened to a number, batch told": {"conv1": 6, "conv2": 10, "fc1": 16},
    "weight norm": {"0": 8, "2": 10},
}


@pytest.mark.parametrize("name", PRUNED)
def test_every_group_is_found_and_pruned_exactly(name):
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    network = trace(lively(make()), inputs)
    assert {group.name: group.size for group in network.groups} == PRUNED[name]
    rng = np.random.default_rng(0)
    exact = [group for group in network.groups if not group.approximate]
    for groups in (exact, list(network.groups)):
        selection = {g.name: np.sort(rng.choice(g.size, g.size // 2, replace=False)) for g in groups}
        small = cut(network, selection)
        costs = network.cost_model.costs({group: len(kept) for group, kept in selection.items()})
        assert costs["macs"] == count_macs(small, inputs)
        assert (costs["params"], costs["size_bytes"]) == (count_params(small), count_bytes(small))
        with evaluating(small), torch.no_grad():
            output = small(*inputs)
        if groups is exact:
            twin = masked_twin(network, selection)
            with evaluating(twin), torch.no_grad():
                assert relative_error(output, twin(*inputs)) < 1e-5


def test_a_layer_whose_weight_is_computed_is_never_left_out_of_what_is_told():
    class Merged(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.last = nn.Linear(6, 20), nn.Linear(12, 8)
            self.out = nn.Linear(8, 3)
            self.a, self.b = nn.Parameter(torch.randn(6, 20)), nn.Parameter(torch.randn(12, 6))

        def forward(self, x):
            x = F.relu(F.linear(F.relu(self.fc(x)), (self.b @ self.a).cumsum(0)))
            return self.out(F.relu(self.last(x)))

    frozen = {entry.name: entry.reason for entry in trace(Merged().eval(), noise(2, 6)).frozen}
    assert any("computed, not stored" in reason for reason in frozen.values())


def test_sequences_that_are_packed_are_refused_with_what_to_do_instead():
    make, inputs = NETWORKS["packed sequences"]
    with pytest.raises(TraceError, match=r"packed sequences.*padded tensor") as caught:
        trace(make().eval(), inputs)
    assert "pad_packed_sequence(self.gru(packed)[0]" in str(caught.value)  # the line of the person's own code
