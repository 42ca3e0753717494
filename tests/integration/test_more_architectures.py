"""Networks that are no image classifiers: U-Nets, 1-D and 3-D convolutions, tables with embeddings, super-resolution.

Every group is pruned at once, by half and by a quarter: the network runs, gives its masked twin's output, costs what
was predicted and loads back. Recurrent networks, and a U-Net whose shapes meet only after cropping, are among them.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoprune.network import trace
from autoprune.network.artifacts.saved import model_document, save_model, shrink_to
from autoprune.network.graph.modules import evaluating
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.twin import masked_twin, relative_error
from autoprune.network.tracing.counting import count_bytes, count_macs, count_params


def double(a, b):
    return nn.Sequential(
        nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(),
        nn.Conv2d(b, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(),
    )  # fmt: skip


class UNet(nn.Module):
    """Encoder and decoder with skip concatenation; `up` is a transposed convolution or bilinear resizing."""

    def __init__(self, up):
        super().__init__()
        self.down = nn.ModuleList([double(3, 8), double(8, 16), double(16, 24)])
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 2, stride=2) if up == "transposed" else nn.Conv2d(a, b, 1)
            for a, b in ((24, 16), (16, 8))
        )
        self.up = nn.ModuleList([double(32, 16), double(16, 8)])
        self.head = nn.Conv2d(8, 2, 1)
        self.resize = up != "transposed"

    def forward(self, x):
        skips = []
        for k, stage in enumerate(self.down):
            x = stage(x if k == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for grow, stage, skip in zip(self.grow, self.up, skips[-2::-1], strict=True):
            x = grow(x)
            if self.resize:
                x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            missing = [skip.shape[k] - x.shape[k] for k in (2, 3)]  # odd sizes
            x = F.pad(x, (0, missing[1], 0, missing[0]))
            x = stage(torch.cat([skip, x], dim=1))
        return self.head(x)


class Wave(nn.Module):
    """A WaveNet-like 1-D network: gated dilated convolutions, residual and skip sums."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(2, 12, 1)
        self.gates = nn.ModuleList(nn.Conv1d(12, 24, 3, dilation=d, padding=d) for d in (1, 2, 4))
        self.mix = nn.ModuleList(nn.Conv1d(12, 12, 1) for _ in range(3))
        self.skip = nn.ModuleList(nn.Conv1d(12, 10, 1) for _ in range(3))
        self.last = nn.Conv1d(10, 3, 1)

    def forward(self, x):
        x, total = self.first(x), 0
        for gate, mix, skip in zip(self.gates, self.mix, self.skip, strict=True):
            y = F.glu(gate(x), dim=1)
            x, total = x + mix(y), total + skip(y)
        return self.last(F.relu(total))


def volumes():
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2),
        nn.Conv3d(8, 12, 3, groups=2, padding=1), nn.InstanceNorm3d(12, affine=True), nn.ReLU(),
        nn.ConvTranspose3d(12, 8, 2, stride=2), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


class Tabular(nn.Module):
    """Three categorical columns with embeddings of their own width beside five numbers, and a gated MLP."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, d) for n, d in ((7, 4), (5, 6), (11, 8)))
        self.numbers = nn.BatchNorm1d(5)
        self.up, self.down, self.head = nn.Linear(23, 32), nn.Linear(16, 12), nn.Linear(12, 2)

    def forward(self, categories, numbers):
        columns = [table(categories[:, k]) for k, table in enumerate(self.tables)]
        x = torch.cat([*columns, self.numbers(numbers)], -1)
        return self.head(F.relu(self.down(F.glu(self.up(x)))))


class SuperResolution(nn.Module):
    """ESPCN with a residual body: sub-pixel upsampling by two, twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 5, padding=2)
        self.body = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.up = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(8))
        self.last = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x):
        y = self.first(x)
        for conv in self.body:
            y = y + F.leaky_relu(conv(y), 0.1)
        return self.last(self.up(y)) + F.interpolate(x, scale_factor=4, mode="nearest")


