"""Attention: whole heads and dimensions of heads go, what stays attends as before, and the files come back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.network.artifacts.layers import layer_table
from autoprune.network.artifacts.saved import load, model_document, read_document, save_model
from autoprune.network.calibration.moments import gather
from autoprune.network.criteria.channels import CRITERIA, score
from autoprune.network.criteria.gradients import gather_fisher, gather_gradients
from autoprune.network.criteria.inputs import Evidence
from autoprune.network.criteria.tables import error_tables
from autoprune.network.graph.network import Network
from autoprune.network.models.torchvision import import_torchvision
from autoprune.network.pruning import prune
from autoprune.network.repair.compensation import compensate
from autoprune.network.surgery.attention import prunable, replace_attention, replaceable, replaced
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.twin import masked_twin, relative_error
from autoprune.network.tracing.trace import trace

X = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0))
MEMORY = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(1))


class Packed(nn.Module):
    """One linear layer for queries, keys and values, split by numbers that the module keeps."""

    def __init__(self, *, fused: bool = True, heads: int = 4, width: int = 6) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale, self.fused = heads, width, width**-0.5, fused
        self.qkv, self.proj = nn.Linear(12, 3 * heads * width), nn.Linear(heads * width, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.head((x + self.proj(y.transpose(1, 2).flatten(2))).mean(1))


class Separate(nn.Module):
    """Queries, keys and values from layers of their own; values have another width, and keys come from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v = nn.Linear(12, 24), nn.Linear(10, 24), nn.Linear(10, 32)
        self.proj = nn.Linear(32, 5)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        parts = (self.q(x), self.k(memory), self.v(memory))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Multihead(nn.Module):
    """torch's own attention, attending to itself or to a memory."""

    def __init__(self, *, cross: bool, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 4, batch_first=True, **options)
        self.cross, self.head = cross, nn.Linear(12, 5)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        other = memory if self.cross else x
        return self.head(self.attn(x, other, other)[0])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


def names(network: Network) -> dict[str, int]:
    return {group.name: group.size for group in network.groups}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
def test_heads_and_dimensions_of_a_packed_attention_are_two_groups_of_one_layer(
    exact: Callable[..., Network], fused: bool
) -> None:
    network = exact(Packed(fused=fused), X)
    assert names(network) == {"qkv:heads": 4, "qkv:dims": 6}
    heads, dims = np.array([0, 2]), np.array([1, 2, 5])
    small: Any = cut(network, {"qkv:heads": heads, "qkv:dims": dims})
    dense: Any = network.model
    assert (small.num_heads, small.head_dim, small.qkv.out_features, small.proj.in_features) == (2, 3, 18, 6)
    keep = [6 * h + d for h in heads for d in dims]
    assert torch.equal(small.qkv.weight[6:], dense.qkv.weight[24:].view(2, 24, 12)[:, keep].flatten(0, 1))
    n, e = 7, 2 * 3
    assert network.cost_model.cost("macs", {"qkv:heads": 2, "qkv:dims": 3}) == (
        n * 12 * 3 * e + 2 * n * n * e + n * e * 12 + 12 * 5
    )


def test_a_head_that_goes_takes_its_products_along_and_the_counts_fall_with_both_widths() -> None:
    cost = trace(Packed().eval(), X).cost_model
    macs = np.array([[cost.cost("macs", {"qkv:heads": h, "qkv:dims": d}) for d in range(1, 7)] for h in range(1, 5)])
    assert (np.diff(macs, axis=0) > 0).all()
    assert (np.diff(macs, axis=1) > 0).all()
    assert cost.share("macs", "qkv:heads").cost("macs", {}) == cost.dense()["macs"] - 12 * 5


def test_separate_projections_share_heads_and_values_have_a_width_of_their_own(exact: Callable[..., Network]) -> None:
    network = exact(Separate(), X, MEMORY)
    assert names(network) == {"q:heads": 4, "q:dims": 6, "v:dims": 8}
    assert network.group("q:heads").producers == ("q", "k", "v")
    assert network.group("q:dims").producers == ("q", "k")


