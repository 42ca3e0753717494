"""Masks: which weights, what they cost, which positions stay, and that zeros stay zero."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.errors import InputError, PolicyError
from autoprune.network.artifacts import sparse as artifacts_sparse
from autoprune.network.artifacts.sparse import to_semi_structured
from autoprune.network.pruning import prune
from autoprune.network.surgery.masks import (
    MaskWeight,
    grid_widths,
    keep,
    mask_tensors,
    mask_weights,
    masked,
    masked_layers,
    pair_widths,
    sparsities,
    zeros_kept,
)
from autoprune.network.tracing.trace import trace


class Mixed(nn.Module):
    """Convolutions of every kind, a linear layer, all on 3-channel images."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(16, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(self.up(F.relu(self.grouped(F.relu(self.depth(x))))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Reader(nn.Module):
    """An embedding, a recurrent layer and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.memory = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.memory(self.words(x))
        mixed, _ = self.attention(hidden, hidden, hidden, need_weights=False)
        return self.head(mixed.mean(1))  # type: ignore[no-any-return]


def mixed(pattern: str = "unstructured") -> Any:
    torch.manual_seed(0)
    return trace(Mixed().eval(), torch.zeros(2, 3, 8, 8), pruning=pattern)


def weight(shape: tuple[int, ...], in_dim: int = 1) -> MaskWeight:
    return MaskWeight("w", "w.weight", "w", "conv", shape, in_dim, 1, 4, "stage1")


def test_every_weight_that_is_multiplied_is_a_group_and_the_dense_costs_are_those_of_channels() -> None:
    net = mixed()
    channels = trace(net.model, torch.zeros(2, 3, 8, 8))
    sizes = {name: p.numel() for name, p in net.model.named_parameters() if p.ndim > 1}
    assert {f"{group.name}.weight": group.size for group in net.groups} == sizes
    assert net.cost_model.dense() == channels.cost_model.dense()
    assert net.frozen == ()


def test_costs_are_the_non_zeros_of_each_weight_times_where_they_are_used() -> None:
    net = mixed()
    uses = {"first": 64, "depth": 64, "grouped": 16, "up": 16, "head": 1}
    kept = {group.name: group.size // 3 for group in net.groups}
    gone = {name: group.size - kept[name] for name, group in ((g.name, g) for g in net.groups)}
    dense, costs = net.cost_model.dense(), net.cost_model.costs(kept)
    assert dense["macs"] - costs["macs"] == sum(uses[name] * count for name, count in gone.items())
    assert dense["params"] - costs["params"] == sum(gone.values())
    assert dense["size_bytes"] - costs["size_bytes"] == 4 * sum(gone.values())
    assert dense["activation_bytes"] == costs["activation_bytes"]


def test_a_masked_copy_has_the_counted_non_zeros_and_the_dense_model_is_left_alone() -> None:
    net = mixed()
    before = {name: p.clone() for name, p in net.model.named_parameters()}
    selection = {g.name: np.arange(0, g.size, 3) for g in net.groups}
    twin = masked(net, selection)
    for name, mask in mask_tensors(net, selection).items():
        assert torch.equal(twin.get_parameter(name), before[name] * mask)
    assert all(torch.equal(p, before[name]) for name, p in net.model.named_parameters())
    found = sparsities(twin, net)
    assert {name: entry["nonzero"] for name, entry in found.items()} == {n: len(k) for n, k in selection.items()}
    rows = {row["module"]: row for row in masked_layers(net, selection)}
    costs = net.cost_model.costs({name: len(kept) for name, kept in selection.items()})
    assert sum(row["macs_after"] for row in rows.values()) == costs["macs"]
    assert rows["head"]["params_before"] == 25
    assert rows["head"]["params_after"] == 7 + 5


def test_two_of_every_four_consecutive_input_channels_stay() -> None:
    shaped = weight((6, 8, 3, 3))
    scores = np.random.default_rng(0).uniform(size=shaped.size).astype(np.float32)
    kept = keep(shaped, scores, shaped.size // 2, "2:4")
    mask = np.zeros(shaped.size, bool)
    mask[kept] = True
    quads = np.moveaxis(mask.reshape(shaped.shape), 1, -1).reshape(-1, 4)
    assert (quads.sum(1) == 2).all()
    values = np.moveaxis(scores.reshape(shaped.shape), 1, -1).reshape(-1, 4)
    assert (np.where(quads, values, 9).min(1) >= np.where(quads, -9, values).max(1)).all()
    linear = keep(weight((2, 8)), np.arange(16.0), 8, "2:4")
    assert linear.tolist() == [2, 3, 6, 7, 10, 11, 14, 15]  # neighbours of the reduction dimension


def test_2_to_4_leaves_weights_whole_whose_inputs_do_not_come_in_fours_and_says_why() -> None:
    net = mixed("2:4")
    reasons = {frozen.name: frozen.reason for frozen in net.frozen}
    assert set(reasons) == {"first", "depth"}
    assert "3 input channels" in reasons["first"]
    assert "1 input channel," in reasons["depth"]
    assert {group.name for group in net.groups} == {"grouped", "up", "head"}
    with pytest.raises(PolicyError, match="half or all"):
        keep(mask_weights(net)["head"], np.zeros(20), 7, "2:4")


def test_recurrent_and_attention_weights_are_masked_and_embeddings_are_not() -> None:
    net = trace(Reader().eval(), torch.zeros(2, 5, dtype=torch.long), pruning="unstructured")
    names = {group.name for group in net.groups}
    assert {"memory.weight_ih_l0", "memory.weight_hh_l0", "attention.in_proj_weight", "head"} <= names
    assert {f.name: "looked up" in f.reason for f in net.frozen} == {"words": True}
    selection = {g.name: np.arange(g.size // 2) for g in net.groups}
    twin = masked(net, selection)
    assert twin(torch.zeros(3, 5, dtype=torch.long)).shape == (3, 3)
    assert all(entry["nonzero"] <= entry["size"] // 2 for entry in sparsities(twin, net).values())


def test_a_recurrent_network_is_masked_and_repaired() -> None:
    torch.manual_seed(0)
    net = trace(Reader().eval(), torch.zeros(2, 5, dtype=torch.long), pruning="2:4")
    x = torch.randint(0, 11, (64, 5), generator=torch.Generator().manual_seed(1))
    bare = prune(net, 0.5)
    repaired = prune(net, 0.5, calibration=[x])
    for name in ("memory.weight_ih_l0", "memory.weight_hh_l0", "attention.in_proj_weight"):
        quads = (repaired.get_parameter(name) != 0).reshape(-1, 4).sum(1)
        assert (quads == 2).all()
    with torch.no_grad():
        wanted = net.model(x)
        assert (repaired(x) - wanted).square().mean() < (bare(x) - wanted).square().mean()


def test_a_weight_that_is_an_embedding_too_stays_whole() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(12, 8)
            self.inner = nn.Linear(8, 8)
            self.head = nn.Linear(8, 12, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(self.words(x)))  # type: ignore[no-any-return]

    net = trace(Tied().eval(), torch.zeros(2, 5, dtype=torch.long), pruning="unstructured")
    assert [group.name for group in net.groups] == ["inner"]
    assert ["looked up" in frozen.reason for frozen in net.frozen] == [True]


def test_a_network_without_removable_channels_can_be_masked() -> None:
    net = trace(nn.Linear(6, 3), torch.zeros(2, 6), pruning="unstructured")
    assert [group.size for group in net.groups] == [18]


def test_an_unknown_way_of_pruning_is_refused() -> None:
    with pytest.raises(InputError, match=r"unknown pruning 'unstructurd'.*unstructured"):
        trace(nn.Linear(6, 3), torch.zeros(2, 6), pruning="unstructurd")


def test_of_equal_scores_the_first_weights_stay() -> None:
    flat = weight((2, 4))
    assert keep(flat, np.ones(8), 3, "unstructured").tolist() == [0, 1, 2]
    assert keep(flat, np.array([1, 2, 2, 2, 3, 0, 0, 0.0]), 3, "unstructured").tolist() == [1, 2, 4]
    assert keep(flat, np.ones(8), 4, "2:4").tolist() == [0, 1, 4, 5]
    assert keep(flat, np.ones(8), 8, "2:4").tolist() == list(range(8))


@pytest.mark.parametrize("size", [1, 2, 7, 400, 36_864])
def test_the_grid_of_ratios_rises_within_its_ends(size: int) -> None:
    widths = grid_widths(size, step=0.05, min_ratio=0.0, max_ratio=0.98)
    assert list(widths) == sorted(set(widths))
    assert widths[0] == max(1, round(size * 0.02))
    assert widths[-1] == size
    assert grid_widths(400, step=0.25, min_ratio=0.1, max_ratio=0.8) == (80, 100, 200, 300, 360)
    assert pair_widths(8) == (4, 8)
    assert pair_widths(8, min_ratio=0.5) == (4,)
    assert pair_widths(8, min_ratio=0.1, max_ratio=0.4) == ()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_zeros_stay_exactly_zero_under_momentum_and_weight_decay(kind: str) -> None:
    net = mixed()
    selection = {g.name: np.arange(0, g.size, 2) for g in net.groups}
    model, found = masked(net, selection), mask_tensors(net, selection)
    start = {name: p.clone() for name, p in model.named_parameters()}
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
        if kind == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    )
    generator = torch.Generator().manual_seed(0)
    with zeros_kept(model.train(), found):
        for _ in range(4):
            optimizer.zero_grad()
            x = torch.randn(8, 3, 8, 8, generator=generator)
            F.cross_entropy(model(x), torch.arange(8) % 5).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    for name, mask in found.items():
        parameter = model.get_parameter(name)
        assert not parameter[~mask].any()
        assert not torch.equal(parameter, start[name])
    optimizer.zero_grad()
    model(torch.randn(2, 3, 8, 8, generator=generator)).sum().backward()
    gradient = model.get_parameter("head.weight").grad
    assert gradient is not None
    assert gradient[~found["head.weight"]].any()  # free again


def test_semi_structured_needs_2_to_4_weights_a_gpu_and_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(InputError, match="no linear layer of the model has a 2:4 weight"):
        to_semi_structured(model)
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    with pytest.raises(InputError, match=r"0 lies on cpu; semi-structured kernels need a CUDA device"):
        to_semi_structured(model)
    converted: list[Tensor] = []

    def record(dense: Tensor) -> Tensor:
        converted.append(dense)
        return dense

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", record)
    monkeypatch.setattr(artifacts_sparse, "_check_kernel", lambda path, weight: None)
    wanted = model[0].weight.detach().clone()
    assert to_semi_structured(model) == ["0"]
    assert len(converted) == 1
    assert torch.equal(converted[0], wanted)


def test_layers_of_a_shape_that_sparse_kernels_do_not_take_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[:, ::2] = 0
    before = [layer.weight for layer in (model[0], model[2])]
    monkeypatch.setattr(artifacts_sparse, "_check_kernel", lambda path, weight: None)

    def sparse(dense: Tensor, error: str = "") -> Tensor:
        warnings.warn("The PyTorch API of SparseSemiStructuredTensor is in prototype stage", UserWarning, stacklevel=1)
        if error or len(dense) == 10:
            # torch's own words
            raise RuntimeError(error or f"{dense.shape} is not supported! Both dimensions must be larger or equal than")
        return dense

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", partial(sparse, error="cuSPARSELt failed"))
    with pytest.raises(RuntimeError, match="cuSPARSELt failed"):
        to_semi_structured(model)
    assert model[0].weight is before[0]
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", sparse)
    assert to_semi_structured(model) == ["0"]
    assert model[2].weight is before[1]
    with pytest.raises(InputError, match=r"has a shape that semi-structured kernels take: \[\(10, 16\)\]"):
        to_semi_structured(nn.Sequential(model[2]))


class _OnGpu:
    """Stands for a weight on a CUDA device."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.device, self.dtype = torch.device("cuda:0"), dtype


def test_semi_structured_refuses_old_gpus_and_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(InputError, match=r"compute capability \(7, 5\)"):
        artifacts_sparse._check_kernel("0", _OnGpu(torch.float16))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(InputError, match=r"0 is torch.float32"):
        artifacts_sparse._check_kernel("0", _OnGpu(torch.float32))  # type: ignore[arg-type]
    artifacts_sparse._check_kernel("0", _OnGpu(torch.bfloat16))  # type: ignore[arg-type]
