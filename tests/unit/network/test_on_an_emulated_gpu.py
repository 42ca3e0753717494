"""The whole path of a trial on tensors that say they lie on a GPU: devices are not mixed, and training does not wait.

The emulation is as strict as CUDA about what may meet in an operator, about generators and about NumPy, and notes each
time that the host would wait. It knows nothing of streams, captures, kernels or numbers: `tests/gpu` is for those.
"""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch._dynamo  # looks at torch.cuda when it is loaded, so before that is replaced
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

import autoprune
from autoprune.network import preparing
from autoprune.network.criteria import own
from autoprune.network.data import samples
from autoprune.network.data.loading import DataSettings, as_splits
from autoprune.network.devices import precision, probing
from autoprune.network.latency.table import build_table
from autoprune.network.latency.timing import Conditions
from autoprune.network.models.torchvision import import_torchvision
from autoprune.network.profiling import profile_trial
from autoprune.network.pruning import prune
from autoprune.network.tracing.trace import trace
from autoprune.network.training import recipe
from autoprune.policy import uniform_policy
from autoprune.results import Fidelity
from autoprune.space import load_space

GPU = torch.device("cuda:0")
MOVING = {"_to_copy", "copy_", "_local_scalar_dense"}
WAITING = {"_local_scalar_dense", "nonzero", "equal", "_unique2", "masked_select"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
OF_TOLERANCES = {"mul", "maximum", "max", "gt"}
DRAWING = {"random_", "uniform_", "normal_", "bernoulli_"}


def is_gpu(device):
    return device is not None and torch.device(device).type == "cuda"


class OnGpu(torch.Tensor):
    """A tensor on the emulated GPU; `elem` holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype
        )
        tensor.elem = elem
        return tensor

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self):
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"

    def numpy(self, *, force=False):
        if force:
            return self.elem.detach().numpy(force=True)
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def __array__(self, *_, **__):
        self.numpy()

    def data_ptr(self):
        return self.elem.data_ptr()

    def untyped_storage(self):
        return self.elem.untyped_storage()

    def tolist(self):
        return self.cpu().tolist()

    def cpu(self):
        return self.to("cpu")

    def to(self, *args, **kwargs):
        device, dtype = target_of(args, kwargs)
        device = GPU if device is None else torch.device(device)
        if is_gpu(device) and dtype in (None, self.dtype) and not kwargs.get("copy"):
            return self
        return moved(self, dtype or self.dtype, device)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            new = OnGpu(self.elem.detach().clone())
            if isinstance(self, nn.Parameter):
                new = nn.Parameter(new, requires_grad=self.requires_grad)
            memo[id(self)] = new
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return GpuMode.run(func, args, kwargs or {})


class Moving(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype, device):
        ctx.before = x.dtype
        return torch.ops.aten._to_copy(x, dtype=dtype, device=device)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(GPU, ctx.before), None, None


def moved(x, dtype, device):
    if x.requires_grad and torch.is_grad_enabled():
        return Moving.apply(x, dtype, device)
    return torch.ops.aten._to_copy(x.detach(), dtype=dtype, device=device)


def target_of(args, kwargs):
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for value in args:
        if isinstance(value, str | torch.device):
            device = value
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, torch.Tensor):
            device, dtype = value.device, value.dtype
    return device, dtype


class GpuMode(TorchDispatchMode):
    """Runs operators on the values, after a look at where the tensors lie; `waits` names those that wait."""

    waits: ClassVar[list[str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    @classmethod
    def run(cls, func, args, kwargs):
        name = func.overloadpacket._qualified_op_name.split("::")[-1]
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
        here = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
        device = kwargs.get("device")
        cls._check(func, name, args, there, here)
        generator = kwargs.get("generator")
        if generator is not None and (is_gpu(device) or (there and name in DRAWING)):
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu': {func}")
        leaves = name == "_to_copy" and device is not None and is_gpu(device) != bool(there)
        if (there and name in WAITING) or leaves or (name == "copy_" and there and here):
            cls.waits.append(name)
        wrapped = {id(tensor.elem): tensor for tensor in there}
        args, kwargs = tree_map(lambda v: v.elem if isinstance(v, OnGpu) else v, (args, kwargs))
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        out = func(*args, **kwargs)
        if name == "_local_scalar_dense":
            return out
        if name == "convolution_backward":  # its gradients have the layout that autograd expects of a plain tensor
            out = tuple(part if part is None or place == 0 else part.contiguous() for place, part in enumerate(out))
        on_gpu = is_gpu(device) if device is not None else bool(there)
        if name == "copy_":
            on_gpu = id(args[0]) in wrapped

        def wrap(value):
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in wrapped:
                return wrapped[id(value)]
            return OnGpu(value) if on_gpu and not any(value is tensor for tensor in here) else value

        return tree_map(wrap, out)

    @staticmethod
    def _check(func, name, args, there, here):
        if not there or not here or name in MOVING:
            return
        if name in INDEXING:  # indices may lie on the CPU; what is indexed there takes no index from a GPU
            if not isinstance(args[0], OnGpu):
                wrong = there
            else:
                wrong = [] if name == "index" or isinstance(args[2], OnGpu) or args[2].dim() == 0 else [args[2]]
        else:
            # Scalars may come from the CPU; tolerances of linear algebra are made by torch itself, where we cannot see.
            single = name in OF_TOLERANCES
            wrong = [tensor for tensor in here if tensor.dim() > 0 and not (single and tensor.numel() == 1)]
        if wrong:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got cuda:0 and cpu")


def move_module(self, *args, **kwargs):
    """Gives the module new parameters, the same one wherever there was one: a wrapper cannot become what is wrapped."""
    made = {}

    def new(parameter):
        values = parameter.detach().to(*args, **kwargs)
        if isinstance(values, OnGpu) == isinstance(parameter, OnGpu) and values.dtype == parameter.dtype:
            return parameter
        return nn.Parameter(values, requires_grad=parameter.requires_grad)

    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = parameter, new(parameter)
                module._parameters[name] = made[id(parameter)][1]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(*args, **kwargs)
    return self


@pytest.fixture
def gpu(monkeypatch):
    """Makes `cuda` the emulated device; returns the list of operators for which the host has waited."""
    plain_to, plain_tensor = torch.Tensor.to, torch.tensor

    def to(self, *args, **kwargs):
        device, dtype = target_of(args, kwargs)
        return moved(self, dtype or self.dtype, GPU) if is_gpu(device) else plain_to(self, *args, **kwargs)

    def tensor(data, *, device=None, **kwargs):
        made = plain_tensor(data, **kwargs)
        return made.to(device) if is_gpu(device) else made

    nothing = lambda *_, **__: None  # noqa: E731
    for place, name, value in [
        (torch, "inference_mode", lambda mode=True: torch.no_grad()),
        (torch, "tensor", tensor),
        (torch.Tensor, "to", to),
        (nn.Module, "to", move_module),
        (nn.Module, "cpu", lambda self: self.to("cpu")),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "get_device_name", lambda device=None: "emulated"),
        (torch.cuda, "is_bf16_supported", lambda **_: False),
        (torch.cuda, "mem_get_info", lambda device=None: (2**36, 2**36)),
        (torch.cuda, "memory_reserved", lambda device=None: 0),
        (torch.cuda, "get_per_process_memory_fraction", lambda device=None: 1.0),
        (torch.cuda, "memory_allocated", lambda device=None: 0),
        (torch.cuda, "max_memory_allocated", lambda device=None: 0),
        (torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()),
        *((torch.cuda, name, nothing) for name in ("_lazy_init", "synchronize", "empty_cache", "manual_seed_all")),
        *((torch.cuda, name, nothing) for name in ("set_rng_state", "reset_peak_memory_stats")),
        (torch.accelerator, "current_accelerator", nothing),  # what fused optimizers ask before a capture
        (precision.Precision, "arrange_model", nothing),  # assigns to `data`, which a wrapper does not pass on
        (probing, "graph_for", nothing),
        (recipe, "graph_for", nothing),
        (samples, "lane_to", nothing),
    ]:
        monkeypatch.setattr(place, name, value)
    GpuMode.waits.clear()
    with GpuMode():
        yield GpuMode.waits
    GpuMode.waits.clear()


class Small(nn.Module):
    """A residual block between two convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.a_norm, self.b = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = x + self.b(self.a_norm(self.a(x)).relu())
        return self.head(x.mean((2, 3)))


def splits(count=400):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 12, 12), generator=draw).to(torch.uint8)
    return as_splits(
        {"train": (images, torch.arange(count) % 4)}, settings=DataSettings(calibration=64, flip=True, crop_padding=2)
    )