def test_the_default_scale_is_kept_by_the_rows_of_the_queries_alone() -> None:
    network = trace(Packed().eval(), X)
    small: Any = cut(network, {"qkv:dims": np.array([0, 3])})
    dense: Any = network.model
    keep = [6 * h + d for h in range(4) for d in (0, 3)]
    assert torch.allclose(small.qkv.weight[:8], dense.qkv.weight[keep] * (2 / 6) ** 0.5)
    assert torch.allclose(small.qkv.bias[:8], dense.qkv.bias[keep] * (2 / 6) ** 0.5)
    assert torch.equal(small.qkv.weight[8:16], dense.qkv.weight[[24 + k for k in keep]])


def test_queries_whose_origin_is_unclear_keep_their_width_with_the_reason() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk, self.v, self.head = nn.Linear(12, 8), nn.Linear(12, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            q = self.qk(x)  # queries and keys are the same rows
            return self.head(F.scaled_dot_product_attention(q, q, self.v(x)).mean(1))

    network = trace(Shared().eval(), X)
    assert names(network) == {"v": 6}
    assert "scale of the attention" in {f.name: f.reason for f in network.frozen}["qk"]


@pytest.mark.parametrize("cross", [False, True], ids=["to itself", "to a memory"])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 10, "vdim": 10}]
)
def test_heads_of_torchs_own_attention_are_pruned(
    exact: Callable[..., Network], cross: bool, options: dict[str, Any]
) -> None:
    if "kdim" in options and not cross:
        pytest.skip("keys of another width attend to a memory")
    memory = MEMORY if "kdim" in options else torch.cat([MEMORY, MEMORY[..., :2]], -1)
    network = exact(Multihead(cross=cross, **options), X, *([memory] if cross else []))
    assert names(network) == {"attn:heads": 4, "attn:dims": 3, "attn.out_proj": 12}


def test_attention_weights_that_are_returned_averaged_keep_the_heads() -> None:
    class Returning(Multihead):
        def forward(self, x: Tensor, memory: Tensor | None = None) -> Any:
            y, weights = self.attn(x, x, x)
            return self.head(y), weights

    network = trace(Returning(cross=False).eval(), X)
    assert names(network) == {"attn": 3, "attn.out_proj": 12}
    (frozen,) = [f for f in network.frozen if f.name == "attn:heads"]
    assert frozen.size == 4
    assert "reduced over channels" in frozen.reason


