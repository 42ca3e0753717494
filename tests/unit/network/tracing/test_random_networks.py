"""Random small networks out of the supported operators, pruned by random policies.

Whatever the network: it runs, gives its masked twin's output where no norm averages over its channels, costs exactly
what was predicted, and loads back.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from autoprune.errors import TraceError
from autoprune.network import trace
from autoprune.network.artifacts.saved import model_document, save_model, shrink_to
from autoprune.network.graph.modules import evaluating
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.twin import masked_twin, relative_error
from autoprune.network.tracing.counting import count_bytes, count_macs, count_params

ACTIVATIONS = (nn.ReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid)


@dataclass(frozen=True)
class Step:
    """One operation of a random network; `width`, `groups` and `kind` mean what the operation makes of them."""

    operation: str
    width: int
    groups: int
    kind: int


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels, inner):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Residual(nn.Module):
    """A branch that is added to what it reads."""

    def __init__(self, channels, inner):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(channels, inner, 1), nn.BatchNorm2d(inner), nn.Conv2d(inner, channels, 1)

    def forward(self, x):
        return x + self.b(F.relu(self.norm(self.a(x))))


class Dense(nn.Module):
    """A branch that is concatenated with what it reads."""

    def __init__(self, channels, growth):
        super().__init__()
        self.conv = nn.Conv2d(channels, growth, 3, padding=1)

    def forward(self, x):
        return torch.cat([self.conv(x), x], 1)


class Halves(nn.Module):
    """Splits by count and puts the parts together again: gated, summed, swapped or shuffled."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind % 5

    def forward(self, x):
        a, b = x.chunk(2, 1)
        if self.kind == 0:
            return a * torch.sigmoid(b)
        if self.kind == 1:
            return a + b
        if self.kind == 2:
            return torch.cat([b, a], 1)
        if self.kind == 3:
            return F.glu(x, 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Two(nn.Module):
    """Two convolutions of one input, joined by an operation."""

    def __init__(self, channels, width, kind):
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, width, 1), nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.kind = kind % 3

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return (a + b, torch.maximum(a, b), torch.stack([a, b]).mean(0))[self.kind]


def build(steps, flat, size=4):
    """Returns the network that `steps` spell; steps that do not fit its width are left out."""
    torch.manual_seed(0)
    width, layers = 3, []
    for step in steps:
        layer, width = layer_of(step, width)
        layers += layer
    layers.append(nn.Conv2d(width, 6, 1))
    if flat:
        head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(6 * 4, 5), nn.ReLU(), nn.Linear(5, 3)]
    else:
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    model = nn.Sequential(*layers, *head)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def layer_of(step, width):
    """Returns the modules of one step and the width after them."""
    groups = next((g for g in (step.groups, 2, 1) if width % g == 0 and step.width % g == 0), 1)
    even = width % 2 == 0
    match step.operation:
        case "conv":
            return [nn.Conv2d(width, step.width, 3, padding=1, groups=groups, bias=step.kind % 2 == 0)], step.width
        case "depthwise":
            factor = 1 + step.kind % 2
            return [nn.Conv2d(width, width * factor, 3, padding=1, groups=width)], width * factor
        case "transposed":
            return [nn.ConvTranspose2d(width, step.width, 2, stride=2, groups=groups), nn.MaxPool2d(2)], step.width
        case "norm":
            norms = (nn.BatchNorm2d(width), nn.InstanceNorm2d(width, affine=True), nn.BatchNorm2d(width, affine=False))
            return [norms[step.kind % 3]], width
        case "group norm":
            return [nn.GroupNorm(2 if even else 1, width)], width
        case "activation":
            return [ACTIVATIONS[step.kind % len(ACTIVATIONS)]()], width
        case "prelu":
            return [nn.PReLU(width if step.kind % 2 else 1)], width
        case "pool":
            pools = (nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.LPPool2d(2, 1))
            return [pools[step.kind % 2]], width
        case "squeeze":
            return [Squeeze(width, max(2, step.width // 2))], width
        case "residual":
            return [Residual(width, step.width)], width
        case "dense":
            return [Dense(width, step.width)], width + step.width
        case "halves" if even and width > 2:
            return [Halves(step.kind)], width // 2 if step.kind % 5 in (0, 1, 3) else width
        case "two":
            return [Two(width, step.width, step.kind)], step.width
        case "shuffle" if width % 4 == 0 and width > 4:
            return [nn.PixelShuffle(2), nn.MaxPool2d(2)], width // 4
        case "unshuffle" if width <= 8:
            return [nn.Upsample(scale_factor=2), nn.PixelUnshuffle(2)], width * 4
        case "channel shuffle" if even:
            return [nn.ChannelShuffle(2)], width
    return [], width


OPERATIONS = [
    "conv", "depthwise", "transposed", "norm", "group norm", "activation", "prelu", "pool", "squeeze", "residual",
    "dense", "halves", "two", "shuffle", "unshuffle", "channel shuffle",
]  # fmt: skip
STEPS = st.lists(
    st.builds(
        Step,
        operation=st.sampled_from(OPERATIONS),
        width=st.sampled_from([4, 6, 8, 12]),
        groups=st.sampled_from([1, 2, 4]),
        kind=st.integers(0, 9),
    ),
    min_size=1,
    max_size=7,
)


def check(steps, flat, seed):
    """Everything that must hold for one network and one random policy."""
    model = build(steps, flat)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    try:
        network = trace(model, x)
    except TraceError as error:
        if "can be pruned" in str(error):  # everything is frozen, each layer with its reason
            return
        raise
    assert network.notes == (), "every operator here has a rule"
    assert network.broken == {}, network.broken
    rng = np.random.default_rng(seed)
    selection = {}
    for group in network.groups:
        width = int(rng.integers(1, group.size + 1))
        selection[group.name] = np.sort(rng.choice(group.size, width, replace=False))
    small = cut(network, selection)
    with evaluating(small), torch.no_grad():
        output = small(x)
        expected = masked_twin(network, selection).eval()(x)
    if all(group.approximate is None for group in network.groups):
        assert relative_error(output, expected) < 1e-4
    costs = network.cost_model.costs({name: len(kept) for name, kept in selection.items()})
    assert costs["macs"] == count_macs(small, (x,))
    assert costs["params"] == count_params(small)
    assert costs["size_bytes"] == count_bytes(small)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        document = model_document(network, None, selection, {}, {})
        save_model(Path(folder) / "m", small, document)
        back = shrink_to(build(steps, flat), Path(folder) / "m", document).eval()
        assert relative_error(back(x), output) < 1e-5


ARGUMENTS = {"steps": STEPS, "flat": st.booleans(), "seed": st.integers(0, 2**16)}
# torch warns about `num_features` of an instance norm without weights, although it does not use it.
quiet = pytest.mark.filterwarnings("ignore:input's size at dim=1 does not match num_features")


@quiet
@settings(max_examples=15, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(**ARGUMENTS)
def test_a_random_network_is_pruned_exactly(steps, flat, seed):
    check(steps, flat, seed)


@quiet
@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=400, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(**ARGUMENTS)
def test_many_random_networks_are_pruned_exactly(steps, flat, seed):
    check(steps, flat, seed)