class Speech(nn.Module):
    """Convolution, bidirectional GRU and LSTM, attention pooling over time by hand."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 12, 3, padding=1)
        self.gru = nn.GRU(12, 8, bidirectional=True, batch_first=True)
        self.lstm = nn.LSTM(16, 10, num_layers=2, batch_first=True)
        self.score, self.head = nn.Linear(10, 1), nn.Linear(10, 3)

    def forward(self, x):
        y, _ = self.gru(F.relu(self.conv(x)).transpose(1, 2))
        y, _ = self.lstm(y)
        weights = self.score(y).softmax(dim=1)
        return self.head(torch.einsum("bto,btc->bc", weights, y))


class Positioned(nn.Module):
    """A convolution over what a depthwise one, which other blocks share, has added positions to."""

    def __init__(self, positions):
        super().__init__()
        self.positions, self.mix = positions, nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.mix(x + self.positions(x))


class Shared(nn.Module):
    """Two blocks with one and the same depthwise convolution."""

    def __init__(self):
        super().__init__()
        positions = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), Positioned(positions), Positioned(positions)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.head(self.b(self.a(self.stem(x))))


NETWORKS = {
    "unet with transposed convolutions": (lambda: UNet("transposed"), [(2, 3, 16, 16)], 12),
    "unet with resizing": (lambda: UNet("bilinear"), [(2, 3, 16, 16)], 12),
    "unet on odd sizes": (lambda: UNet("transposed"), [(2, 3, 19, 22)], 12),
    "gated 1-d convolutions": (Wave, [(2, 2, 20)], 5),
    "3-d convolutions": (volumes, [(2, 1, 8, 8, 8)], 3),
    "a table with embeddings": (Tabular, [(2, 3), (2, 5)], 5),
    "super-resolution": (SuperResolution, [(2, 3, 8, 8)], 2),
    "speech": (Speech, [(2, 4, 9)], 3),
    "one convolution in two blocks": (Shared, [(2, 3, 8, 8)], 2),
}


def built(make):
    torch.manual_seed(0)
    model = make()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
    return model.eval()


def inputs_of(shapes):
    generator = torch.Generator().manual_seed(2)
    if len(shapes) == 1:
        return (torch.randn(shapes[0], generator=generator),)
    return torch.randint(0, 5, shapes[0], generator=generator), torch.randn(shapes[1], generator=generator)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_is_pruned_exactly(name, tmp_path):
    make, shapes, groups = NETWORKS[name]
    inputs = inputs_of(shapes)
    network = trace(built(make), inputs)
    assert len(network.groups) == groups, [g.name for g in network.groups]
    assert network.broken == {}
    assert network.notes == ()
    assert all(group.approximate is None for group in network.groups)
    assert all(f.size == 1 or "output" in f.reason or "fixed width" in f.reason for f in network.frozen)
    for ratio in (0.25, 0.5):
        rng = np.random.default_rng(0)
        selection = {
            g.name: np.sort(rng.choice(g.size, max(1, round(g.size * (1 - ratio))), replace=False))
            for g in network.groups
        }
        small = cut(network, selection)
        with evaluating(small), torch.no_grad():
            output = small(*inputs)
            assert relative_error(output, masked_twin(network, selection).eval()(*inputs)) < 1e-4
            assert relative_error(network.model(*inputs), output) > 1e-3, "pruning must show in the output"
        costs = network.cost_model.costs({name: len(kept) for name, kept in selection.items()})
        assert costs["macs"] == count_macs(small, inputs)
        assert costs["params"] == count_params(small)
        assert costs["size_bytes"] == count_bytes(small)
    document = model_document(network, None, selection, {}, {})
    save_model(tmp_path / "m", small, document)
    back = shrink_to(built(make), tmp_path / "m", document).eval()
    with torch.no_grad():
        assert relative_error(back(*inputs), output) < 1e-5


@pytest.mark.parametrize("name", ["unet with transposed convolutions", "super-resolution", "speech"])
def test_the_pruned_network_trains(name):
    make, shapes, _ = NETWORKS[name]
    inputs = inputs_of(shapes)
    network = trace(built(make), inputs)
    small = cut(network, {g.name: np.arange(max(1, g.size // 2)) for g in network.groups}).train()
    small(*inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


class Cached(nn.Module):
    """Keeps a table of positions between passes, made anew for the size of its input, as ConViT does."""

    def __init__(self):
        super().__init__()
        self.fc, self.position, self.out = nn.Linear(6, 12), nn.Linear(2, 12), nn.Linear(12, 3)
        self.register_buffer("table", torch.zeros(1, 2), persistent=False)

    def forward(self, x):
        if len(self.table) != x.shape[1]:
            self.table = torch.arange(2.0 * x.shape[1], device=self.fc.weight.device).view(-1, 2)
        return self.out(torch.relu(self.fc(x) + self.position(self.table)))


def test_a_table_that_a_forward_pass_keeps_for_the_next_one_leaves_the_costs_exact():
    torch.manual_seed(0)
    x, model = torch.randn(2, 5, 6), Cached().eval()
    network = trace(model, x)
    selection = {"fc": np.arange(0, 12, 2)}
    small, predicted = cut(network, selection), network.cost_model.costs({"fc": 6})
    for _ in range(2):  # a fresh copy, and one that has kept its table
        assert (count_macs(small, (x,)), count_params(small), count_bytes(small)) == tuple(
            predicted[name] for name in ("macs", "params", "size_bytes")
        )
        with torch.no_grad():
            assert relative_error(small(x), masked_twin(network, selection)(x)) < 1e-5
    assert network.cost_model.dense()["size_bytes"] == sum(t.numel() * 4 for t in model.state_dict().values())
