"""Forward passes that take the width of their input for the width of their heads: they are told the right sizes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.errors import CheckpointError, TraceError
from autoprune.network.artifacts.saved import load, model_document, read_document, save_model
from autoprune.network.graph.network import Network
from autoprune.network.pruning import prune
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.sizes import Telling, tell, uncounted
from autoprune.network.surgery.twin import masked_twin, relative_error
from autoprune.network.tracing.counting import count_macs
from autoprune.network.tracing.trace import trace

X = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Attention as many repositories write it: the width of its heads is computed from the width of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = 4, 3**-0.5
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    """A residual attention, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attn, self.head = nn.Linear(12, 12), Attention(), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.attn(x)).mean(1))


class Keeping(Attention):
    """The same attention, whose first forward pass makes calls that later ones need not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.zeros(1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.positions.shape[1] != x.shape[1]:
            self.positions = torch.arange(x.shape[1]).view(1, -1, 1).expand(1, -1, 1).float()
        return super().forward(x + self.positions)


class Parts(nn.Module):
    """Two parts of constant widths, one of which is filtered."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(6, 6), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(self.a(x).relu(), [6, 10], dim=-1)
        return self.c(torch.cat([self.b(left).relu(), right], -1)).mean(1)


def built(kind: type[nn.Module]) -> nn.Module:
    """A model with weights that are always the same."""
    torch.manual_seed(0)
    return kind().eval()


@pytest.fixture(scope="module")
def network() -> Network:
    """The attention, traced and checked."""
    return trace(built(Block), X)


def selection(network: Network) -> dict[str, np.ndarray]:
    """Widths that no width of the input would give by accident: 7 of 12, 3 of 4 heads, 2 of 3 dimensions."""
    return {group.name: np.arange(group.size)[: {12: 7, 4: 3, 3: 2}[group.size]] for group in network.groups}


def difference(network: Network, chosen: dict[str, np.ndarray]) -> float:
    """How far the pruned network's output is from its masked twin's."""
    with torch.no_grad():
        return relative_error(cut(network, chosen)(X), masked_twin(network, chosen)(X))


def test_heads_their_dimensions_and_the_residual_width_can_all_be_pruned(network: Network) -> None:
    assert [f.name for f in network.frozen] == ["head"]
    assert {g.name.partition(":")[2] for g in network.groups} >= {"heads", "dims"}
    chosen = selection(network)
    assert difference(network, chosen) < 1e-5
    widths = {name: len(kept) for name, kept in chosen.items()}
    assert count_macs(cut(network, chosen), (X,)) == network.cost_model.cost("macs", widths)


def test_the_dense_model_stays_as_it_was_and_its_copy_gives_its_output(network: Network) -> None:
    model = built(Block)
    traced = trace(model, X)
    assert type(model.attn) is Attention
    assert torch.equal(traced.model(X), model(X))
    assert isinstance(traced.model.attn, Attention)
    assert isinstance(traced.model.attn, Telling)


def test_a_pruned_network_takes_other_batches_and_lengths(network: Network) -> None:
    small = cut(network, selection(network))
    x = torch.randn(5, 3, 12)
    assert torch.allclose(torch.cat([small(one[None]) for one in x]), small(x), atol=1e-6)


def test_it_is_pickled_copied_and_exported_like_any_other_module(network: Network) -> None:
    small = cut(network, selection(network))
    expected = small(X)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(twin(X), expected)
    program = torch.export.export(small, (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False)
    x = torch.randn(3, 7, 12)
    assert torch.allclose(program.module()(x), small(x), atol=1e-6)


def test_it_is_compiled(network: Network) -> None:
    small = cut(network, selection(network))
    compiled = torch.compile(small, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(X), small(X))


def test_it_is_read_back_by_its_class(network: Network, tmp_path: Path) -> None:
    chosen = selection(network)
    small = cut(network, chosen)
    save_model(tmp_path / "m", small, model_document(network, None, chosen, {}, {}))
    assert set(read_document(tmp_path / "m")["told"]) == {"attn"}
    assert torch.equal(load(tmp_path / "m", lambda: built(Block))(X), small(X))


def test_parts_of_constant_width_are_told_theirs() -> None:
    network = trace(built(Parts), X)
    assert {g.name: g.size for g in network.groups} == {"a": 6, "a:2": 10, "b": 6}
    chosen = {"a": np.array([1, 2]), "a:2": np.array([0, 3, 4, 8, 9]), "b": np.array([5])}
    assert difference(network, chosen) < 1e-5


class Listed(Parts):
    """The widths of the parts are a list that the module keeps."""

    def __init__(self, widths: tuple[int, ...] | list[int] = (6, 10)) -> None:
        super().__init__()
        self.widths = widths

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(self.a(x).relu(), self.widths, dim=-1)
        return self.c(torch.cat([self.b(left).relu(), right], -1)).mean(1)


def test_a_list_of_widths_follows_without_a_new_class(tmp_path: Path) -> None:
    network = trace(built(Listed), X)
    chosen = {"a": np.array([1, 2]), "a:2": np.array([0, 3, 4, 8, 9])}
    small = cut(network, chosen)
    assert not network.told
    assert small.widths == (2, 5)
    assert type(small) is Listed
    assert difference(network, chosen) < 1e-5
    save_model(tmp_path / "m", small, model_document(network, None, chosen, {}, {}))
    assert torch.equal(load(tmp_path / "m", lambda: built(Listed))(X), small(X))


def test_a_module_whose_first_pass_makes_other_calls_is_frozen() -> None:
    model = built(Block)
    model.attn = Keeping()
    with pytest.raises(TraceError, match="its code has a width that does not follow"):
        trace(model.eval(), X)


def test_sizes_for_a_module_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(CheckpointError, match="no module 'other'"):
        tell(built(Block), {"other": {"0": {"2": 3}}})


def test_a_call_that_changes_the_type_is_left_alone() -> None:
    class Bits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(torch.int32).view(-1, 4)

    told = tell(Bits(), {"": {"0": {"1": 2}}})
    assert told(torch.zeros(8)).shape == (4, 2)
    assert F.relu(torch.zeros(2)).shape == (2,)


class Attending(nn.Module):
    """Takes the width of its input for that of its heads, behind layers that calibration listens to."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv = nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(16, 48)
        self.out, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        batch, length, width = tokens.shape
        q, k, v = self.qkv(tokens).reshape(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        return self.head((tokens + self.out(mixed)).mean(1))


def test_hooks_that_listen_to_layers_are_not_counted_among_the_calls_of_the_code():
    torch.manual_seed(0)
    x = torch.randn(96, 3, 8, 8)
    model = Attending().eval()
    network = trace(model, x[:2])
    assert network.told
    cut_alone = prune(network, 0.5)(x)
    repaired = prune(network, 0.5, calibration=[x])
    dense, error = model(x), nn.functional.mse_loss
    assert error(repaired(x), dense) < error(cut_alone, dense)


def test_what_runs_uncounted_keeps_the_sizes_that_its_own_modules_are_told():
    x = torch.randn(4, 3, 8, 8)
    small = prune(trace(Attending().eval(), x), 0.5)
    inner = copy.deepcopy(small)

    class Outer(nn.Module):
        def forward(self, x):
            y = x.reshape(4, 3, 64)
            with uncounted():
                assert torch.equal(inner(x), small(x))
                x.reshape(-1)
            return y.reshape(4, 3, 8, 8)

    outer = tell(Outer(), {"": {"1": {"1": 3}}})
    assert outer(x).shape == x.shape
