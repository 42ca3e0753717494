"""Blocks: which groups may be removed whole, and that what is left is the masked twin, exact, saved and exported."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoprune.errors import PolicyError
from autoprune.network import prune
from autoprune.network.artifacts.export import export
from autoprune.network.artifacts.saved import load, model_document, save_model
from autoprune.network.calibration.moments import gather
from autoprune.network.calibration.targets import gather_targets
from autoprune.network.graph.modules import evaluating
from autoprune.network.models.building import build_model
from autoprune.network.repair.compensation import compensate
from autoprune.network.repair.sequential import refit_sequentially
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.stand_ins import Absent, Constant, UniformNorm, settle
from autoprune.network.surgery.twin import masked_twin, relative_error
from autoprune.network.tracing.counting import count_bytes, count_macs, count_params
from autoprune.network.tracing.removable import NEEDED, RECURRENT, with_removable
from autoprune.network.tracing.trace import trace

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
NONE = np.empty(0, dtype=np.int64)


def lively(model):
    """Draws every batch norm's statistics and every vector anew, so that no channel is neutral."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim == 1:
                low = 0.5 if name.endswith(("running_var", "weight")) else -0.5
                tensor.uniform_(low, 1.0, generator=generator)
    return model


def run(model, x):
    with evaluating(model), torch.no_grad():
        return model(x)


def assert_costs(network, model, selection):
    """The cost model's numbers are PyTorch's own."""
    costs = network.cost_model.costs({name: len(kept) for name, kept in selection.items()})
    assert costs["macs"] == count_macs(model, network.example_inputs)
    assert costs["params"] == count_params(model)
    assert costs["size_bytes"] == count_bytes(model)


class Block(nn.Module):
    """A residual block; `bias` gives the second convolution a bias in place of a batch norm."""

    def __init__(self, width, inner, *, bias=False, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=bias)
        self.bn2 = nn.Identity() if bias else nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class Net(nn.Module):
    """A stem, three residual blocks and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b, self.c = Block(8, 6), Block(8, 5, bias=True), Block(8, 7, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.c(self.b(self.a(F.relu(self.stem(x)))))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return with_removable(trace(lively(Net()), X))[0]


def test_the_inside_of_residual_blocks_may_go_and_the_stream_may_not(network):
    assert network.removable == {"a.conv1", "b.conv1", "c.conv1"}
    _, reasons = with_removable(network)
    assert reasons == {"stem": NEEDED}


def test_nothing_of_a_plain_chain_may_go():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(256, 3))
    found, reasons = with_removable(trace(model, X))
    assert not found.removable
    assert set(reasons) == {"0", "2"}


def test_a_network_whose_head_begins_at_zero_is_judged_by_its_shape():
    model = Net()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.a.bn2.weight)
    assert with_removable(trace(model, X))[0].removable == {"a.conv1", "b.conv1", "c.conv1"}


class Gated(nn.Module):
    """A squeeze-and-excite gate between two convolutions, and an added dense branch."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.grown = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
        self.last = nn.Conv2d(12, 6, 1)
        self.mlp = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 10), nn.GELU(), nn.LayerNorm(10), nn.Linear(10, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        x = x * torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        x = self.last(torch.cat([x, self.grown(x)], 1)).mean((2, 3))
        return self.head(x + self.mlp(x))


def test_a_gate_a_concatenated_layer_and_a_residual_mlp_may_go():
    network, _ = with_removable(trace(lively(Gated()), X))
    assert network.removable == {"squeeze", "grown.2", "mlp.1"}
    selection = dict.fromkeys(network.removable, NONE)
    small = cut(network, selection)
    assert relative_error(run(small, X), run(masked_twin(network, selection), X)) < 1e-5
    assert_costs(network, small, selection)


def test_depthwise_grouped_and_transposed_branches_may_go():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Sequential(
                nn.Conv1d(4, 6, 3, stride=2, padding=1), nn.PReLU(6), nn.ConvTranspose1d(6, 4, 2, stride=2)
            )
            self.inverted = nn.Sequential(
                nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8), nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=8),
                nn.GroupNorm(1, 8), nn.Conv1d(8, 4, 1, bias=False),
            )  # fmt: skip
            self.grouped = nn.Sequential(nn.Conv1d(4, 6, 1), nn.ReLU(), nn.Conv1d(6, 4, 3, padding="same", groups=2))
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head((x + self.up(x) + self.inverted(x) + self.grouped(x)).mean(2))

    x = torch.randn(3, 4, 10)
    network, reasons = with_removable(trace(lively(Branches()), x))
    assert not reasons
    assert network.removable == {"up.0", "inverted.0", "grouped.0"}
    selection = dict.fromkeys(network.removable, NONE)
    small = cut(network, selection)
    assert relative_error(run(small, x), run(masked_twin(network, selection), x)) < 1e-5
    assert_costs(network, small, selection)


def test_a_recurrent_layer_keeps_a_unit():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head, self.direct = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1]) + self.direct(x[:, -1])

    found, reasons = with_removable(trace(Recurrent(), torch.randn(2, 5, 4)))
    assert not found.removable
    assert reasons == {"lstm": RECURRENT}


