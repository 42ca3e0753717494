"""Narrow strided 1x1 convolutions, whose backward pass in oneDNN damages the heap: trained in child processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from autoprune.network.devices.convolutions import differentiate, gradients_of, safe_convolutions

ROOT = Path(__file__).parents[4]
LIMIT = 120
"""Seconds of a child: with several threads the fault may be a hang."""

GRADIENTS = """
import itertools
import sys
import torch
from torch import nn
from autoprune.network.devices.convolutions import safe_convolutions

torch.set_num_threads(int(sys.argv[1]))
for width, stride, kernel, grouped in itertools.product(range(1, 21), (1, 2, 3), (1, 3), (False, True)):
    torch.manual_seed(width)
    groups, outputs = (width, width) if grouped else (1, 12)  # with 17 to 64 outputs another kernel runs on AVX-512
    layer = nn.Conv2d(width, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups)
    exact = nn.Conv2d(width, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups).double()
    exact.load_state_dict(layer.state_dict())
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(16, width, 60, 60)
    last = x.clone(memory_format=torch.channels_last).requires_grad_()
    wide = x.detach().double().requires_grad_()
    for _ in range(2):
        layer.zero_grad()
        last.grad = None
        with safe_convolutions(layer, "cpu"):
            output = layer(last)
            factors = torch.linspace(-1, 2, output.numel()).view(output.shape)
            (output * factors).sum().backward()
    (exact(wide) * factors.double()).sum().backward()
    for found, wanted in ((last, wide), (layer.weight, exact.weight), (layer.bias, exact.bias)):
        error = float((found.grad - wanted.grad).norm() / wanted.grad.norm())
        assert error < 1e-4, (width, stride, kernel, grouped, error)

