"""Traces kept on disk: read where the structure is the same, never believed blindly, never unpickled."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.errors import CheckpointError, TraceError
from autoprune.network.models.checkpoints import read_metadata, read_state, save_state
from autoprune.network.surgery.cut import cut
from autoprune.network.tracing import cache
from autoprune.network.tracing.cache import structure_key, trace_or_read
from autoprune.network.tracing.trace import trace


class Block(nn.Module):
    """A residual block with a width that it writes down."""

    def __init__(self, width=8, slope=0.0):
        super().__init__()
        self.a, self.norm = nn.Conv2d(width, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.b, self.slope = nn.Conv2d(12, width, 3, padding=1), slope

    def forward(self, x):
        return x + self.b(nn.functional.leaky_relu(self.norm(self.a(x)), self.slope))


class Attention(nn.Module):
    """Heads whose number is an attribute, and whose joined width is taken from the input."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, c))


def convolutional(**options):
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), Block(**options), nn.ReLU(), *head).eval()


def attending():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), Attention(), nn.LayerNorm(16), nn.Linear(16, 3)).eval()


CASES = {
    "convolutional": (convolutional, torch.zeros(2, 3, 8, 8), "channel"),
    "attending": (attending, torch.zeros(2, 7, 5), "channel"),
    "masked": (convolutional, torch.zeros(2, 3, 8, 8), "unstructured"),
}


@pytest.fixture
def notes():
    return []


@pytest.fixture
def read(tmp_path, notes, monkeypatch):
    """Traces through the folder, and says by how many real traces."""
    counted = []

    def counting(*args, **kwargs):
        counted.append(args)
        return trace(*args, **kwargs)

    monkeypatch.setattr(cache, "trace", counting)

    def call(model, example, pruning="channel"):
        counted.clear()
        network = trace_or_read(model, example, pruning=pruning, folder=tmp_path, note=notes.append)
        return network, len(counted)

    return call


