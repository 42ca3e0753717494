"""Targets gathered batch by batch beside the moments are those of a pass of their own."""

import pytest
import torch
from torch import nn

from autoprune.errors import DataError
from autoprune.network.calibration import one_pass as beside
from autoprune.network.calibration.moments import gather
from autoprune.network.calibration.one_pass import gather_both, watching
from autoprune.network.calibration.targets import gather_targets
from autoprune.network.tracing.trace import trace


def images(count=40, size=8):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def conv():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.BatchNorm2d(8),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 5),
    )  # fmt: skip


class Swapped(nn.Module):
    """The sequence stands before the batch while the hidden layer runs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = x.flatten(1, 2).transpose(0, 1)
        return self.c(torch.relu(self.b(torch.relu(self.a(x))))).mean(0)


class Attention(nn.Module):
    """Multiplies rows of a packed projection that is no module, the sequence before the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head = nn.Linear(24, 8), nn.Linear(8, 2)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = torch.relu(self.fc(x.transpose(1, 2).flatten(2)))
        return self.head(self.attn(x, x, x, need_weights=False)[0]).mean(1)


class Padding(nn.Conv2d):
    """Pads its input by itself, as the convolutions of some published networks do."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


def padded():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), Padding(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))


def both(network, x, batch=16):
    made = []

    def batches(limit):
        made.append(limit)
        return iter(torch.split(x if limit is None else x[:limit], batch))

    return gather_both(network, batches, len(x), number=-(-len(x) // batch), seed=5), made


@pytest.mark.parametrize("rows", [8192, 600])
@pytest.mark.parametrize("make", [conv, Swapped, Attention, padded])
def test_moments_and_targets_are_those_of_two_passes(make, rows, monkeypatch):
    monkeypatch.setattr(beside, "target_rows", lambda network: rows)
    monkeypatch.setattr(beside, "gather_targets", lambda *a, **k: gather_targets(*a, **{"rows": rows, **k}))
    x = images()
    network = trace(make().eval(), x[:2])
    (statistics, found), made = both(network, x)
    assert made == ([3, None, 40] if make is padded else [3, None])  # it needs a pass of its own
    expected = gather_targets(network, x, rows=rows, seed=5)
    assert found.outputs.keys() == expected.outputs.keys()
    assert len(found.outputs) >= 3
    assert (found.rows, found.seed) == (expected.rows, expected.seed)
    assert torch.equal(found.images, x)
    for path, wanted in expected.outputs.items():
        torch.testing.assert_close(found.outputs[path], wanted, rtol=1e-4, atol=1e-5)
    alone = gather(network, list(torch.split(x, 16)), seed=5)
    assert all(torch.equal(statistics[path].gram, alone[path].gram) for path in alone)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in network.model.modules())


@pytest.mark.parametrize("count", [1, 16, 17, 33])
def test_images_beyond_those_that_are_kept_do_not_count(count):
    x = images()
    network = trace(conv().eval(), x[:2])
    with watching(network, count, rows=8192, seed=2) as watch, torch.no_grad():
        for batch in torch.split(x, 16):
            network.model(batch)
    expected = gather_targets(network, x[:count], seed=2)
    found = watch.targets()
    assert torch.equal(found.images, x[:count])
    for path, wanted in expected.outputs.items():
        torch.testing.assert_close(found.outputs[path], wanted, rtol=1e-4, atol=1e-5)


def test_one_image_is_enough_and_none_is_refused():
    x = images()
    network = trace(conv().eval(), x[:2])
    (_, found), made = both(network, x[:1])
    assert made == [None, 1]
    assert len(found.images) == 1
    with pytest.raises(DataError, match="no calibration images"):
        both(network, x[:0])
