"""Transformers: hidden widths of their MLPs are pruned, attention is counted, what stays has a reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoprune.network.graph.network import Network
from autoprune.network.models.torchvision import import_torchvision
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.twin import masked_twin, relative_error
from autoprune.network.tracing.counting import count_macs, count_params
from autoprune.network.tracing.trace import trace
from autoprune.network.tracing.verify import halved

models = import_torchvision().models


def vit() -> nn.Module:
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )


def swin() -> nn.Module:
    return models.SwinTransformer(
        patch_size=[4, 4], embed_dim=32, depths=[1, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=10
    )


def halve(network: Network) -> tuple[nn.Module, nn.Module, dict[str, int]]:
    selection = halved(network, [group.name for group in network.groups])
    widths = {name: len(kept) for name, kept in selection.items()}
    return cut(network, selection).eval(), masked_twin(network, selection).eval(), widths


@pytest.mark.parametrize("build", [vit, swin])
def test_heads_their_dimensions_mlps_and_the_residual_width_of_a_transformer_are_pruned_exactly(build: object) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    network = trace(build().eval(), x)  # type: ignore[operator]
    names = [group.name for group in network.groups]
    blocks = 2 if build is vit else 3
    assert [sum(part in name for name in names) for part in (":heads", ":dims", ".mlp.")] == [blocks] * 3
    assert [f.name.rpartition(".")[2] for f in network.frozen] == ["head"], "nothing but the classifier is frozen"
    assert network.cost_model.dense()["macs"] == count_macs(network.model, (x,))
    small, _, widths = halve(network)
    assert small(x).shape == (2, 10)
    costs = network.cost_model.costs(widths)
    assert (costs["macs"], costs["params"]) == (count_macs(small, (x,)), count_params(small))


def test_attention_has_its_closed_form_and_queries_make_up_for_its_scale() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 12)
            self.out = nn.Linear(12, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))

    x = torch.randn(2, 7, 6)
    network = trace(Attend().eval(), x)
    projections = 7 * 6 * (8 + 8 + 12)
    assert network.cost_model.dense()["macs"] == projections + 7 * 7 * 8 + 7 * 7 * 12 + 7 * 12 * 5
    assert [(group.name, group.size) for group in network.groups] == [("q", 8), ("v", 12)]
    assert network.group("q").producers == ("q", "k")
    small, twin, widths = halve(network)
    with torch.no_grad():
        assert relative_error(small(x), twin(x)) < 1e-5
    assert network.cost_model.cost("macs", widths) == count_macs(small, (x,))


def test_products_in_an_operator_without_a_rule_are_counted_as_they_are() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 6), nn.Linear(6, 3)
            self.mix, self.scale = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.ones(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.second(self.first(x).relu())
            return self.head(torch.einsum("bi,ij,j->bj", y, self.mix, self.scale))

    x = torch.randn(2, 6)
    network = trace(Mixer().eval(), x)
    assert network.cost_model.dense()["macs"] == count_macs(network.model, (x,)) == 6 * 16 + 16 * 6 + 36 + 6 * 3
    assert [group.name for group in network.groups] == ["first"]
    assert any("36 MACs are spent in operators without a rule" in note for note in network.notes)


def test_rows_looked_up_by_number_stay_and_rolled_space_does_no_harm() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 12))
            self.conv = nn.Conv2d(3, 12, 3, padding=1)
            self.head = nn.Linear(12, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = self.table[torch.tensor([0, 2, 4])]  # (3, 12)
            y = torch.roll(self.conv(x), (1, 1), (2, 3)).masked_fill(x[:, :1] > 1, 0.0)
            return self.head(y.mean((2, 3)) + rows.sum(0))

    network = trace(Table().eval(), torch.randn(2, 3, 8, 8))
    assert [(group.name, group.size) for group in network.groups] == [("conv", 12)]
    small, twin, _ = halve(network)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert relative_error(small(x), twin(x)) < 1e-5


def test_a_vision_transformer_costs_its_closed_form_at_every_width() -> None:
    network = trace(vit().eval(), torch.randn(2, 3, 32, 32))
    patches, tokens, blocks = 16, 17, 2

    def macs(residual: int, heads: int, dims: int, hidden: int) -> int:
        inner = heads * dims
        block = tokens * (4 * residual * inner + 2 * residual * hidden) + 2 * tokens**2 * inner
        return patches * residual * 3 * 8 * 8 + blocks * block + residual * 10

    assert network.cost_model.dense()["macs"] == macs(64, 4, 16, 128)
    widths = {":heads": 3, ":dims": 7, ".mlp.0": 50, "conv_proj": 40}
    chosen = {g.name: next(n for end, n in widths.items() if g.name.endswith(end)) for g in network.groups}
    assert network.cost_model.cost("macs", chosen) == macs(40, 3, 7, 50)
