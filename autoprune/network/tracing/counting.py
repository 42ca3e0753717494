"""Counts of a concrete network, taken by PyTorch itself: the yardstick for the cost model.

Decides how MACs, parameters and bytes of a module are counted. A network runs on fake tensors, which have shapes and a
device but no numbers, while `torch.utils.flop_counter` counts; one whose code looks at numbers runs for real. Attention
is taken apart into products, since the counter does not know the CPU's fused one (11.3 instead of 17.6 GMACs for
ViT-B/16). No module of a person's ever meets the meta device: code that makes constants on the CPU fails there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autoprune.network.graph.copies import deep_copy, sharing_copy
from autoprune.network.graph.modules import device_of, evaluating, unsaved_buffers
from autoprune.network.tracing.program import unlogged


def count_macs(model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Returns the multiply-accumulates of one forward pass for one sample, as `torch.utils.flop_counter` counts them.

    It raises what the forward pass raises.
    """
    try:
        return macs_of_shapes(shapes_alone(model), inputs, device_of(model))
    except Exception:  # code that looks at numbers raises whatever it likes on tensors that have none
        return macs_for_real(sharing_copy(model, frozen=True), inputs)


def macs_for_real(model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Returns what `count_macs` does, of a model that runs on the very `inputs`."""
    with counting() as counter, evaluating(model), torch.no_grad():
        model(*inputs)
    return macs_counted(counter, inputs)


def macs_of_shapes(model: nn.Module, inputs: Sequence[Tensor], device: torch.device) -> int:
    """Returns what `count_macs` does, of a copy that `shapes_alone` or a cut of one gave, as if on `device`."""
    counter = run_shapes(model, inputs, device)
    return macs_counted(counter, inputs)


def macs_counted(counter: FlopCounterMode, inputs: Sequence[Tensor]) -> int:
    """Returns the multiply-accumulates a sample that were counted in one pass of `inputs`."""
    return int(counter.get_total_flops()) // 2 // int(inputs[0].shape[0])


def run_shapes(model: nn.Module, inputs: Sequence[Tensor], device: torch.device) -> FlopCounterMode:
    """Runs a copy that `shapes_alone` or a cut of one gave, on fake tensors of the shapes of `inputs`.

    Its parameters become fake tensors on `device`. Returns what was counted; it raises what the forward pass raises.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # constants that the modules hold are real
    made: dict[int, Tensor] = {}
    with fake:
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                _fill(table, device, made)
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
        like = tuple(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in inputs)
    with unlogged(), fake, counting() as counter, evaluating(model), torch.no_grad():
        model(*like)
    return counter


def _fill(table: dict[str, Any], device: torch.device, made: dict[int, Tensor]) -> None:
    """Puts fake tensors in place of those on the meta device, under a fake mode; tied ones stay tied by `made`."""
    for name, old in table.items():
        if old is None or not old.is_meta:
            continue
        if id(old) not in made:
            new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=device)
            made[id(old)] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
        table[name] = made[id(old)]


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Counts floating-point operations of all forward passes in it, and keeps them in forms that are counted."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    recurrent = {torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops}
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=recurrent) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _recurrent_flops(x: Any, w_ih: Any, w_hh: Any, *args: Any, **kwargs: Any) -> int:
    """Counts oneDNN's recurrent layer from the shapes of its input `(T, B, I)` and of its two weights."""
    return int(2 * x[0] * x[1] * (math.prod(w_ih) + math.prod(w_hh)))


def shapes_alone(model: nn.Module) -> nn.Module:
    """Returns a copy without numbers, to be cut and handed to `run_shapes`: its tensors lie on the meta device."""
    memo: dict[int, Any] = {}  # `Module.to` would untie tied parameters, after numbers were copied
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return deep_copy(model, memo)


def count_params(model: nn.Module) -> int:
    """Returns the number of trainable elements; tied parameters count once."""
    return sum(p.numel() for p in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """Returns the bytes of the state dict, tied tensors once; buffers that are not stored there do not count."""
    unsaved = unsaved_buffers(model)
    named = (*model.named_parameters(), *model.named_buffers(remove_duplicate=False))
    tensors = {id(t): t for name, t in named if name not in unsaved}
    return sum(t.numel() * t.element_size() for t in tensors.values())
