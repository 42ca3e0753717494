"""Tracing: what is found, what is refused, and that the model is left alone."""

import copy
import logging
import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoprune.errors import CheckpointError, TraceError
from autoprune.network import trace
from autoprune.network.artifacts.saved import model_document, save_model, shrink_to
from autoprune.network.surgery.cut import cut
from autoprune.network.tracing.counting import count_macs, macs_counted
from autoprune.network.tracing.program import export_program

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def cnn(**options):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, **options), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip


class Calling(nn.Module):
    """A convolution and a head, with `wiring` in between."""

    def __init__(self, wiring, width=8):
        super().__init__()
        self.conv, self.head, self.wiring = nn.Conv2d(3, width, 3), nn.Linear(width, 5), wiring

    def forward(self, x, *rest):
        return self.wiring(self, x, *rest)


def test_a_trace_names_groups_after_their_first_producer_and_knows_both_ends():
    network = trace(cnn(), X)
    (group,) = network.groups
    assert (group.name, group.size, group.producers, group.consumers) == ("0", 8, ("0",), ("5",))
    assert network.group("0") is group
    assert [(f.name, f.size, f.reason) for f in network.frozen] == [("5", 5, "the model's output")]


def test_an_unknown_group_is_refused_with_the_nearest_name():
    network = trace(nn.Sequential(cnn()), X)
    with pytest.raises(TraceError, match=r"no pruning group '0\.1'; did you mean '0\.0'\?"):
        network.group("0.1")


def test_tracing_leaves_weights_statistics_and_modes_alone():
    model = cnn().train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    trace(model, X)
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_traced_network_travels_to_another_process():
    network = trace(cnn(), X)
    twin = pickle.loads(pickle.dumps(network))
    assert twin.groups == network.groups
    assert twin.cost_model == network.cost_model


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_batch_size_of_the_example_changes_nothing(exact, batch):
    network = exact(cnn(), X[:1].repeat(batch, 1, 1, 1) + torch.randn(batch, 1, 1, 1))
    assert [(g.name, g.size) for g in network.groups] == [("0", 8)]
    assert network.cost_model.dense() == trace(cnn(), X).cost_model.dense()


@pytest.mark.parametrize(
    "wrap", [lambda y: (y, y * 2), lambda y: {"logits": y, "twice": [y * 2]}], ids=["tuple", "dictionary"]
)
def test_a_model_may_return_several_tensors(exact, wrap):
    network = exact(Calling(lambda m, x: wrap(m.head(F.relu(m.conv(x)).mean((2, 3))))), X)
    assert [g.name for g in network.groups] == ["conv"]


def test_features_that_are_returned_as_well_are_frozen():
    def wiring(m, x):
        features = m.conv(x).mean((2, 3))
        return m.head(features), features

    with pytest.raises(TraceError, match=r"conv \(8\): the model's output"):
        trace(Calling(wiring), X)


def test_a_model_may_take_several_inputs(exact):
    network = exact(Calling(lambda m, x, y: m.head(F.relu(m.conv(x) * y).mean((2, 3)))), X, torch.rand(2, 1, 6, 6))
    assert [g.name for g in network.groups] == ["conv"]


def test_a_second_input_as_wide_as_the_channels_freezes_them():
    model = Calling(lambda m, x, y: m.head((m.conv(x) * y).mean((2, 3))))
    with pytest.raises(TraceError, match=r"combined at .* with a tensor of fixed width"):
        trace(model, (X, torch.rand(2, 8, 6, 6)))


def branching(m, x):
    y = m.conv(x)
    return m.head((y if y.sum() > 0 else -y).mean((2, 3)))


def test_a_model_whose_forward_depends_on_the_data_is_refused_and_the_message_says_where(capfd):
    with pytest.raises(
        TraceError, match=r"(?s)Calling cannot be exported: .*control flow that depends on the data"
    ) as e:
        trace(Calling(branching), X)
    lines = [line.strip() for line in str(e.value).splitlines()]
    assert "the last operator that was recorded is aten.item" in lines
    assert "return m.head((y if y.sum() > 0 else -y).mean((2, 3)))" in lines
    assert "def forward" not in capfd.readouterr().err


