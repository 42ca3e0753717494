"""Replacing activations: where they are, what cannot be replaced, and that copies, files and identities tell."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoprune.errors import InputError
from autoprune.network.artifacts.saved import load, model_document, save_model
from autoprune.network.graph.modules import evaluating
from autoprune.network.models.building import build_model
from autoprune.network.surgery.activations import activation_sites, choices_of, replace_activations, replacements
from autoprune.network.surgery.cut import cut
from autoprune.network.tracing.trace import trace
from autoprune.policy import Choice, Policy
from autoprune.results import Fidelity

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 8


def chain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, stride=2), nn.ReLU(), nn.SiLU(),
        nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip


def test_activations_are_found_with_kind_and_stage():
    sites = activation_sites(trace(chain(), X))
    assert [(s.path, s.kind, s.stage) for s in sites] == [
        ("1", "relu", "stage1"),
        ("3", "relu", "stage2"),
        ("4", "silu", "stage2"),
    ]


def test_there_is_one_choice_for_each_kind_and_scope():
    network, wanted = trace(chain(), X), {"relu": ("relu", "relu6"), "silu": ("hardswish",)}
    assert choices_of(network, {}, "stage") == {}
    assert choices_of(network, wanted, "model") == {"model/relu": ("relu", "relu6"), "model/silu": ("hardswish",)}
    assert set(choices_of(network, wanted, "stage")) == {"stage1/relu", "stage2/relu", "stage2/silu"}
    assert set(choices_of(network, wanted, "layer")) == {"1/relu", "3/relu", "4/silu"}


def test_what_is_chosen_is_replaced_and_nothing_else():
    network = trace(chain(), X)
    plan = replacements(activation_sites(network), "stage", {"stage1/relu": "relu6", "stage2/relu": "relu"})
    assert plan == {"1": "relu6"}
    small = cut(network, {})
    replace_activations(small, plan)
    assert [type(m) for m in small][1:5] == [nn.ReLU6, nn.Conv2d, nn.ReLU, nn.SiLU]
    assert small[1].inplace
    assert type(network.model[1]) is nn.ReLU
    with evaluating(small), torch.no_grad():
        inner = small[0](X).clamp(0, 6)
        torch.testing.assert_close(small(X), small[2:](inner))


def test_a_module_that_is_used_twice_is_replaced_in_both_places():
    model = chain()
    model[3] = model[1]
    network = trace(model, X)
    small = cut(network, {})
    replace_activations(small, {site.path: "hardswish" for site in activation_sites(network) if site.kind == "relu"})
    assert type(small[1]) is nn.Hardswish
    assert small[3] is small[1]


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head, self.act = nn.Conv2d(3, 6, 3), nn.Linear(6, 2), nn.GELU()

    def forward(self, x):
        return self.head(self.act(F.relu(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            {"relu": ("relu6",)},
            r"activations\.relu: the model calls relu as a function: nothing to replace",
        ),
        ({"silu": ("hardswish",)}, r"activations\.silu: the model has no nn\.SiLU; its activation modules are: gelu"),
        ({"rleu": ("relu",)}, "unknown activation 'rleu'; did you mean 'relu'"),
        ({"gelu": ("relu", "relo")}, "unknown activation 'relo'; did you mean 'relu'"),
    ],
)
def test_what_cannot_be_replaced_is_an_error_that_says_why(wanted, message):
    with pytest.raises(InputError, match=message):
        choices_of(trace(Functional(), X), wanted, "model")


def test_an_unknown_activation_is_never_put_into_a_network():
    with pytest.raises(InputError, match="unknown activation 'softmax'"):
        replace_activations(chain(), {"1": "softmax"})


def test_replaced_activations_come_back_from_disk(tmp_path):
    model = build_model(name="resnet20", num_classes=4)
    network = trace(model, torch.randn(2, 3, 16, 16))
    small = cut(network, {})
    plan = {site.path: "hardswish" for site in activation_sites(network)}
    replace_activations(small, plan)
    document = model_document(network, None, {}, {}, {"name": "resnet20", "num_classes": 4}) | {"activations": plan}
    save_model(tmp_path / "m", small, document)
    again = load(tmp_path / "m")
    assert type(again.layer2[0].relu) is nn.Hardswish
    x = torch.randn(2, 3, 16, 16)
    with evaluating(small), torch.no_grad():
        torch.testing.assert_close(again(x), small(x))


def test_a_trial_runs_with_its_activations_and_they_are_part_of_its_identity(bench):
    sites = activation_sites(bench.network)
    assert sites, "the fixture's network has activation modules"
    kind = sites[0].kind
    bench = dataclasses.replace(bench, activations=sites)
    choices = {group.name: Choice("l2", 0.0) for group in bench.groups}
    plain = Policy(choices)
    other = Policy(choices, {f"model/{kind}": "tanh"})
    assert bench.identity(plain) == bench.identity(Policy(choices, {f"model/{kind}": kind}))
    assert bench.identity(plain) != bench.identity(other)
    fidelity = Fidelity("screen", 0)
    first, second = bench.evaluate(plain, fidelity), bench.evaluate(other, fidelity)
    assert first.metrics["val_loss"] != second.metrics["val_loss"]
    assert second.identity == bench.identity(other)
    assert second.costs == first.costs