@pytest.mark.parametrize("gone", [["a.conv1"], ["b.conv1"], ["c.conv1"], ["a.conv1", "b.conv1", "c.conv1"]])
def test_an_emptied_block_is_its_masked_twin_at_the_predicted_cost(network, gone):
    selection = {**dict.fromkeys(gone, NONE), "stem": np.array([0, 2, 5])}
    small = cut(network, selection)
    assert relative_error(run(small, X), run(masked_twin(network, selection), X)) < 1e-5
    assert_costs(network, small, selection)
    assert small.state_dict().keys() == network.model.state_dict().keys()
    for path in gone:
        block = small.get_submodule(path.partition(".")[0])
        assert isinstance(block.conv1, Absent)
        assert isinstance(block.conv2, Constant)
        assert sum(p.numel() for p in block.conv1.parameters()) == 0
        assert block.conv2.weight.numel() == 0
    assert isinstance(small.a.bn2, UniformNorm) == ("a.conv1" in gone)


def test_a_group_that_was_not_found_removable_keeps_a_channel(network):
    with pytest.raises(PolicyError, match="group 'stem' would keep no channel"):
        cut(network, {"stem": NONE})


def test_the_bias_takes_the_mean_of_what_went(network):
    selection = {"b.conv1": NONE}
    small = cut(network, selection)
    compensate(network, small, selection, gather(network, [X]))
    seen = []
    handle = network.model.b.conv2.register_forward_hook(lambda m, i, o: seen.append(o.clone()))
    run(network.model, X)
    handle.remove()
    torch.testing.assert_close(small.b.conv2.bias, seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    again = cut(network, selection)
    refit_sequentially(network, again, selection, gather_targets(network, X))
    torch.testing.assert_close(again.b.conv2.bias, seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_a_batch_norm_behind_an_emptied_layer_gives_its_own_bias_once_recalibrated(network):
    selection = {"a.conv1": NONE}
    small = cut(network, selection)
    refit_sequentially(network, small, selection, gather_targets(network, X))
    block = small.a
    block.shortcut.register_forward_hook(lambda m, i, o: torch.zeros_like(o))
    expected = F.relu(block.bn2.bias.detach()).reshape(1, -1, 1, 1).expand(4, -1, 12, 12)
    torch.testing.assert_close(run(block, torch.rand(4, 8, 12, 12)), expected)


def test_an_emptied_network_trains_on_and_a_single_sample_is_enough_to_run_it(network):
    small = cut(network, dict.fromkeys(network.removable, NONE)).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    before = small.b.conv2.bias.detach().clone()
    F.cross_entropy(small(X), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    assert not torch.equal(before, small.b.conv2.bias.detach())
    assert run(small, X[:1]).shape == (1, 5)


def test_prune_removes_a_block_on_demand_and_says_why_it_cannot():
    network = trace(lively(Net()), X)
    small = prune(network, {"a.conv1": 1.0, "c.conv1": 0.5}, calibration=[X])
    assert isinstance(small.a.conv1, Absent)
    assert small.c.conv1.weight.shape[0] in (3, 4)
    with pytest.raises(PolicyError, match="group 'stem' cannot be removed whole: without it the output no longer"):
        prune(network, 1.0)


def test_a_model_that_is_itself_the_emptied_layer_is_replaced():
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 0))
    stand_in = settle(layer)
    assert isinstance(stand_in, Constant)
    torch.testing.assert_close(run(stand_in, torch.zeros(5, 2, 0)), layer.bias.expand(5, 2, 4))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = lively(build_model(name="resnet20", num_classes=4))
    network, _ = with_removable(trace(model, torch.randn(2, 3, 16, 16)), ["layer1.1.conv1", "layer2.0.conv1"])
    selection = {"layer1.1.conv1": NONE, "layer2.0.conv1": NONE, "layer3.1.conv1": np.arange(9)}
    small = cut(network, selection)
    origin = {"name": "resnet20", "num_classes": 4}
    save_model(tmp_path / "m", small, model_document(network, None, selection, {}, origin))
    return tmp_path / "m", small


def test_a_network_without_blocks_comes_back_from_disk(saved):
    folder, small = saved
    x = torch.randn(3, 3, 16, 16)
    again = load(folder)
    torch.testing.assert_close(run(again, x), run(small, x))
    assert isinstance(again.layer1[1].conv1, Absent)
    assert isinstance(again.layer1[1].bn2, UniformNorm)


def test_an_emptied_branch_is_no_longer_in_the_exported_program(saved, tmp_path):
    export(saved[0], tmp_path / "out", format="pt2")
    program = torch.export.load(tmp_path / "out" / "model.pt2")
    convolutions = [n for n in program.graph.nodes if "conv2d" in str(n.target)]
    assert len(convolutions) == 19 - 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_emptied_branch_is_no_longer_in_the_onnx_graph_that_a_runtime_makes_of_the_file(saved, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    export(saved[0], tmp_path / "out", format="onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", options, providers=["CPUExecutionProvider"])
    written, loaded = (
        [node.op_type for node in onnx.load(path).graph.node]
        for path in (tmp_path / "out" / "model.onnx", tmp_path / "optimised.onnx")
    )
    assert written.count("Conv") == loaded.count("Conv") == 19 - 4
    assert loaded.count("Relu") == 19 - 2