def prepared(tmp_path, *overrides, criteria=("l2",), model=None):
    torch.manual_seed(0)
    space = load_space(
        Path("search_spaces/cifar10_resnet20.yaml"),
        overrides=[
            "device=cuda", "recipe.precision=float32", "recipe.batch_size=32",
            f"criteria.choices=[{','.join(criteria)}]", *overrides,
        ],
        env={"AUTOPRUNE_DATA": "none"},
    )  # fmt: skip
    ingredients = preparing.Ingredients(preparing.prunable(model or Small()).eval(), splits(), {}, "emulated")
    with _disable_current_modes():  # a trace is made on the CPU, and counts operators by a mode of its own
        network = preparing.trace_ingredients(ingredients, space)
    return preparing.workbench_of(
        space, ingredients, network, cache=tmp_path, models=tmp_path / "models", note=lambda text: None
    )


SCREENED, TUNED = Fidelity("screen", 0, 50), Fidelity("tune", 1.0, 50)
CRITERIA = ("l2", "bn_scale", "fpgm", "lamp", "taylor", "activation", "obs", "obs_greedy", "hessian", "hrank", "random")


def test_every_criterion_is_learnt_and_trials_are_screened_tuned_and_finished(gpu, tmp_path):
    bench = prepared(tmp_path, criteria=CRITERIA)
    for criterion in CRITERIA:
        assert bench.evaluate(uniform_policy(bench.groups, 0.5, criterion), SCREENED).metrics["val_accuracy"] >= 0
    result = bench.evaluate(uniform_policy(bench.groups, 0.5, "l2"), Fidelity("final", 2.0, 50, test=True))
    assert result.metrics["test_accuracy"] >= 0
    assert gpu  # the emulation was in between