def sliced(m, x):
    return m.head(m.conv(x).mean((2, 3)))[: int(x.abs().sum().item()) % 2 + 1]


def counted(m, x):
    y = m.head(m.conv(x).mean((2, 3)))
    chosen = y[y[:, 0] > 0]
    return chosen if len(chosen) > 1 else y


def repeated(m, x):
    y = m.head(m.conv(x).mean((2, 3)))
    while y.norm() > 1:
        y = 0.5 * y
    return y


@pytest.mark.parametrize("wiring", [branching, sliced, counted, repeated])
def test_control_flow_that_depends_on_the_data_is_named_where_it_is_the_cause(wiring):
    with pytest.raises(TraceError, match=r"cannot be exported: (?s:.*)control flow that depends on the data"):
        trace(Calling(wiring), X)


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)), (torch.rand(2, 6),), ("indices", "float32 (2, 6)")),
        (nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 4)), (torch.rand(2, 6),), ("2x6 and 5x8", "float32 (2, 6)")),
        (nn.Bilinear(6, 6, 4), (torch.rand(2, 6),), ("'input2'", "float32 (2, 6)")),
        (
            nn.Bilinear(6, 6, 4),
            (torch.rand(2, 6), torch.ones(2, 5, dtype=torch.int64)),
            ("Bilinear cannot be exported", "float32 (2, 6), int64 (2, 5)"),
        ),
    ],
    ids=["dtype", "shape", "missing", "two inputs"],
)
def test_a_model_that_does_not_run_on_its_example_inputs_is_told_so(model, inputs, words):
    model.train()
    with pytest.raises(TraceError, match="the model does not run on these example inputs, without an export") as error:
        trace(model, inputs)
    text = str(error.value)
    assert all(word in text for word in words)
    assert "control flow" not in text
    assert all(module.training for module in model.modules())


def test_a_model_that_leaves_torch_is_refused_with_the_error_alone():
    with pytest.raises(TraceError, match=r"cannot be exported: RuntimeError: \.numpy\(\) is not supported") as error:
        trace(Calling(lambda m, x: m.head(torch.tensor(m.conv(x).detach().numpy()).mean((2, 3)))), X)
    assert "control flow" not in str(error.value)
    assert "does not run" not in str(error.value)
    assert "m.conv(x).detach().numpy()" in str(error.value)


def test_to_find_out_whether_a_model_runs_by_itself_leaves_it_as_it_was():
    ran = []

    def wiring(m, x):
        ran.append(type(x))
        m.calls += 1
        x.zero_()
        raise TypeError("never")

    model, x = Calling(wiring), torch.ones(2, 3, 8, 8)
    model.register_buffer("calls", torch.zeros(()))
    with pytest.raises(TraceError, match=r"TypeError: never(?s:.*)does not run on these example inputs"):
        trace(model, x)
    assert ran[-1] is torch.Tensor
    assert float(model.calls) == 0
    assert torch.equal(x, torch.ones_like(x))


class Whole(nn.Module):
    """Cannot be copied, and runs on plain tensors where there is no `error`."""

    def __init__(self, error):
        super().__init__()
        self.layer, self.error = nn.Linear(3, 3), error

    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")

    def forward(self, x):
        if self.error or type(x) is not torch.Tensor:
            raise self.error or TypeError("only plain tensors")
        return self.layer(x)


@pytest.mark.parametrize(
    ("error", "own"), [(ValueError("broken"), True), (ValueError("mixes FakeTensor"), False), (None, False)]
)
def test_a_model_that_cannot_be_copied_is_run_itself_and_traces_of_an_export_are_not_blamed_on_it(error, own):
    with pytest.raises(TraceError) as caught:
        export_program(Whole(error), (torch.rand(2, 3),))
    assert ("does not run on these example inputs" in str(caught.value)) == own


