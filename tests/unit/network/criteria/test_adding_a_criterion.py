"""A criterion is added through the tables alone, and the tables agree."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.errors import InputError, PolicyError
from autoprune.network.criteria.channels import CRITERIA, criterion_of
from autoprune.network.criteria.inputs import PRODUCERS, Criterion, Evidence, Scores, by_unit, relative
from autoprune.network.criteria.learning import learn
from autoprune.network.criteria.weights import WEIGHT_CRITERIA
from autoprune.network.data.samples import Pool, TensorSplit, Transform
from autoprune.network.graph.groups import PruningGroup
from autoprune.network.pruning import prune
from autoprune.network.surgery.masks import MaskWeight
from autoprune.network.tracing.trace import trace
from autoprune.space import parse_space
from autoprune.space.criteria import NAMED_CRITERIA, NamedCriterion, of_weights

SPACE = "schema: 1\nname: t\nmodel: {name: resnet20}\ndata: {name: digits}\n"
X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
PAIRS = [(X[:32], Y[:32]), (X[32:], Y[32:])]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def first_order(evidence: Evidence, group: PruningGroup) -> Scores:
    """Absolute first-order change of the loss, summed over batches."""
    total = np.zeros(group.size)
    for links in evidence.uses(group, PRODUCERS):
        for product in evidence.gradients[links.layer.weight]:
            total += by_unit(product.double().abs(), links.outputs, group)
    return relative(total)


def first_order_of_weights(evidence: Evidence, weight: MaskWeight) -> Tensor:
    return evidence.gradients[weight.parameter][0].double().sqrt()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    """A criterion that needs gradients, in the tables of channels and of weights, and among the names."""
    monkeypatch.setitem(NAMED_CRITERIA, "toy", NamedCriterion("absolute first-order change of the loss"))
    monkeypatch.setitem(CRITERIA, "toy", Criterion("toy", first_order, gradients=True))
    monkeypatch.setitem(WEIGHT_CRITERIA, "toy", Criterion("toy", first_order_of_weights, gradients=True))
    return "toy"


def by_hand(model: nn.Module) -> Tensor:
    """`|Σ weight * gradient|` of each of the first layer's outputs, summed over the batches."""
    total = torch.zeros(8)
    weight: Any = model[0].weight  # type: ignore[index]
    for x, y in PAIRS:
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), weight)
        total += (weight.detach() * gradient).sum(1).abs()
    return total


def test_a_criterion_in_the_tables_prunes_a_network(toy: str) -> None:
    model = mlp()
    small: Any = prune(trace(model, X[:2]), 0.5, criterion=toy, calibration=PAIRS)
    kept = by_hand(model).topk(4).indices.sort().values
    torch.testing.assert_close(small[0].weight, model[0].weight[kept])  # type: ignore[index]


def test_a_criterion_of_weights_in_the_tables_masks_a_network(toy: str) -> None:
    model = mlp()
    sparse: Any = prune(trace(model, X[:2], pruning="unstructured"), 0.5, criterion=toy, calibration=PAIRS)
    assert int((sparse[0].weight == 0).sum()) == 20


def test_it_is_refused_without_targets_in_the_words_of_the_others(toy: str) -> None:
    with pytest.raises(PolicyError, match=r"the criterion toy needs calibration batches of \(inputs, targets\)"):
        prune(trace(mlp(), X[:2]), 0.5, criterion=toy, calibration=[X])


def test_a_search_learns_it_beside_the_others(toy: str) -> None:
    split = TensorSplit(Pool(X, Y), torch.arange(64), Transform(), 2)
    knowledge = learn(trace(mlp(), X[:2]), split, criteria=["l2", toy])
    assert set(knowledge.scores) == {"l2", toy}
    assert set(next(iter(knowledge.tables.values()))) == {"l2", toy}


def test_a_space_file_may_name_it(toy: str) -> None:
    with pytest.raises(InputError, match=r"unknown value 'toys'; did you mean 'toy'"):
        parse_space(SPACE + "criteria: {choices: [toys]}", env={})
    assert parse_space(SPACE + "criteria: {choices: [l2, toy]}", env={}).criteria.choices == ("l2", toy)


def test_a_space_file_names_the_criteria_that_there_are() -> None:
    assert list(NAMED_CRITERIA) == list(CRITERIA)
    assert of_weights() == list(WEIGHT_CRITERIA)
    assert all(name == criterion.name for name, criterion in (*CRITERIA.items(), *WEIGHT_CRITERIA.items()))


@pytest.mark.parametrize("name", [name for name, criterion in CRITERIA.items() if criterion.weights_alone])
def test_what_looks_at_weights_alone_scores_without_any_evidence(name: str) -> None:
    network = trace(mlp(), X[:2])
    assert np.isfinite(criterion_of(name)(Evidence(network), network.groups[0])).all()


def test_a_criterion_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot look at weights alone and need gradients"):
        Criterion("toy", first_order, weights_alone=True, gradients=True)