def test_the_host_waits_as_often_for_many_steps_as_for_few(gpu, tmp_path):
    bench, waits = prepared(tmp_path), []
    policy = uniform_policy(bench.groups, 0.5, "l2")
    for batch_size in (32, 32, 8):  # the first trial also sends the data
        gpu.clear()
        replace(bench, recipe=replace(bench.recipe, batch_size=batch_size)).evaluate(policy, TUNED)
        waits.append(len(gpu))
    assert len(bench.splits.train) // 8 > 20
    assert waits[1] == waits[2] > 0


@pytest.mark.parametrize(
    ("overrides", "criterion", "fidelity"),
    [
        (["recipe.compensation=merge"], "l2", SCREENED),
        (["recipe.recalibration_batches=0"], "l2", SCREENED),
        (["pruning=unstructured"], "obs", TUNED),
        (["pruning='2:4'"], "l1", SCREENED),
        (["recipe.regularisation={kind: group_lasso}", "recipe.schedule={kind: iterative, steps: 2}"], "l2", TUNED),
    ],
    ids=["merged", "not recalibrated", "masked", "2:4", "in stages"],
)
def test_every_way_of_pruning_and_repairing_keeps_to_the_device(gpu, tmp_path, overrides, criterion, fidelity):
    bench = prepared(tmp_path, *overrides, criteria=(criterion,))
    result = bench.evaluate(uniform_policy(bench.groups, 0.5, criterion), fidelity)
    assert result.metrics["val_accuracy"] >= 0


