"""Projections of attention that are no modules of their own are refitted as any linear layer is."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoprune.network.calibration.moments import gather
from autoprune.network.calibration.targets import gather_targets, refittable_layers
from autoprune.network.repair.compensation import compensate, refit
from autoprune.network.repair.sequential import refit_sequentially
from autoprune.network.surgery.cut import cut
from autoprune.network.tracing.trace import trace

TOKENS, WIDTH = 6, 16


class SelfAttention(nn.Module):
    """A hidden layer, and an attention that reads what is pruned of it."""

    def __init__(self, bias=True):
        super().__init__()
        self.fc = nn.Linear(5, WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 4, bias=bias, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = torch.relu(self.fc(x))
        return self.head(self.attn(x, x, x, need_weights=False)[0])


class CrossAttention(nn.Module):
    """Queries, keys and values from three layers; `apart`: their projections are three parameters."""

    def __init__(self, apart=False):
        super().__init__()
        keys, values = (12, 20) if apart else (WIDTH, WIDTH)
        self.q, self.k, self.v = nn.Linear(5, WIDTH), nn.Linear(5, keys), nn.Linear(5, values)
        self.attn = nn.MultiheadAttention(WIDTH, 4, kdim=keys, vdim=values, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        q, k, v = (torch.relu(layer(x)) for layer in (self.q, self.k, self.v))
        return self.head(self.attn(q, k, v, need_weights=False)[0])


class OwnBias(nn.Module):
    """An attention that puts the bias of its packed projection together on the way, as BEiT and EVA do."""

    def __init__(self):
        super().__init__()
        self.fc, self.qkv = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = torch.relu(self.fc(x))
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.head(out.transpose(1, 2).flatten(2))


NETWORKS = {
    "packed": SelfAttention,
    "packed without bias": lambda: SelfAttention(bias=False),
    "packed, three inputs": CrossAttention,
    "three parameters": lambda: CrossAttention(apart=True),
    "own bias": OwnBias,
}
SITES = {
    "packed": ["attn.in_proj_weight:0"],
    "packed without bias": ["attn.in_proj_weight:0"],
    "packed, three inputs": ["attn.in_proj_weight:0", "attn.in_proj_weight:16", "attn.in_proj_weight:32"],
    "three parameters": ["attn.k_proj_weight:0", "attn.q_proj_weight:0", "attn.v_proj_weight:0"],
    "own bias": ["qkv.weight:0"],
}


def build(name):
    torch.manual_seed(0)
    model = NETWORKS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape))
    return model.eval()


def inputs(seed, count=128):
    return torch.randn(count, TOKENS, 5, generator=torch.Generator().manual_seed(seed))


def error(model, dense, x):
    with torch.no_grad():
        return float((model(x) - dense(x)).square().mean())


def selections(network):
    """What the projections read goes by half; then heads and their dimensions go too."""
    rng = np.random.default_rng(0)
    halves = {g.name: np.sort(rng.choice(g.size, g.size // 2, replace=False)) for g in network.groups}
    return {name: kept for name, kept in halves.items() if ":" not in name}, halves


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("way", ["cached", "sequential"])
def test_refitting_the_projections_brings_the_output_nearer(name, way):
    network = trace(build(name), inputs(0, 2))
    sites = SITES[name]
    assert set(sites) <= set(refittable_layers(network))
    statistics = gather(network, [inputs(1)])
    assert set(sites) <= set(statistics)
    targets = gather_targets(network, inputs(1))
    for selection in selections(network):
        errors = {}
        for kind in ("none", "all but the projections", "all"):
            small = cut(network, selection)
            some = {site: m for site, m in statistics.items() if kind == "all" or site not in sites}
            if way == "cached" and kind != "none":
                compensate(network, small, selection, some)
            elif kind != "none":
                kept = {site: rows for site, rows in targets.outputs.items() if site in some or site not in sites}
                outputs = type(targets)(targets.images, kept, targets.rows, targets.seed)
                refit_sequentially(network, small, selection, outputs)
            errors[kind] = error(small, network.model, inputs(9))
        assert errors["all"] < 0.99 * errors["all but the projections"]
        assert errors["all"] < errors["none"]


def test_the_rows_of_each_projection_are_the_least_squares_solution_for_its_own_input():
    network = trace(build("packed, three inputs"), inputs(0, 2))
    statistics = gather(network, [inputs(1)])
    selection, _ = selections(network)
    small = cut(network, selection)
    compensate(network, small, selection, statistics)
    dense, kept = network.model.attn, selection["q"]  # one parameter reads all three, so they lose the same channels
    for part, site in enumerate(SITES["packed, three inputs"]):
        rows = slice(part * WIDTH, (part + 1) * WIDTH)
        weight, shift = refit(dense.in_proj_weight[rows].detach(), statistics[site], kept)
        torch.testing.assert_close(small.attn.in_proj_weight[rows], weight)
        torch.testing.assert_close(small.attn.in_proj_bias[rows], dense.in_proj_bias[rows] + shift)
