"""Captured training steps, with a graph that records operators on the CPU and does them again without any Python."""

import gc
import random
import warnings
import weakref
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from autoprune.errors import TrialError
from autoprune.network.data import staging
from autoprune.network.data.loading import DataSettings, as_splits
from autoprune.network.devices import probing, replay
from autoprune.network.devices.precision import Precision
from autoprune.network.devices.replay import LEAST_STEPS, WARM_UP, CudaGraph, Stepper, graph_for
from autoprune.network.surgery.masks import zeros_kept
from autoprune.network.training import recipe as recipes
from autoprune.network.training.recipe import Distillation, Recipe, Stage, fine_tune
from autoprune.policy import uniform_policy
from autoprune.results import Fidelity

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal"}
"""Operators that wait for the device: a capture on CUDA fails at them."""


class Recording(TorchDispatchMode):
    """Notes every operator with the very tensors that it reads and gives, as a capture notes kernels and addresses."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.before = {}
        self.made = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name.removeprefix("aten::") in WAITING:
            raise RuntimeError("operation not permitted when stream is capturing")
        for tensor in tree_flatten((args, kwargs))[0]:
            if isinstance(tensor, torch.Tensor) and id(tensor) not in self.made and id(tensor) not in self.before:
                self.before[id(tensor)] = (tensor, tensor.detach().clone())
        out = func(*args, **kwargs)
        self.made |= {id(t) for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)} - set(self.before)
        self.calls.append((func, args, kwargs, out))
        return out


class RecordedGraph:
    """A graph as CUDA has it, but for the device: its capture changes nothing, its replay calls no Python of ours."""

    def __init__(self):
        self.captures = self.replays = self.released = 0
        self.inside = False
        self.recording = None

    @contextmanager
    def running(self):
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def rehearse(self, call):
        call()

    def capture(self, call):
        assert self.inside
        recording = Recording()
        try:
            with recording:
                call()
        finally:
            for tensor, value in recording.before.values():
                tensor.detach().copy_(value)
        self.recording = recording
        self.captures += 1

    def replay(self):
        assert self.inside
        with torch._C._AutoDispatchBelowAutograd():  # kernels alone: gradients were recorded as such
            for func, args, kwargs, out in self.recording.calls:
                found = func(*args, **kwargs)
                for old, new in zip(tree_flatten(out)[0], tree_flatten(found)[0], strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
        self.replays += 1

    def release(self):
        self.recording = None
        self.released += 1


class Uncapturable(RecordedGraph):
    """A graph whose capture always fails, so that every step is run."""

    def __init__(self, kind=RuntimeError):
        super().__init__()
        self.reason, self.kind, self.attempts = "operation not permitted when stream is capturing", kind, 0

    def capture(self, call):
        self.attempts += 1
        raise self.kind(f"{self.reason}\nmore of it")


class Waiting(RecordedGraph):
    """A graph whose rehearsal hears that the host waits."""

    def rehearse(self, call):
        call()
        return "it waits for the device (model.py:7)"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(replay, "_refused", {})
    monkeypatch.setattr(replay, "_failed", [])


def splits(n=420):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    x = torch.randn(n, 2, 6, 6, generator=generator) + y[:, None, None, None]
    return as_splits({"train": (x, y)}, settings=DataSettings(calibration=8, flip=True, crop_padding=1))


def network(*extra):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), *extra,
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def trained(graph, *, recipe, model=None, **arguments):
    model = model or network()
    data = splits()
    history = fine_tune(model, data.train, recipe=recipe, epochs=6, graphs=lambda device: graph, **arguments)
    return state(model), history


PLAIN = Recipe(batch_size=32, distillation=None, lr=0.05)
TAUGHT = Recipe(batch_size=32, distillation=Distillation(), label_smoothing=0.1)
CASES = {
    "sgd": (PLAIN, {}),
    "no momentum": (Recipe(batch_size=32, distillation=None, momentum=0.0), {}),
    "adamw": (Recipe(batch_size=32, distillation=None, optimizer="adamw", lr=0.01), {}),
    "taught": (TAUGHT, {"teacher": network()}),
    "own loss": (TAUGHT, {"teacher": network(), "loss": lambda o, y: F.mse_loss(o, torch.eye(3)[y])}),
    "bfloat16": (PLAIN, {"precision": Precision(torch.bfloat16)}),
    "a stage": (PLAIN, {"stage": Stage(0.2, 0.9)}),
}


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_give_exactly_what_steps_run_one_by_one_give(case):
    """Every batch, rate, gradient and statistic is a fresh one: the weights after the whole training are equal."""
    recipe, arguments = CASES[case]
    graph, eager = RecordedGraph(), Uncapturable()
    replayed, history = trained(graph, recipe=recipe, **arguments)
    expected, plain = trained(eager, recipe=recipe, **arguments)
    assert same(replayed, expected)
    assert history.train_loss == plain.train_loss
    assert history.lr == plain.lr
    assert history.notes == ()
    assert graph.captures == 1
    assert history.replayed == graph.replays == count_steps(recipe, arguments) - WARM_UP
    assert plain.replayed == 0
    assert not same(replayed, state(network()))


def count_steps(recipe, arguments):
    an_epoch = len(splits().train) // recipe.batch_size
    first, last = arguments.get("stage", Stage()).bounds(6 * an_epoch)
    return last - first


def test_a_training_with_a_graph_is_the_one_without_but_for_rounding():
    """The optimizer is another implementation, the batches and rates are the same."""
    replayed, history = trained(RecordedGraph(), recipe=PLAIN)
    expected, plain = trained(None, recipe=PLAIN)
    assert history.train_loss == pytest.approx(plain.train_loss, rel=1e-4)
    assert history.lr == pytest.approx(plain.lr)
    for name, value in replayed.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def test_masked_weights_stay_zero_in_replayed_steps():
    """Gradients are masked by hooks of parameters, whose operators are captured with the rest."""
    model = network()
    mask = torch.rand(model[0].weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        model[0].weight.mul_(mask)
    graph = RecordedGraph()
    with zeros_kept(model, {"0.weight": mask}):
        trained(graph, recipe=PLAIN, model=model)
    assert graph.replays > 0
    assert torch.equal(model[0].weight != 0, mask)


def test_a_failing_capture_is_told_once_and_every_step_is_run():
    graph = Uncapturable()
    _, history = trained(graph, recipe=PLAIN)
    assert history.notes == (
        "training steps are not replayed as a CUDA graph but run one by one: "
        "RuntimeError: operation not permitted when stream is capturing",
    )
    assert history.replayed == 0


def test_a_capture_that_failed_is_not_tried_again_for_networks_of_the_same_modules():
    for _ in range(2):
        graph = Uncapturable()
        _, history = trained(graph, recipe=PLAIN)
        assert "RuntimeError: operation not permitted" in history.notes[0]
    assert graph.attempts == 0
    _, other = trained(RecordedGraph(), recipe=PLAIN, model=network(nn.Tanh()))
    assert other.notes == ()


def test_a_capture_that_lacked_memory_is_tried_again():
    for _ in range(2):
        graph = Uncapturable(torch.OutOfMemoryError)
        trained(graph, recipe=PLAIN)
        assert graph.attempts == 1


def test_a_step_that_waits_in_the_rehearsal_is_not_captured_and_counts_as_a_step():
    graph = Waiting()
    found, history = trained(graph, recipe=PLAIN)
    assert history.notes[0].endswith("run one by one: it waits for the device (model.py:7)")
    assert graph.captures == 0
    expected, _ = trained(Uncapturable(), recipe=PLAIN)
    assert same(found, expected)


class FakeCuda:
    """What `CudaGraph` asks of torch.cuda, with a capture that ends as it is told."""

    def __init__(self, monkeypatch, *, failing):
        self.said, self.mode, self.failing, self.graphs, cuda = [], 0, failing, 0, self

        class Graph:
            def __init__(self):
                cuda.graphs += 1
                self.number = cuda.graphs

            def capture_begin(self, pool=None, capture_error_mode="global"):
                cuda.said.append((f"begin {self.number}", pool, capture_error_mode))

            def capture_end(self):
                cuda.said.append(f"end {self.number}")
                if cuda.failing and self.number == 1:
                    raise RuntimeError("capture was invalidated")

            def reset(self):
                cuda.said.append(f"reset {self.number}")

        class Stream:
            device_index = 3

            def __init__(self, index):
                cuda.said.append(f"stream on {index}")

        def set_mode(mode):
            cuda.mode = mode
            if mode == "warn":
                warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

        def free(index, pool):
            cuda.said.append(("freed", index, pool))
            raise RuntimeError("ended before")

        zeros = torch.zeros
        for place, name, value in [
            (torch.cuda, "CUDAGraph", Graph),
            (torch.cuda, "Stream", Stream),
            (torch.cuda, "graph_pool_handle", lambda: (0, 9)),
            (torch.cuda, "synchronize", lambda device: None),
            (torch.cuda, "empty_cache", lambda: None),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "get_sync_debug_mode", lambda: cuda.mode),
            (torch.cuda, "set_sync_debug_mode", set_mode),
            (torch._C, "_cuda_endAllocateToPool", free),
            (torch, "zeros", lambda *size, device=None: zeros(*size)),
        ]:
            monkeypatch.setattr(place, name, value, raising=False)
        staging._stream.cache_clear()
        self.graph = CudaGraph("cuda:3")
        staging._stream.cache_clear()


@pytest.mark.parametrize("failing", [False, True], ids=["in the call", "at the end"])
def test_a_capture_that_fails_on_cuda_is_ended_and_another_one_mends_the_generator(monkeypatch, failing):
    cuda = FakeCuda(monkeypatch, failing=failing)

    def call():
        if not failing:
            raise RuntimeError("of the call")

    with pytest.raises(RuntimeError, match="invalidated" if failing else "of the call"):
        cuda.graph.capture(call)
    begun = ("begin 1", (0, 9), "thread_local")
    ends = ["end 1"] * (2 if failing else 1)
    mended = [("begin 2", None, "thread_local"), "end 2", "reset 2"]
    assert cuda.said == ["stream on 3", begun, *ends, ("freed", 3, (0, 9)), "reset 1", *mended]


def test_a_capture_that_succeeds_on_cuda_is_kept_until_it_is_released(monkeypatch):
    cuda = FakeCuda(monkeypatch, failing=False)
    cuda.graph.capture(lambda: None)
    assert cuda.said[1:] == [("begin 1", (0, 9), "thread_local"), "end 1"]
    cuda.graph.release()
    assert cuda.said[-1] == "reset 1"


def test_a_rehearsal_on_cuda_hears_where_the_host_waits_and_puts_the_mode_back(monkeypatch):
    cuda = FakeCuda(monkeypatch, failing=False)

    def waiting():
        assert cuda.mode == "warn"
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)

    assert cuda.graph.rehearse(lambda: None) is None
    assert f"it waits for the device ({__file__}:" in cuda.graph.rehearse(waiting)
    assert cuda.mode == 0
    with pytest.raises(ZeroDivisionError):
        cuda.graph.rehearse(lambda: 1 // 0)
    assert cuda.mode == 0


def test_a_device_has_one_stream_for_each_purpose(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda index: made.append(index) or object(), raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    staging._stream.cache_clear()
    streams = [staging.stream_for(*key) for key in [("a", "cuda"), ("a", "cuda:1"), ("b", "cuda:1"), ("a", "cuda:0")]]
    staging._stream.cache_clear()
    assert streams[0] is streams[1]
    assert made == [1, 1, 0]


def test_a_call_is_recorded_where_it_can_be_and_else_called():
    for graph in (RecordedGraph(), Waiting(), Uncapturable()):
        total, one = torch.zeros(()), torch.ones(())
        with replay.recorded(lambda total=total, one=one: total.add_(one), graph) as again:
            assert float(total) == WARM_UP
            again()
        assert float(total) == WARM_UP + 1
        assert graph.replays == (type(graph) is RecordedGraph)


def test_a_probe_of_number_formats_times_replays_where_training_will_be_replayed(monkeypatch):
    graphs = []

    def graph_for_probe(device):
        graphs.append(RecordedGraph())
        return graphs[-1]

    monkeypatch.setattr(probing, "graph_for", graph_for_probe)
    model = network()
    for precision in (Precision(None), Precision(torch.bfloat16, channels_last=False)):
        x = torch.rand(4, 2, 6, 6)
        assert 0 < probing._captured_seconds(model, x, precision, training=True, seconds=0.02) < 60
    assert len(graphs) == 2
    assert all(graph.captures == 1 and graph.replays >= 2 and graph.released == 1 for graph in graphs)
    graphs.clear()
    assert probing._captured_seconds(model, torch.rand(4, 2, 6, 6), Precision(), training=False, seconds=0.02) > 0
    assert graphs == []


@pytest.mark.parametrize("short_in", ["float32", "bfloat16"])
def test_a_probe_for_which_memory_is_short_takes_half_of_the_samples(monkeypatch, short_in):
    monkeypatch.setattr(probing, "without_bfloat16", lambda device: None)
    seen = []

    class Large(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            if len(x) > 8 and torch.is_autocast_enabled("cpu") == (short_in == "bfloat16"):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return x

    assert probing.probe_precision(Large(), torch.rand(32, 3), seconds=0.02).samples == 8
    assert {16, 32} <= set(seen)


class Branching(nn.Module):
    """Asks the device for a number and decides by it."""

    def forward(self, x):
        return 2 * x if x.mean().item() > 0.5 else x


def test_control_flow_that_depends_on_data_is_found_by_the_capture_and_costs_nothing():
    """The capture fails half way: neither the weights nor the statistics have moved by it."""
    graph = RecordedGraph()
    found, history = trained(graph, recipe=PLAIN, model=network(Branching()))
    assert "operation not permitted" in history.notes[0]
    expected, _ = trained(Uncapturable(), recipe=PLAIN, model=network(Branching()))
    assert same(found, expected)
    assert graph.captures == 0


class Drawing(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x if self.draw() < 0.5 else 0.9 * x


@pytest.mark.parametrize("draw", [random.random, lambda: float(torch.rand(()))], ids=["python", "torch"])
def test_numbers_drawn_on_the_host_would_be_frozen_so_nothing_is_captured(draw):
    graph = RecordedGraph()
    _, history = trained(graph, recipe=PLAIN, model=network(Drawing(draw)))
    assert "random numbers on the host" in history.notes[0]
    assert graph.captures == 0


def test_a_module_with_a_hook_is_not_captured_and_the_hook_sees_every_step():
    model, seen = network(), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    graph = RecordedGraph()
    _, history = trained(graph, recipe=PLAIN, model=model)
    assert "Conv2d has hooks" in history.notes[0]
    assert len(seen) == count_steps(PLAIN, {})
    assert graph.captures == 0


def test_batches_of_a_divided_step_and_short_trainings_are_not_captured():
    data, asked = splits(), []

    def graphs(device):
        asked.append(device)
        return RecordedGraph()

    fine_tune(network(), data.train, recipe=PLAIN, epochs=6, parts=2, graphs=graphs)
    short = (LEAST_STEPS - 1) / (len(data.train) // 32)
    fine_tune(network(), data.train, recipe=PLAIN, epochs=short, graphs=graphs)
    assert asked == []
    history = fine_tune(
        network(), data.train, recipe=PLAIN, epochs=LEAST_STEPS / (len(data.train) // 32), graphs=graphs
    )
    assert asked == ["cpu"]
    assert history.replayed == LEAST_STEPS - WARM_UP


def test_a_loss_that_is_no_number_ends_a_replayed_training_too():
    with pytest.raises(TrialError, match="the training loss became"):
        trained(RecordedGraph(), recipe=PLAIN, lr=1e30)


def test_memory_of_the_graph_and_its_buffers_is_given_back_however_the_training_ends():
    for arguments in ({}, {"lr": 1e30}, {"on_epoch": stop}):
        graph, model = RecordedGraph(), network()
        buffers = []
        captured = graph.capture

        def capture(call, captured=captured, graph=graph, buffers=buffers):
            captured(call)
            buffers += [
                weakref.ref(value) for value, _ in graph.recording.before.values() if value.dtype == torch.int64
            ]

        graph.capture = capture
        try:
            trained(graph, recipe=PLAIN, model=model, **arguments)
        except (TrialError, KeyboardInterrupt):
            pass
        else:
            assert all(p.grad is None for p in model.parameters())
        assert graph.released == 1
        assert not graph.inside
        gc.collect()
        alive = [ref() for ref in buffers if ref() is not None]
        assert buffers
        assert all(value is model[1].num_batches_tracked for value in alive)  # the targets' buffer is gone


def stop(epoch):
    if epoch.number == 5:
        raise KeyboardInterrupt


def test_a_batch_of_another_shape_is_run_between_the_replays():
    seen = []
    total = torch.zeros(())

    def step(x, y):
        seen.append(len(x))
        total.add_(x.sum() * y.sum())

    graph = RecordedGraph()
    batches = [(torch.full((n, 2), float(i)), torch.ones(n)) for i, n in enumerate([4, 4, 4, 4, 3, 4])]
    with Stepper(step, graph) as stepper:
        for x, y in batches:
            stepper(x, y)
    assert float(total) == sum(float(x.sum() * y.sum()) for x, y in batches)
    assert stepper.replayed == 2
    assert seen == [4, 4, 4, 4, 3]  # the fourth is the capture's own call


def test_without_a_graph_each_step_is_called_with_its_own_batch():
    seen = []
    with Stepper(lambda x, y: seen.append((x, y)), None) as stepper:
        x, y = torch.zeros(2), torch.ones(2)
        stepper(x, y)
    assert seen[0][0] is x
    assert stepper.notes == ()


def test_nothing_is_captured_on_a_cpu():
    assert graph_for("cpu") is None
    assert graph_for(torch.device("cpu")) is None


def test_a_trial_says_why_its_steps_were_not_replayed(bench, monkeypatch):
    """What a worker process notes travels with the result, through JSON, to whoever reads it."""
    monkeypatch.setattr(recipes, "LEAST_STEPS", 4)
    policy = uniform_policy(bench.groups, 0.3, "l2")
    for graph, notes in ((RecordedGraph(), 0), (Uncapturable(), 1)):
        monkeypatch.setattr(recipes, "graph_for", lambda device, graph=graph: graph)
        result = bench.evaluate(policy, Fidelity("tune", epochs=1, seeds=2))
        assert len(result.notes) == notes
        assert type(result).from_json(result.to_json()).notes == result.notes


def test_the_recording_graph_refuses_what_a_capture_refuses():
    """The substitute itself: a rate that is a Python number is frozen by it, as by CUDA."""
    value, rate = torch.zeros(()), {"lr": 1.0}

    def step(x, y):
        value.add_(x.sum() * rate["lr"])

    graph = RecordedGraph()
    with Stepper(step, graph) as stepper:
        for number in range(WARM_UP + 2):
            rate["lr"] = float(number)
            stepper(torch.ones(1), torch.ones(1))
    assert float(value) == sum(range(WARM_UP)) + 2 * WARM_UP  # the last step used the rate of its capture