@pytest.mark.parametrize("case", CASES)
def test_a_model_of_the_same_structure_is_read_with_the_same_groups_costs_and_links(case, read, notes):
    build, example, pruning = CASES[case]
    fresh, times = read(build(), example, pruning)
    assert times == 1
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    kept, times = read(model, example, pruning)
    assert times == 0
    assert notes == []
    assert kept.groups == fresh.groups
    assert kept.frozen == fresh.frozen
    assert kept.notes == fresh.notes
    assert kept.broken == fresh.broken
    assert [t.module for t in kept.told] == [t.module for t in fresh.told]
    widths = {group.name: max(1, group.size // 2) for group in fresh.groups}
    assert kept.cost_model.costs(widths) == fresh.cost_model.costs(widths)
    assert kept.index_map.keys() == fresh.index_map.keys()
    for name, dims in fresh.index_map.items():
        for dim, units in dims.items():
            assert np.array_equal(units, kept.index_map[name][dim])
    assert [links.module for links in kept.links] == [links.module for links in fresh.links]
    assert all(a is b for a, b in zip(model.parameters(), kept.model.parameters(), strict=True)) or kept.told


@pytest.mark.parametrize("case", ["convolutional", "attending"])
def test_what_is_cut_by_a_kept_trace_is_what_a_fresh_one_cuts(case, read):
    build, example, _ = CASES[case]
    read(build(), example)
    kept, _ = read(build(), example)
    fresh = trace(build(), example)
    selection = {group.name: np.arange(0, group.size, 2) for group in fresh.groups}
    x = torch.randn_like(example)
    with torch.no_grad():
        assert torch.equal(cut(kept, selection).eval()(x), cut(fresh, selection).eval()(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda: convolutional(slope=0.1),
        lambda: nn.Sequential(*convolutional(), nn.Identity()),
        lambda: copy.deepcopy(convolutional()).double(),
    ],
    ids=["attribute", "module", "type"],
)
def test_another_structure_has_another_key(change):
    example = torch.zeros(2, 3, 8, 8)
    assert structure_key(change(), example, "channel") != structure_key(convolutional(), example, "channel")


def test_inputs_ways_of_pruning_ties_and_sources_have_keys_of_their_own(monkeypatch):
    model, example = convolutional(), torch.zeros(2, 3, 8, 8)
    first = structure_key(model, example, "channel")
    assert structure_key(convolutional(), example + 1, "channel") == first
    assert structure_key(model, torch.zeros(2, 3, 9, 9), "channel") != first
    assert structure_key(model, example, "unstructured") != first
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    apart = structure_key(tied, example, "channel")
    tied[1].weight = tied[0].weight
    assert structure_key(tied, example, "channel") != apart
    monkeypatch.setattr(cache, "_own_sources", lambda: "another version")
    assert structure_key(model, example, "channel") != first


def test_a_module_with_a_hook_or_a_forward_pass_of_its_own_has_no_key(read, tmp_path):
    hooked, example = convolutional(), torch.zeros(2, 3, 8, 8)
    hooked[2].register_forward_hook(lambda module, args, output: output)
    own = convolutional()
    own[2].forward = lambda x: x
    assert structure_key(hooked, example, "channel") is None
    assert structure_key(own, example, "channel") is None
    assert read(hooked, example)[1] == 1
    assert list(tmp_path.iterdir()) == []


def test_a_class_without_a_source_file_has_no_key():
    scope = {"__name__": "nowhere"}
    kind = type("Made", (nn.Identity,), {"__module__": scope["__name__"]})
    assert structure_key(nn.Sequential(kind()), torch.zeros(2, 3), "channel") is None


def damaged(path, how):
    metadata, state = read_metadata(path), read_state(path)
    if how == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "schema":
        save_state(state, path, {**metadata, "schema": "99"})
    elif how == "text":
        save_state(state, path, {**metadata, "trace": metadata["trace"][:-40]})
    elif how == "numbers":
        save_state({"numbers": state["numbers"] + 1}, path, metadata)
    elif how == "names":
        save_state({"others": state["numbers"]}, path, metadata)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """One trace and its file, to be copied."""
    path = tmp_path_factory.mktemp("kept") / "trace.safetensors"
    network = trace(convolutional(), torch.zeros(2, 3, 8, 8))
    cache.write_trace(path, network)
    return path, network


@pytest.mark.parametrize("how", ["half", "empty", "schema", "text", "numbers", "names"])
def test_a_damaged_file_is_reported_and_written_anew(how, stored, read, tmp_path, notes):
    example = torch.zeros(2, 3, 8, 8)
    path = tmp_path / f"trace-{structure_key(convolutional(), example, 'channel')}.safetensors"
    path.write_bytes(stored[0].read_bytes())
    damaged(path, how)
    again, times = read(convolutional(), example)
    assert times == 1
    assert len(notes) == 1
    assert "made anew" in notes[0]
    assert str(path) in notes[0]
    assert again.groups == stored[1].groups
    assert read(convolutional(), example)[1] == 0


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"record": [1, 2]}, "no record"),
        ({"record": {"Popen": ["true"]}}, "KeyError"),
        ({"record": {"Layer": []}}, "TypeError"),
        ({"arrays": [[10**9]]}, "ValueError"),
        ({"told": 3}, "TypeError"),
    ],
    ids=str,
)
def test_a_file_that_is_whole_but_holds_something_else_is_refused(wrong, reason, stored, tmp_path):
    metadata, state = read_metadata(stored[0]), read_state(stored[0])
    text = json.dumps({**json.loads(metadata["trace"]), **wrong})
    path = tmp_path / "trace.safetensors"
    save_state(state, path, {**metadata, "trace": text, "digest": cache._digest(text, state["numbers"])})
    with pytest.raises(CheckpointError, match=reason):
        cache.read_trace(path, convolutional(), torch.zeros(2, 3, 8, 8))


def test_a_trace_that_is_not_true_of_the_model_is_not_believed(stored, read, tmp_path, notes):
    """Code that a module calls in another file has changed: its key is the same."""
    example, network = torch.zeros(2, 3, 8, 8), stored[1]
    path = tmp_path / f"trace-{structure_key(convolutional(), example, 'channel')}.safetensors"
    products = tuple(replace(product, factor=2 * product.factor) for product in network.record.products)
    cache.write_trace(path, replace(network, record=replace(network.record, products=products)))
    again, times = read(convolutional(), example)
    assert times == 1
    assert "does not fit" in notes[0]
    assert again.cost_model.dense() == network.cost_model.dense()


def test_a_model_that_cannot_be_traced_leaves_no_file(read, tmp_path):
    with pytest.raises(TraceError):
        read(nn.Sequential(nn.ReLU()).eval(), torch.zeros(2, 3))
    assert list(tmp_path.iterdir()) == []