for outputs in range(1, 21):  # the gradient of a transposed weight is that of a convolution of its outputs
    torch.manual_seed(outputs)
    layer = nn.ConvTranspose2d(12, outputs, 1, stride=2, output_padding=1).to(memory_format=torch.channels_last)
    exact = nn.ConvTranspose2d(12, outputs, 1, stride=2, output_padding=1).double()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(16, 12, 30, 30)
    with safe_convolutions(layer, "cpu"):
        for _ in range(3):
            layer.zero_grad()
            layer(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    exact(x.double()).square().sum().backward()
    error = float((layer.weight.grad - exact.weight.grad).norm() / exact.weight.grad.norm())
    assert error < 1e-4, (outputs, error)
print("done")
"""
# What differentiates: each trains, or takes the gradients of, a network that died in every run before.
NARROW = """
import sys
import torch
from torch import nn
from torch.nn import functional as F
from autoprune.network.devices.probing import probe_precision
from autoprune.network.criteria.gradients import gather_fisher, gather_gradients, gather_weight_gradients
from autoprune.network.training.recipe import Recipe, fine_tune
from autoprune.network.data.loading import as_splits
from autoprune.network.tracing.trace import trace


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.shortcut = nn.Conv2d(5, 10, 1, stride=2, bias=False)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        return self.head(F.relu(self.shortcut(F.relu(self.conv(x)))).mean((2, 3)))


torch.manual_seed(0)
torch.set_num_threads(1)
images, labels = torch.randn(192, 3, 60, 60), torch.arange(192) % 4
last = images.contiguous(memory_format=torch.channels_last)
batches = [(last[i : i + 32], labels[i : i + 32]) for i in range(0, 192, 32)]
model = Narrow()
who = sys.argv[1]
if who == "fine_tune":
    recipe = Recipe(batch_size=32, distillation=None)
    fine_tune(model, as_splits({"train": (images, labels)}, settings=None, seed=0).train, recipe=recipe, epochs=2)
elif who == "probe":
    probe_precision(model, last[:64], training=True, seconds=1.0)
else:
    network = trace(model.eval(), images[:2], pruning="unstructured" if who == "masks" else "channel")
    network.model.to(memory_format=torch.channels_last)
    gather = {"gradients": gather_gradients, "fisher": gather_fisher, "masks": gather_weight_gradients}[who]
    for _ in range(3):
        gather(network, batches, F.cross_entropy)
print("done")
"""


def in_a_child(program: str, argument: str, **env: str) -> None:
    """Runs a program that a damaged heap may end or stop; freed memory is overwritten, so that it shows."""
    settled = {"MALLOC_PERTURB_": "85", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **settled, **env}
    done = subprocess.run(
        [sys.executable, "-c", program, argument], env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize(("threads", "isa"), [("1", "DEFAULT"), ("2", "AVX2")])
def test_every_width_stride_and_kernel_has_the_gradients_of_float64(threads: str, isa: str) -> None:
    in_a_child(GRADIENTS, threads, OMP_NUM_THREADS=threads, ONEDNN_MAX_CPU_ISA=isa)


@pytest.mark.parametrize("who", ["fine_tune", "probe", "gradients", "fisher", "masks"])
def test_what_trains_or_differentiates_survives_a_narrow_shortcut(who: str) -> None:
    in_a_child(NARROW, who, OMP_NUM_THREADS="1")


class _Recorder(TorchFunctionMode):
    """Notes the functions that reach it, and the strides of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("conv2d", "avg_pool2d", "__getitem__"):
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


RISKY = nn.Conv2d(5, 4, 1, stride=2)
"""Switches the context on."""


def heard(call: Any, *, device: str = "cpu") -> list[str]:
    with _Recorder() as recorder, safe_convolutions(RISKY, device):
        call()
    return recorder.calls


X = torch.randn(2, 5, 12, 12)
LAST = X.contiguous(memory_format=torch.channels_last)
WEIGHT = torch.randn(4, 5, 1, 1, requires_grad=True)


@pytest.mark.parametrize(
    ("call", "calls"),
    [
        (lambda: F.conv2d(LAST, WEIGHT, stride=2), ["avg_pool2d", "conv2d"]),
        (lambda: F.conv2d(X, WEIGHT, stride=2), ["__getitem__", "conv2d"]),
        (lambda: torch.conv2d(input=LAST, weight=WEIGHT, stride=(2,)), ["avg_pool2d", "conv2d"]),
        (lambda: nn.Conv2d(5, 4, 1, stride=(1, 3))(LAST), ["avg_pool2d", "conv2d"]),
        (lambda: nn.Conv2d(5, 4, 1, stride=2, padding="valid")(LAST), ["avg_pool2d", "conv2d"]),
        (lambda: F.conv2d(LAST, WEIGHT), ["conv2d"]),
        (lambda: F.conv2d(LAST, WEIGHT, stride=2, padding=1), ["conv2d"]),
        (lambda: F.conv2d(LAST, WEIGHT.detach(), stride=2), ["conv2d"]),
        (lambda: nn.Conv2d(5, 5, 1, stride=2, groups=5)(LAST), ["conv2d"]),
        (lambda: nn.Conv2d(5, 4, 3, stride=2)(LAST), ["conv2d"]),
        (lambda: nn.Conv2d(16, 4, 1, stride=2)(torch.ones(1, 16, 4, 4)), ["conv2d"]),
    ],
)
def test_only_narrow_strided_convolutions_of_single_pixels_run_in_another_way(call: Any, calls: list[str]) -> None:
    assert heard(call) == calls


def test_nothing_changes_without_gradients_or_on_a_gpu() -> None:
    with torch.no_grad():
        assert heard(lambda: F.conv2d(LAST, WEIGHT, stride=2)) == ["conv2d"]
    assert heard(lambda: F.conv2d(LAST, WEIGHT.detach(), stride=2), device="cuda") == ["conv2d"]


class Own(nn.Module):
    """A convolution without a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 5, 1, 1))


@pytest.mark.parametrize(
    ("model", "on"),
    [
        (nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.Conv2d(5, 4, 1, stride=(1, 2))), True),
        (Own(), True),
        (nn.ConvTranspose2d(20, 4, 1, stride=2, output_padding=1), True),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(5, 4, 1, stride=2)), True),
        (nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.Conv2d(5, 4, 1), nn.Linear(4, 4)), False),
        (nn.Conv2d(5, 5, 1, stride=2, groups=5), False),
        (nn.Conv2d(16, 4, 1, stride=2), False),
        (nn.Conv1d(5, 4, 1, stride=2), False),
    ],
)
def test_the_context_is_on_where_a_convolution_is_at_risk(model: nn.Module, on: bool) -> None:
    assert isinstance(safe_convolutions(model, "cpu"), TorchFunctionMode) == on
    assert not isinstance(safe_convolutions(model, "cuda"), TorchFunctionMode)


@pytest.mark.parametrize("stride", [2, 3, (2, 1), [1, 3], (4,)])
@pytest.mark.parametrize("shape", [(2, 5, 12, 12), (2, 5, 11, 7), (5, 12, 12), (0, 5, 12, 12)])
def test_outputs_are_those_of_the_convolution(stride: Any, shape: tuple[int, ...]) -> None:
    layer = nn.Conv2d(5, 4, 1, stride=stride)
    x = torch.randn(shape)
    for each in (x, x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.mT.contiguous().mT):
        with torch.no_grad():
            wanted = layer(each)
        with safe_convolutions(RISKY, "cpu"):
            found = layer(each)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("stride", "extra"), [(2, 1), (3, 2), ((2, 1), (1, 0)), ([1, 3], [0, 1]), ((2,), (0,))])
@pytest.mark.parametrize("shape", [(2, 5, 6, 4), (5, 6, 4)])
def test_outputs_are_those_of_the_transposed_convolution(bias: bool, stride: Any, extra: Any, shape: Any) -> None:
    layer = nn.ConvTranspose2d(5, 4, 1, bias=bias)
    layer.stride, layer.output_padding = stride, extra
    x = torch.randn(shape)
    with torch.no_grad():
        wanted = layer(x)
    with safe_convolutions(layer, "cpu"):
        torch.testing.assert_close(layer(x), wanted)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16


def test_a_refused_convolution_is_refused_in_torchs_own_words() -> None:
    with (
        safe_convolutions(RISKY, "cpu"),
        pytest.raises(RuntimeError, match="is not supported for strided convolutions"),
    ):
        F.conv2d(LAST, WEIGHT, stride=2, padding="same")
    with safe_convolutions(RISKY, "cpu"), pytest.raises(RuntimeError, match="expected input"):
        F.conv2d(torch.ones(1, 3, 4, 4), WEIGHT, stride=2)


def test_bfloat16_stays_bfloat16() -> None:
    layer = nn.Conv2d(5, 4, 1, stride=2)
    with safe_convolutions(RISKY, "cpu"), torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(LAST)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(LAST), atol=0.05, rtol=0.05)


def part(reentrant: bool) -> Tensor:
    x = LAST.clone().requires_grad_()
    return checkpoint(lambda x: F.conv2d(x, WEIGHT, stride=2), x, use_reentrant=reentrant).square().sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts_run_in_another_way_when_they_run_again(reentrant: bool) -> None:
    WEIGHT.grad = None
    assert heard(lambda: differentiate(part(reentrant)))[-2:] == ["avg_pool2d", "conv2d"]
    if not reentrant:
        assert heard(lambda: gradients_of(part(reentrant), [WEIGHT]))[-2:] == ["avg_pool2d", "conv2d"]
    (wanted,) = torch.autograd.grad(F.conv2d(X, WEIGHT[:, :], stride=2).square().sum(), [WEIGHT])
    torch.testing.assert_close(WEIGHT.grad, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_gradients_are_those_of_torch_and_none_where_a_parameter_has_no_part() -> None:
    a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    a.grad = torch.ones(3)
    first, second = gradients_of((a * a).sum(), [a, b])
    assert second is None
    torch.testing.assert_close(first, 2 * a.detach())
    torch.testing.assert_close(a.grad, torch.ones(3))
    differentiate((a * a).sum())
    torch.testing.assert_close(a.grad, 1 + 2 * a.detach())
    for call in (differentiate, lambda value: gradients_of(value, [a])):
        with pytest.raises(RuntimeError, match="does not require grad"):
            call(torch.ones(()))