def test_an_encoder_of_torchs_own_layers_prunes_heads_dimensions_hidden_and_residual_widths(
    pruned: Callable[..., nn.Module],
) -> None:
    network = trace(Encoder().eval(), X)
    layers = {"self_attn:heads": 4, "self_attn:dims": 4, "linear1": 24}
    expected = {f"encoder.layers.{i}.{name}": size for i in (0, 1) for name, size in layers.items()}
    assert names(network) == expected | {"embed": 16}
    assert network.group("embed").approximate is not None
    pruned(network, X, twin=False)
    selection = {g.name: np.arange(g.size // 2) for g in network.groups if not g.approximate}
    with torch.no_grad():
        small, twin = cut(network, selection).eval(), masked_twin(network, selection).eval()
        assert relative_error(small(X), twin(X)) < 1e-5


def test_the_users_model_keeps_its_own_attention_modules() -> None:
    model = Multihead(cross=False).eval()
    state = copy.deepcopy(model.state_dict())
    network = trace(model, X)
    assert type(model.attn) is nn.MultiheadAttention
    assert replaceable(model) == ["attn"]
    assert replaced(network.model) == ["attn"]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    plain = nn.Sequential(nn.Linear(3, 3))
    assert prunable(plain) is plain


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "per head", "padding", "both", "causal"])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 10, "vdim": 9}]
)
def test_the_equivalent_attention_gives_the_results_of_torchs_own(
    batch_first: bool, need_weights: bool, mask: str, options: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(3)
    dense = nn.MultiheadAttention(12, 4, batch_first=batch_first, **options).eval()
    with torch.no_grad():
        for p in dense.parameters():
            p.normal_(0, 0.4, generator=generator)
    ours = replace_attention(copy.deepcopy(nn.ModuleList([dense])))[0]  # type: ignore[index]
    assert list(ours.state_dict()) == list(dense.state_dict())
    shapes = ((5, 12), (7, options.get("kdim", 12)), (7, options.get("vdim", 12)))
    q, k, v = (torch.randn(3, n, width, generator=generator) for n, width in shapes)
    keywords: dict[str, Any] = {"need_weights": need_weights}
    if mask in ("bool", "both"):
        keywords["attn_mask"] = torch.rand(5, 7, generator=generator) > 0.7
        keywords["attn_mask"][:, 0] = False
    if mask == "per head":
        keywords["attn_mask"] = torch.randn(12, 5, 7, generator=generator)
    if mask in ("padding", "both"):
        keywords["key_padding_mask"] = torch.arange(7).expand(3, 7) > torch.tensor([[6], [4], [2]])
    if mask == "causal":
        keywords |= {"attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(1), "is_causal": "add_bias_kv" not in options}
        if need_weights or "add_bias_kv" in options:
            keywords["is_causal"] = False
    inputs = (q, k, v) if batch_first else tuple(t.transpose(0, 1) for t in (q, k, v))
    with torch.no_grad():
        expected, found = dense(*inputs, **keywords), ours(*inputs, **keywords)
    assert torch.allclose(found[0], expected[0], atol=1e-5)
    assert (found[1] is None) == (expected[1] is None) == (not need_weights)
    assert found[1] is None or torch.allclose(found[1], expected[1], atol=1e-5)


def test_unbatched_inputs_and_weights_of_every_head_come_out_as_torchs_own() -> None:
    dense = nn.MultiheadAttention(12, 4).eval()
    ours = replace_attention(copy.deepcopy(nn.ModuleList([dense])))[0]  # type: ignore[index]
    x, padding = X[0], torch.tensor([False] * 5 + [True] * 2)
    with torch.no_grad():
        for keywords in ({}, {"average_attn_weights": False}, {"key_padding_mask": padding}):
            expected, found = dense(x, x, x, **keywords), ours(x, x, x, **keywords)
            assert [t.shape for t in found] == [t.shape for t in expected]
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
        with pytest.raises(RuntimeError, match="is_causal needs attn_mask"):
            ours(x, x, x, is_causal=True)


def test_padded_sequences_do_not_take_the_fused_path_around_the_equivalent_attention() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 4, 24, batch_first=True), 1).eval()
    ours = prunable(encoder)
    calls: list[int] = []
    ours.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr,index,operator]
    padding = torch.arange(7).expand(2, 7) > torch.tensor([[6], [3]])
    expected = encoder(X, src_key_padding_mask=padding)  # with gradients: without nested tensors
    with torch.no_grad():
        found = ours(X, src_key_padding_mask=padding)
    assert calls == [1]
    assert torch.allclose(found[~padding], expected[~padding], atol=1e-5)


@pytest.mark.parametrize("name", ["ShiftedWindowAttention", "ShiftedWindowAttentionV2"])
def test_the_equivalent_window_attention_gives_torchvisions_results(name: str) -> None:
    swin = import_torchvision().models.swin_transformer
    torch.manual_seed(0)
    dense = getattr(swin, name)(12, [4, 4], [2, 2], 3).eval()
    with torch.no_grad():
        for p in dense.parameters():
            p.normal_(0.2, 0.4)
    ours = replace_attention(copy.deepcopy(nn.ModuleList([dense])))[0]  # type: ignore[index]
    assert list(ours.state_dict()) == list(dense.state_dict())
    for height, width in ((8, 8), (4, 8), (7, 10), (4, 4)):
        x = torch.randn(2, height, width, 12)
        with torch.no_grad():
            assert torch.allclose(ours(x), dense(x), atol=1e-5)