def test_a_transformer_keeps_to_the_device_too(gpu, tmp_path):
    import_torchvision()
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(12, patch_size=6, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4)
    bench = prepared(tmp_path, criteria=("obs_greedy",), model=model)
    assert bench.evaluate(uniform_policy(bench.groups, 0.5, "obs_greedy"), TUNED).metrics["val_accuracy"] >= 0


def test_a_trial_is_profiled_beside_its_bare_passes(gpu, tmp_path):
    bench = prepared(tmp_path)
    found = profile_trial(bench, uniform_policy(bench.groups, 0.5, "l2"), TUNED, repeats=1, steps=2)
    assert {"compensation", "evaluation", "fine_tuning"} <= {stage.name for stage in found.stages}


def test_latency_is_tabled_by_passes_on_the_device(gpu):
    network = trace(Small(), torch.zeros(2, 3, 12, 12))
    table = build_table(network, Conditions(device="cuda"), round_to=4)
    assert table.groups == tuple(group.name for group in network.groups)


def numpy_criterion(weights, inputs):
    assert inputs
    return sum(np.abs(np.asarray(weight)).sum(1) for weight in weights.values())


def test_an_own_criterion_in_numpy_gets_tensors_of_the_cpu(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(own, "import_factory", lambda path, what: numpy_criterion)
    network = trace(Small(), torch.zeros(2, 3, 12, 12))
    network.model.to("cuda")
    pruned = prune(network, 0.5, criterion="mine:numpy_criterion", calibration=[torch.rand(16, 3, 12, 12)])
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in network.model.parameters())


@pytest.mark.parametrize(
    ("pruning", "criterion"), [("channel", "taylor"), ("channel", "hrank"), ("unstructured", "l1")]
)
def test_prune_works_where_the_network_lies(gpu, pruning, criterion):
    network = trace(Small(), torch.zeros(2, 3, 12, 12), pruning=pruning)
    network.model.to("cuda")
    batches = [(torch.rand(16, 3, 12, 12), torch.arange(16) % 4)]
    pruned = prune(network, 0.5, criterion=criterion, calibration=batches)
    assert all(isinstance(parameter, OnGpu) for parameter in pruned.parameters())
    assert pruned(batches[0][0].to("cuda")).shape == (16, 4)


def test_a_search_takes_a_model_and_data_that_still_lie_on_the_gpu(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    model = Small().to("cuda")
    images, classes = torch.rand(200, 3, 12, 12).to("cuda"), (torch.arange(200) % 4).to("cuda")
    ladder = [{"rung": "screen", "epochs": 0}, {"rung": "final", "epochs": 1, "trials": 1}]
    found = autoprune.search(
        model, data={"train": (images, classes)}, budget={"macs": 0.6}, trials=3, home=tmp_path / "home", device="cuda",
        recipe={"batch_size": 16, "precision": "float32"}, search={"controls": 0, "ladder": ladder},
    )  # fmt: skip
    assert found.front
    assert all(isinstance(parameter, OnGpu) for parameter in model.parameters())


def test_the_emulation_refuses_what_a_gpu_refuses(gpu):
    there, here = torch.ones(3).to("cuda"), torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(RuntimeError, match="same device"):
        here[torch.zeros(1, dtype=torch.int64).to("cuda")]
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device="cuda", generator=torch.Generator())
    with pytest.raises(TypeError, match="can't convert cuda"):
        there.numpy()
    gpu.clear()
    assert (there + torch.tensor(1.0)).device == GPU  # a scalar may come from the CPU
    assert there[torch.zeros(1, dtype=torch.int64)].device == GPU
    assert gpu == []
    assert float(there.sum()) == 3.0
    assert gpu == ["_local_scalar_dense"]
