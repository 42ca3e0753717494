"""Criteria for single weights, the refit under masks and the error tables, against closed forms."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.errors import DataError, PolicyError
from autoprune.network.calibration.moments import gather
from autoprune.network.calibration.targets import gather_targets, refittable_layers
from autoprune.network.criteria.gathering import Batches, gather_evidence
from autoprune.network.criteria.gradients import gather_weight_gradients
from autoprune.network.criteria.inputs import Evidence
from autoprune.network.criteria.weights import WEIGHT_CRITERIA, weight_scores, weight_tables
from autoprune.network.repair.compensation import layer_moments
from autoprune.network.repair.masked import repair_masked
from autoprune.network.repair.masked_compensation import compensate_masked, masked_solve, refit_masked
from autoprune.network.surgery.masks import keep, mask_tensors, mask_weights, masked
from autoprune.network.tracing.trace import trace
from autoprune.policy import Group


class Small(nn.Module):
    """A convolution, a batch norm, a depthwise convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(F.relu(self.norm(self.conv(x))))
        return self.head(F.relu(x).mean((2, 3)))  # type: ignore[no-any-return]


def inputs(count: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(4, 4, generator=generator)
    return torch.einsum("bchw,cd->bdhw", torch.randn(count, 4, 6, 6, generator=generator), mixing)


def labelled() -> list[tuple[Tensor, Tensor]]:
    x = inputs()
    y = torch.arange(64) % 4
    return [(x[:32], y[:32]), (x[32:], y[32:])]


@pytest.fixture(scope="module")
def net() -> Any:
    torch.manual_seed(0)
    return trace(Small().eval(), torch.zeros(2, 4, 6, 6), pruning="unstructured")


@pytest.fixture(scope="module")
def evidence(net: Any) -> Evidence:
    return gather_evidence(net, Batches.of(labelled()), list(WEIGHT_CRITERIA), loss=F.cross_entropy, seed=0)


def moments_of(evidence: Evidence, path: str) -> tuple[Any, Any, Tensor]:
    links = next(links for links in evidence.network.links if links.module == path and links.layer.kind != "norm")
    moments = evidence.statistics[path]
    return links, moments, layer_moments(moments, links)


def test_conjugate_gradients_solve_the_normal_equations_of_every_support() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 12, 12, generator=generator, dtype=torch.float64)
    matrix = root @ root.transpose(1, 2) + torch.eye(12, dtype=torch.float64)
    right = torch.randn(2, 12, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 12, 5, generator=generator) < 0.6
    mask[1, :, 2] = False  # an output that keeps nothing
    found = masked_solve(matrix, right, mask, torch.zeros_like(right), steps=200)
    for g in range(2):
        for n in range(5):
            stay = mask[g, :, n]
            exact = torch.linalg.solve(matrix[g][stay][:, stay], right[g, stay, n])
            assert torch.allclose(found[g, stay, n], exact, rtol=1e-3, atol=1e-5)
            assert not found[g, ~stay, n].any()


def test_a_full_mask_gives_the_dense_weight_back(evidence: Evidence) -> None:
    links, moments, _ = moments_of(evidence, "conv")
    weight = evidence.parameter("conv.weight")
    mask = torch.ones_like(weight, dtype=torch.bool)
    refitted = refit_masked(weight, moments, links, mask, ridge=1e-3, recalibrated=True)
    assert torch.allclose(refitted, weight, atol=1e-5)


@pytest.mark.parametrize("path", ["conv", "depth", "head"])
def test_a_refit_lowers_the_error_of_the_layers_output(evidence: Evidence, path: str) -> None:
    links, moments, matrix = moments_of(evidence, path)
    weight = evidence.parameter(f"{path}.weight")
    mask = weight.abs() >= weight.abs().median()
    refitted = refit_masked(weight, moments, links, mask, ridge=1e-4, recalibrated=True)
    groups, d = matrix.shape[:2]

    def error(other: Tensor) -> float:
        gone = (weight - other).reshape(groups, -1, d)
        return float((gone @ matrix * gone).sum())

    assert not refitted[~mask].any()
    assert error(refitted) < error(weight * mask)