def test_what_the_model_itself_prints_is_not_swallowed(capsys):
    def wiring(m, x):
        print("hello from the model", file=sys.stderr)
        return m.head(m.conv(x).mean((2, 3)))

    trace(Calling(wiring), X)
    assert "hello from the model" in capsys.readouterr().err


def test_an_input_of_the_wrong_shape_is_told_with_the_models_own_words():
    with pytest.raises(TraceError, match=r"cannot be exported.*channels"):
        trace(cnn(), torch.zeros(2, 4, 8, 8))


def test_a_model_whose_sizes_do_not_fit_its_input_is_one_error_and_nothing_is_logged():
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    seen, level = [], logger.level
    handler = logging.Handler()
    handler.emit = seen.append
    logger.addHandler(handler)
    try:
        with pytest.raises(TraceError, match=r"Sequential cannot be exported: RuntimeError: .*192.*100"):
            trace(nn.Sequential(nn.Flatten(), nn.Linear(100, 10), nn.ReLU(), nn.Linear(10, 3)), X[:, :3])
    finally:
        logger.removeHandler(handler)
    assert (seen, logger.level) == ([], level)


@pytest.mark.parametrize("inputs", [(), ("text",), torch.tensor(1.0)], ids=["none", "text", "scalar"])
def test_example_inputs_without_a_batch_are_refused(inputs):
    with pytest.raises(TraceError, match="at least one tensor with a batch dimension"):
        trace(cnn(), inputs)


def test_a_model_without_layers_is_refused():
    with pytest.raises(TraceError, match="nothing in ReLU can be pruned:\n  it has no layer with channels"):
        trace(nn.ReLU(), X)


def test_a_model_with_a_single_layer_is_refused_and_the_reason_is_given():
    with pytest.raises(TraceError, match=r"nothing in Conv2d can be pruned:\n.*\(5\): the model's output"):
        trace(nn.Conv2d(3, 5, 3), X)


def test_a_width_that_the_forward_pass_insists_on_freezes_the_group_with_a_readable_reason():
    def checked(m, x):
        y = m.conv(x)
        torch._check(y.shape[1] % 8 == 0, lambda: "eight channels, please")
        return y.flatten(2)

    model = nn.Sequential(
        Calling(checked),
        nn.Conv1d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 34, 3),
    )  # fmt: skip
    network = trace(model, X)
    assert [g.name for g in network.groups] == ["1"]
    (frozen,) = [f for f in network.frozen if f.name == "0.conv"]
    assert frozen.reason == "the pruned network does not run: RuntimeError: eight channels, please"
    assert network.broken == {"0.conv": frozen.reason}


def test_a_literal_width_that_runs_but_changes_the_result_is_found_by_the_masked_twin():
    """Dividing by a number that is the width, for instance, goes unnoticed by any shape check."""

    def wiring(m, x):
        y = m.conv(x)
        return m.head(F.relu(y).mean((2, 3)) * (8 / y.shape[1]))

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Calling(wiring))
    network = trace(model, X)
    assert [g.name for g in network.groups] == ["0"]
    assert next(f.reason for f in network.frozen if f.name == "1.conv").startswith(
        "the pruned network differs from its masked twin (relative error"
    )


def test_without_verification_nothing_is_tried():
    model = Calling(lambda m, x: m.head(m.conv(x).reshape(x.shape[0], 8, 36).mean(2)))
    assert [g.name for g in trace(model, X, verify=False).groups] == ["conv"]


def test_freezing_by_hand_moves_a_group_to_the_frozen_ones():
    network = trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), cnn_tail()), X)
    smaller = network.freeze({"0": "it is mine"})
    assert [g.name for g in smaller.groups] == ["2.0"]
    assert next(f.reason for f in smaller.frozen if f.name == "0") == "it is mine"
    assert smaller.cost_model.dense() == network.cost_model.dense()
    assert [g.name for g in network.groups] == ["0", "2.0"]