@pytest.mark.parametrize("build", [Packed, Encoder, lambda: Multihead(cross=False)], ids=["packed", "encoder", "torch"])
def test_a_saved_model_with_fewer_heads_loads_into_its_original_class(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    network = trace(build().eval(), X)
    selection = {g.name: np.arange(g.size // 2) for g in network.groups}
    small = cut(network, selection).eval()
    save_model(tmp_path / "m", small, model_document(network, None, selection, {}, {}))
    loaded = load(tmp_path / "m", build)
    assert type(loaded) is type(network.model)
    assert replaced(loaded) == read_document(tmp_path / "m")["replaced"] == replaced(network.model)
    with torch.no_grad():
        assert torch.allclose(loaded(X), small(X), atol=1e-6)


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    torch.manual_seed(0)
    network = trace(Packed().eval(), X)
    x = torch.randn(64, 7, 12)
    batches = [(x, torch.arange(64) % 5)]
    gradients = gather_gradients(network, batches, F.cross_entropy)
    fisher = gather_fisher(network, batches, F.cross_entropy)
    return Evidence(network, gather(network, [x]), gradients, 0, fisher)


def test_every_criterion_scores_heads_and_dimensions(evidence: Evidence) -> None:
    scores = score(evidence, CRITERIA)
    for by_group in scores.values():
        assert {name: len(values) for name, values in by_group.items()} == {"qkv:heads": 4, "qkv:dims": 6}


def test_a_heads_l1_score_is_the_sum_over_its_channels(evidence: Evidence) -> None:
    weight = evidence.parameter("qkv.weight").double().abs().sum(1).view(3, 4, 6)
    for name, totals in (("qkv:heads", weight.sum((0, 2))), ("qkv:dims", weight.sum((0, 1)))):
        assert np.allclose(score(evidence, ["l1"])["l1"][name], (totals / totals.mean()).numpy())


def test_the_error_table_of_heads_is_the_refit_error_of_their_blocks_of_channels(evidence: Evidence) -> None:
    """Two heads that go lose what the least-squares refit of the projection to the other two loses."""
    scores = score(evidence, ["l2"])
    table = error_tables(evidence, scores)["qkv:heads"]["l2"]
    assert len(table) == 5
    assert table[4] == 0.0
    order = np.argsort(-scores["l2"]["qkv:heads"], kind="stable")
    moments = evidence.statistics["proj"]
    matrix = moments.covariance()[0].double()
    matrix += 1e-4 * matrix.diagonal().mean() * torch.eye(24)
    weight = evidence.parameter("proj.weight").double()
    keep = torch.tensor([6 * int(h) + d for h in order[:2] for d in range(6)])
    refitted = weight @ matrix[:, keep] @ torch.linalg.inv(matrix[keep][:, keep])
    total = (weight @ matrix @ weight.T).trace()
    left = total - (refitted @ matrix[keep][:, keep] @ refitted.T).trace()
    assert table[2] == pytest.approx(float(left / total), rel=1e-4)


def test_compensation_of_the_output_projection_lowers_the_error(evidence: Evidence) -> None:
    network = evidence.network
    selection = {"qkv:heads": np.array([0, 3])}
    x = torch.randn(64, 7, 12, generator=torch.Generator().manual_seed(9))
    bare = cut(network, selection).eval()
    fitted = copy.deepcopy(bare)
    compensate(network, fitted, selection, evidence.statistics)
    with torch.no_grad():
        dense = network.model(x)
        assert (fitted(x) - dense).square().mean() < 0.7 * (bare(x) - dense).square().mean()


def test_refits_keep_the_scale_of_the_queries() -> None:
    """A refit to the dense queries themselves would undo what surgery did for the scale."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), Packed()).eval()
    network = trace(model, X)
    x = [torch.randn(64, 7, 12)]
    bare = prune(network, {"2.qkv:dims": 0.5})
    fitted = prune(network, {"2.qkv:dims": 0.5}, calibration=x)
    rows = slice(0, 12)
    before, after = (m.get_parameter("2.qkv.weight").detach()[rows] for m in (bare, fitted))
    assert torch.allclose(before, after, atol=1e-2)


def test_the_table_of_layers_counts_the_rows_that_stay() -> None:
    network = trace(Packed().eval(), X)
    selection = {"qkv:heads": np.array([0]), "qkv:dims": np.array([1, 2])}
    rows = {row["module"]: row for row in layer_table(network, selection)}
    assert (rows["qkv"]["width_before"], rows["qkv"]["width_after"]) == (72, 6)
    assert rows["proj"]["params_after"] == 2 * 12 + 12


class Remembering(nn.Module):
    """Attention, a buffer, and a recurrent layer, which keeps a list of its own parameters."""

    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.BatchNorm1d(8)
        self.recurrent = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x):
        x = self.norm(self.attention(x, x, x, need_weights=False)[0].transpose(1, 2)).transpose(1, 2)
        return self.recurrent(x)[0]


def test_a_copy_with_our_attention_has_the_very_tensors_of_the_model():
    model, x = Remembering().eval(), torch.randn(2, 5, 8)
    ours = prunable(model)
    assert ours is not model
    assert type(model.attention) is nn.MultiheadAttention
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
        model.norm.running_mean.fill_(0.5)
        torch.testing.assert_close(ours(x), model(x))
        model.double()  # new buffers, and new data of every parameter
        torch.testing.assert_close(ours(x.double()), model(x.double()))
    ours.train()
    assert not any(module.training for module in model.modules())