def test_the_repair_brings_the_networks_output_nearer_and_leaves_the_zeros(net: Any, evidence: Evidence) -> None:
    scores = weight_scores(evidence, ["l2"])["l2"]
    weights = mask_weights(net)
    selection = {n: keep(w, scores[n], w.size // 2, "unstructured") for n, w in weights.items()}
    found, x = mask_tensors(net, selection), inputs()

    def distance(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model.eval()(x) - net.model(x)).square().mean())

    bare, cached, refitted = (masked(net, selection) for _ in range(3))
    repair_masked(net, cached, selection, evidence.statistics, None)
    repair_masked(net, refitted, selection, evidence.statistics, gather_targets(net, x))
    assert distance(cached) < distance(bare)
    assert distance(refitted) < 0.5 * distance(bare)
    for model in (cached, refitted):
        assert not any(model.get_parameter(name)[~mask].any() for name, mask in found.items())


def test_the_bias_takes_up_the_mean_of_what_went(net: Any, evidence: Evidence) -> None:
    selection = {"head": np.arange(0, 32, 2)}
    model = masked(net, selection)
    compensate_masked(net, model, selection, evidence.statistics)
    mean = evidence.statistics["head"].mean[0]
    dense = net.model.head.weight @ mean + net.model.head.bias
    own = model.get_parameter("head.weight") @ mean + model.get_parameter("head.bias")
    assert torch.allclose(own, dense, atol=1e-4)


def test_scores_are_those_of_their_formulas(net: Any, evidence: Evidence) -> None:
    scores = weight_scores(evidence, list(WEIGHT_CRITERIA))
    weight = evidence.parameter("conv.weight").double()
    flat = weight.reshape(8, 36)
    moments = evidence.statistics["conv"]
    gram = moments.gram[0].double()
    power = (flat @ gram * flat).sum()
    wanted = flat.abs() * gram.diagonal().sqrt() / power.sqrt()
    assert np.allclose(scores["activation"]["conv"], wanted.reshape(-1).numpy(), rtol=1e-4)
    covariance = moments.covariance()[0].double()  # a batch norm follows
    inverse = torch.linalg.inv(covariance + 1e-3 * covariance.diagonal().mean() * torch.eye(36))
    power = (flat @ covariance * flat).sum()
    wanted = flat.square() / inverse.diagonal() / power
    assert np.allclose(scores["obs"]["conv"], wanted.reshape(-1).numpy(), rtol=1e-3)
    assert np.allclose(scores["l1"]["conv"], flat.abs().reshape(-1).numpy())
    assert scores["lamp"]["conv"].max() == 1.0
    assert (np.argsort(scores["lamp"]["conv"]) == np.argsort(flat.abs().reshape(-1).numpy())).all()
    again = weight_scores(replace(evidence, seed=0), ["random"])["random"]["head"]
    assert (again == scores["random"]["head"]).all()
    assert (weight_scores(replace(evidence, seed=1), ["random"])["random"]["head"] != again).any()


def test_taylor_is_the_mean_squared_product_of_weight_and_gradient(net: Any, evidence: Evidence) -> None:
    squares = []
    for x, y in labelled():
        value = F.cross_entropy(net.model(x), y)
        (gradient,) = torch.autograd.grad(value, [net.model.head.weight])
        squares.append((net.model.head.weight.detach() * gradient).square())
    wanted = torch.stack(squares).mean(0).reshape(-1).numpy()
    assert np.allclose(weight_scores(evidence, ["taylor"])["taylor"]["head"], wanted, rtol=1e-4)
    with pytest.raises(PolicyError, match="needs gradients"):
        weight_scores(replace(evidence, gradients={}), ["taylor"])
    with pytest.raises(DataError, match="no labelled calibration images"):
        gather_weight_gradients(net, [], F.cross_entropy)


def test_layers_without_statistics_are_ranked_by_magnitude_and_compare_over_layers(net: Any) -> None:
    scores = weight_scores(Evidence(net), ["obs", "activation"])
    for by_group in scores.values():
        order = np.argsort(by_group["conv"], kind="stable")
        assert (order == np.argsort(np.abs(net.model.conv.weight.detach().numpy()).reshape(-1), kind="stable")).all()
    assert scores["obs"]["conv"].sum() == pytest.approx(1.0, abs=1e-5)


def test_criteria_that_rank_whole_channels_and_scores_that_are_not_finite_are_refused(net: Any) -> None:
    with pytest.raises(PolicyError, match=r"'fpgm' does not rank single weights"):
        weight_scores(Evidence(net), ["fpgm"])
    broken = trace(Small().eval(), torch.zeros(2, 4, 6, 6), pruning="unstructured")
    with torch.no_grad():
        broken.model.get_parameter("head.weight")[0, 0] = float("nan")
    with pytest.raises(PolicyError, match=r"not finite for group 'head'"):
        weight_scores(Evidence(broken), ["l2"])


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_error_tables_fall_with_the_number_of_weights_and_end_at_zero(net: Any, pattern: str) -> None:
    own = trace(net.model, torch.zeros(2, 4, 6, 6), pruning=pattern)
    statistics = gather(own, [inputs()], layers=refittable_layers(own))
    evidence = Evidence(own, statistics)
    scores = weight_scores(evidence, ["l2", "obs"])
    groups = [
        Group(g.name, g.size, (g.size // 2, g.size) if pattern == "2:4" else tuple(range(g.size // 8, g.size + 1)))
        for g in own.groups
    ]
    tables = weight_tables(evidence, groups, scores, pattern=pattern)
    for group in groups:
        for curve in tables[group.name].values():
            assert set(group.widths) <= set(curve)
            errors = [curve[width] for width in sorted(curve)]
            assert all(a >= b >= 0 for a, b in pairwise(errors))
            assert errors[-1] == 0
            assert 0 < errors[0] < 1.01


def test_moments_are_gathered_of_depthwise_layers_too(evidence: Evidence) -> None:
    assert set(evidence.statistics) == {"conv", "depth", "head"}
    assert evidence.statistics["depth"].gram.shape == (8, 9, 9)