def cnn_tail():
    return nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


def test_stages_count_resolutions_and_the_classifier_is_the_head():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Conv2d(4, 6, 1), nn.AvgPool2d(4),
        nn.Flatten(), nn.Linear(6, 8), nn.Linear(8, 2),
    )  # fmt: skip
    assert [(g.name, g.stage) for g in trace(model, X).groups] == [
        ("0", "stage1"), ("1", "stage2"), ("2", "stage2"), ("5", "head"),
    ]  # fmt: skip


def test_what_the_forward_pass_never_reads_stays_and_is_counted(exact):
    model = Calling(lambda m, x: m.head(F.relu(m.conv(x)).mean((2, 3))))
    model.extra = nn.Linear(8, 7)
    network = exact(model, X)
    assert network.cost_model.dense()["params"] == sum(p.numel() for p in model.parameters())
    assert "extra.weight" not in network.index_map


def test_a_buffer_that_is_not_saved_loses_its_channels_and_is_cut_again_on_loading(exact, tmp_path):
    """The state dict leaves it out, so what stays of it is written in the document."""

    def build():
        model = Calling(lambda m, x: m.head(F.relu(m.conv(x) * m.scale).mean((2, 3))))
        model.register_buffer("scale", torch.arange(1.0, 9.0).view(8, 1, 1), persistent=False)
        return model

    network = exact(build(), X)
    selection = {"conv": np.array([1, 4, 6])}
    small = cut(network, selection)
    assert small.scale.flatten().tolist() == [2.0, 5.0, 7.0]
    document = model_document(network, None, selection, {}, {})
    back = shrink_to(build(), save_model(tmp_path / "m", small, document), document).eval()
    with torch.no_grad():
        assert torch.equal(back(X), small.eval()(X))
    with pytest.raises(CheckpointError, match="has no buffer 'scale'"):
        shrink_to(Calling(lambda m, x: x), tmp_path / "m", document)


def test_costs_are_for_one_sample():
    network = trace(cnn(bias=False), X)
    assert network.cost_model.dense()["macs"] == 8 * 8 * 8 * 3 * 9 + 8 * 5 == count_macs(network.model, (X,))


def test_activation_memory_is_the_largest_sum_of_living_tensors():
    """Input 3, first convolution 8, second 4 channels, all of 64 pixels of 4 bytes: the first two convolutions."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1))
    model_cost = trace(model, X).cost_model
    assert model_cost.dense()["activation_bytes"] == (8 + 4) * 64 * 4
    assert model_cost.cost("activation_bytes", {"0": 2}) == (4 + 2) * 64 * 4
    assert model_cost.cost("activation_bytes", {"0": 4, "1": 1}) == (3 + 4) * 64 * 4


def test_a_residual_input_stays_alive_until_it_is_added():
    model = Calling(lambda m, x: m.head((m.conv(x) + m.conv(x)).mean((2, 3))))
    dense = trace(model, X).cost_model.dense()
    assert dense["activation_bytes"] == max(3 * 64 + 2 * 8 * 36, 3 * 8 * 36) * 4


def test_a_cost_that_no_rule_foresees_stays_whatever_is_pruned(monkeypatch):
    network = trace(cnn(), X)
    for module in ("counting", "verify"):
        dearer_by_seven = lambda *a, count=macs_counted: 7 + count(*a)  # noqa: E731
        monkeypatch.setattr(f"autoprune.network.tracing.{module}.macs_counted", dearer_by_seven)
    dearer = trace(cnn(), X)
    assert [group.name for group in dearer.groups] == [group.name for group in network.groups]
    assert dearer.cost_model.dense()["macs"] == network.cost_model.dense()["macs"] + 7
    assert any(note.startswith("7 MACs are spent in operators without a rule") for note in dearer.notes)
