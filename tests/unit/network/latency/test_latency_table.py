"""Latency tables: operators alone at a grid of widths, their sum calibrated on whole networks, and kept on disk."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from autoprune.errors import InputError
from autoprune.network.latency import table as module
from autoprune.network.latency.operators import record_calls
from autoprune.network.latency.table import LatencyTable, build_table, monotone, read_or_build
from autoprune.network.latency.timing import Conditions
from autoprune.network.surgery.cut import cut
from autoprune.network.tracing.trace import trace


class Net(nn.Module):
    """Dense, depthwise and recurrent layers, attention, a sum, a concatenation, and a layer norm."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.side = nn.Conv2d(16, 8, 1)
        self.lstm = nn.LSTM(24, 12, batch_first=True)
        self.q, self.k, self.v = (nn.Linear(12, 8) for _ in range(3))
        self.last_norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = torch.cat([x + self.deep(x), self.side(x)], 1).flatten(2).transpose(1, 2)
        x, _ = self.lstm(x)
        x = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.head(self.last_norm(x).mean(1))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return trace(Net().eval(), torch.zeros(2, 3, 6, 6))


def arithmetic(call, sizes, conditions):
    """Stands for the clock: a time that the grid reproduces exactly, as it is a product of linear functions."""
    return 1e-6 * float(np.prod([1.0 + size for size in sizes]))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_every_operator_can_be_made_alone_at_any_widths_and_batch(network, batch):
    conditions = Conditions(batch)
    calls = record_calls(network, conditions)
    names = {call.kind.name for call in calls}
    assert {"conv2d", "batch_norm", "relu", "add", "cat", "linear", "scaled_dot_product_attention", "lstm"} <= names
    dense = {group.name: group.size for group in network.groups}
    for widths in (dense, {name: max(1, size // 3) for name, size in dense.items()}):
        small = cut(network, {name: np.arange(width) for name, width in widths.items()}).eval()
        ordered = [widths[group.name] for group in network.groups]
        shapes = {}
        for call in calls:
            sizes = [form.const + sum(n * ordered[g] for g, n in form.terms) for form in call.forms]
            with torch.inference_mode():
                found = call.prepare(sizes, conditions)()
            shapes.setdefault(call.where, tuple((found[0] if isinstance(found, tuple) else found).shape))
        for path in ("first", "norm", "deep", "side", "lstm", "q", "last_norm", "head"):
            seen = []
            hook = small.get_submodule(path).register_forward_hook(
                lambda _m, _i, out, seen=seen: seen.append((out[0] if isinstance(out, tuple) else out).shape)
            )
            small(torch.zeros(batch, 3, 6, 6))
            hook.remove()
            assert shapes[path] == tuple(seen[0]), path


class Heads(nn.Module):
    """Attention whose heads and whose heads' dimensions are groups of their own."""

    def __init__(self):
        super().__init__()
        self.stem, self.heads, self.scale = nn.Linear(5, 12), 4, 0.4
        self.qkv, self.out = nn.Linear(12, 3 * 16), nn.Linear(16, 3)

    def forward(self, x):
        q, k, v = self.qkv(self.stem(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out(x.transpose(1, 2).flatten(2))


def test_operators_of_an_attention_follow_its_heads_and_their_dimensions():
    network = trace(Heads().eval(), torch.zeros(2, 7, 5))
    assert {group.name: group.size for group in network.groups} == {"stem": 12, "qkv:heads": 4, "qkv:dims": 4}
    widths = {"stem": 9, "qkv:heads": 3, "qkv:dims": 2}
    small = cut(network, {name: np.arange(width) for name, width in widths.items()})
    ordered = [widths[group.name] for group in network.groups]
    for call in record_calls(network, Conditions(2)):
        if call.kind.name in ("linear", "scaled_dot_product_attention"):
            sizes = [form.const + sum(n * ordered[g] for g, n in form.terms) for form in call.forms]
            made = [leaf.make(sizes, Conditions(2)) for leaf in call.kind.leaves if hasattr(leaf, "make")]
            shapes = [tuple(tensor.shape) for tensor in made]
            if call.where.endswith("qkv"):
                assert shapes == [(2, 7, 9), tuple(small.qkv.weight.shape), tuple(small.qkv.bias.shape)]
                assert shapes[1] == (3 * 3 * 2, 9)
            elif call.where.endswith("out"):
                assert shapes[:2] == [(2, 7, 6), tuple(small.out.weight.shape)]
            elif call.kind.name.startswith("scaled"):
                assert shapes == [(2, 3, 7, 2)] * 3


def test_operators_of_equal_shape_are_timed_once(network, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_cell", lambda call, sizes, conditions: seen.append((call.kind, tuple(sizes))) or 1e-6)
    monkeypatch.setattr(module, "_measured", lambda *args: (1.0, 0.0))
    build_table(network, Conditions())
    assert len(seen) == len(set(seen))
    calls = record_calls(network, Conditions())
    assert len({call.kind for call in calls}) < len(calls)


def test_the_table_predicts_what_whole_networks_take_where_operators_add_up(network, monkeypatch):
    monkeypatch.setattr(module, "_cell", arithmetic)
    calls = record_calls(network, Conditions())

    def whole(network, widths, conditions):
        ordered = [widths[group.name] for group in network.groups]
        sizes = ([f.const + sum(n * ordered[g] for g, n in f.terms) for f in call.forms] for call in calls)
        return 1000 * (2.5 * sum(arithmetic(call, s, None) for call, s in zip(calls, sizes, strict=True)) + 1e-4), 0.0

    monkeypatch.setattr(module, "_measured", whole)
    table = build_table(network, Conditions())
    assert table.error < 1e-3
    assert table.surfaces[0].values[0] == pytest.approx(1e5, rel=0.05)  # 0.1 ms whatever the widths
    assert sum(table.shares.values()) == pytest.approx(1.0)
    assert table.fixed == 0
    model = network.with_latency(table.surfaces).cost_model
    widths = dict(zip(model.groups, model.sizes, strict=True))
    assert model.dense()["latency_ns"] == pytest.approx(1e6 * whole(network, widths, None)[0], rel=1e-3)
    costs = []
    for name in model.groups:
        widths[name] = 1
        costs.append(model.cost("latency_ns", widths))
    assert costs == sorted(costs, reverse=True)


@given(st.lists(st.lists(st.floats(0, 100), min_size=3, max_size=3), min_size=2, max_size=5))
def test_times_are_made_to_rise_along_every_axis_and_rising_ones_stay(rows):
    times = np.array(rows)
    fixed = monotone(times)
    assert (np.diff(fixed, axis=0) >= 0).all()
    assert (np.diff(fixed, axis=1) >= 0).all()
    assert fixed.min() >= times.min()
    assert fixed.max() <= times.max()
    np.testing.assert_array_equal(monotone(fixed), fixed)


def test_an_operator_that_cannot_be_made_smaller_is_held_at_its_dense_time_and_counted(network, monkeypatch):
    def cell(call, sizes, conditions):
        if call.kind.name == "lstm" and tuple(sizes) != call.kind.sizes:
            raise RuntimeError("expected another shape")
        return arithmetic(call, sizes, conditions)

    monkeypatch.setattr(module, "_cell", cell)
    monkeypatch.setattr(module, "_measured", lambda *args: (1.0, 0.0))
    assert build_table(network, Conditions()).fixed == 1


def test_an_operator_that_the_number_format_does_not_have_is_an_error_with_its_place(network, monkeypatch):
    def cell(call, sizes, conditions):
        raise RuntimeError("not implemented for 'Half'\nmore")

    monkeypatch.setattr(module, "_cell", cell)
    with pytest.raises(InputError, match=r"aten.* at .* cannot be timed alone as float16 on cpu: not implemented for"):
        build_table(network, Conditions(dtype="float16"))


def test_a_real_table_is_positive_finite_and_comes_back_from_disk_unmeasured(tmp_path, monkeypatch):
    torch.manual_seed(0)
    small = trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.zeros(2, 6))
    said, path = [], tmp_path / "table.json"
    arguments = {"round_to": 1, "seed": 0, "lock": tmp_path / "lock", "note": said.append}
    table = read_or_build(path, small, Conditions(), **arguments)
    assert said
    assert 0 < small.with_latency(table.surfaces).cost_model.dense()["latency_ns"] < 1e9
    assert len(table.held_out) >= 2
    assert np.isfinite(table.error)
    monkeypatch.setattr(module, "build_table", None)
    assert read_or_build(path, small, Conditions(), **arguments) == table
    assert table.summary()["networks"][0]["name"] == "dense"
    other = trace(nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 4)).eval(), torch.zeros(2, 6))
    with pytest.raises(InputError, match="belongs to another network; delete it"):
        read_or_build(path, other, Conditions(), **arguments)
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 9}))
    with pytest.raises(InputError, match=r"cannot be read \(latency table schema 9 is unknown"):
        read_or_build(path, small, Conditions(), **arguments)


def test_knots_are_widths_that_the_search_may_take(network, monkeypatch):
    monkeypatch.setattr(module, "_cell", arithmetic)
    monkeypatch.setattr(module, "_measured", lambda *args: (1.0, 0.0))
    table = build_table(network, Conditions(), round_to=4)
    single = [s for s in table.surfaces if len(s.forms) == 1 and len(s.forms[0].terms) == 1 and not s.forms[0].const]
    assert single
    for surface in single:
        assert all(knot % 4 == 0 for knot in surface.knots[0])


def test_a_network_whose_graph_changes_with_the_batch_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = F.relu(self.a(x))
            return self.b(x if len(x) == 2 else x.tanh())

    odd = trace(Odd().eval(), torch.zeros(2, 4))
    with pytest.raises(InputError, match=r"computes something else with a batch of 1 than with 2"):
        record_calls(odd, Conditions(1))
    assert record_calls(odd, Conditions(2))


def test_a_table_survives_json(network, monkeypatch):
    monkeypatch.setattr(module, "_cell", arithmetic)
    monkeypatch.setattr(module, "_measured", lambda *args: (1.0, 0.5))
    table = build_table(network, Conditions(4, "bfloat16", 2))
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table
