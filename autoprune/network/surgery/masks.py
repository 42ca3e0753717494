"""Masks: single weights are set to zero and every shape stays.

Decides which weights may be masked, what a policy over them costs (non-zeros), which positions a pattern keeps, how a
masked copy is built, and how zeros stay zero in training. A mask group is one weight tensor; its `size` is the number
of weights. `unstructured` keeps any positions. `2:4` keeps two of every four consecutive input channels, for each
output and each kernel position: for a linear layer four neighbours of the reduction dimension, for a convolution the
order of channels-last sparse kernels. Knows nothing of how weights are scored or refitted.

Such costs are a count of non-zeros: without a kernel that skips zeros the network is as slow as the dense one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autoprune.cost import MACS, MEMORY, PARAMS, SIZE, CostModel, Form, Term
from autoprune.errors import InputError, PolicyError, nearest
from autoprune.network.graph.assembly import stages_of
from autoprune.network.graph.groups import Assembly, Frozen, Links, PruningGroup, module_of
from autoprune.network.graph.network import Network
from autoprune.network.graph.record import Record
from autoprune.network.surgery.cut import rebuild
from autoprune.network.surgery.selection import Selection
from autoprune.policy import CHANNEL, SEMI_STRUCTURED, UNSTRUCTURED

_KINDS = ("conv", "transposed", "depthwise", "linear", "recurrent")


@dataclass(frozen=True, slots=True)
class MaskWeight:
    """A weight that may be masked: where it lies and how often one sample multiplies each of its elements."""

    name: str
    parameter: str
    module: str
    kind: str
    shape: tuple[int, ...]
    in_dim: int
    positions: int
    itemsize: int
    stage: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def mask_assembly(record: Record, dense: Mapping[str, int], pattern: str) -> Assembly:
    """Returns mask groups, weights that stay whole with the reason, and the cost model of their non-zeros.

    Args:
        record: What the pass over the graph wrote down.
        dense: Every cost of the dense network.
        pattern: `unstructured` or `2:4`.

    Raises:
        InputError: The pattern is unknown.
    """
    if pattern not in _REASONS:
        raise InputError(f"unknown pruning {pattern!r}{nearest(pattern, (CHANNEL, *_REASONS))}")
    weights = _weights(record)
    looked_up = dict.fromkeys(layer.weight for layer in record.layers if layer.kind == "embedding")
    groups: list[PruningGroup] = []
    frozen: list[Frozen] = []
    chosen: list[MaskWeight] = []
    offset = 0
    for weight in weights:
        reason = "its rows are looked up by index too" if weight.parameter in looked_up else _REASONS[pattern](weight)
        if reason is not None:
            frozen.append(Frozen(weight.name, weight.size, reason))
            continue
        groups.append(PruningGroup(weight.name, weight.size, offset, (weight.module,), (), weight.stage))
        chosen.append(weight)
        offset += weight.size
    shapes = {parameter.name: parameter.shape for parameter in record.parameters}
    known = {weight.parameter for weight in weights}
    frozen += [
        Frozen(module_of(name), math.prod(shapes[name]), "its rows are looked up by index, not multiplied")
        for name in looked_up
        if name not in known
    ]
    links = tuple(
        Links(
            layer,
            module_of(layer.weight),
            None if layer.inputs is None else np.full(len(layer.inputs), -1, dtype=np.int64),
            np.full(len(layer.outputs), -1, dtype=np.int64),
        )
        for layer in record.layers
    )
    nothing = np.full(record.solution.number, -1, dtype=np.int64)
    return Assembly(tuple(groups), tuple(frozen), {}, links, _cost_model(chosen, dense), nothing)


def mask_weights(network: Network) -> dict[str, MaskWeight]:
    """Returns the weight of every mask group by the group's name, in the order of the graph."""
    named = {weight.name: weight for weight in _weights(network.record)}
    return {group.name: named[group.name] for group in network.groups}


def all_weights(network: Network) -> tuple[MaskWeight, ...]:
    """Returns every weight that is multiplied, those that stay whole included."""
    return _weights(network.record)


def grid_widths(size: int, *, step: float, min_ratio: float = 0.0, max_ratio: float = 0.9) -> tuple[int, ...]:
    """Returns the numbers of weights, ascending, that an unstructured mask may keep.

    Ratios are the multiples of `step` from `min_ratio` to `max_ratio`, and both ends.
    """
    count = math.floor(max_ratio / step + 1e-9)
    ratios = {round(i * step, 9) for i in range(count + 1)} | {min_ratio, max_ratio}
    kept = {max(1, round(size * (1.0 - ratio))) for ratio in ratios if min_ratio <= ratio <= max_ratio}
    return tuple(sorted(kept))


def pair_widths(size: int, *, min_ratio: float = 0.0, max_ratio: float = 0.9) -> tuple[int, ...]:
    """Returns what a 2:4 mask may keep, half or all of the weights, within the ratios; empty where they allow
    neither.
    """
    return tuple(w for w, ratio in ((size // 2, 0.5), (size, 0.0)) if min_ratio <= ratio <= max_ratio)


def keep(weight: MaskWeight, scores: np.ndarray, width: int, pattern: str) -> np.ndarray:
    """Returns the ascending positions in the flattened weight that stay; of equal scores the first ones.

    Args:
        weight: The weight.
        scores: `(size,)`; higher means keep.
        width: How many stay. For `2:4` half of them, or all.
        pattern: `unstructured` or `2:4`.

    Raises:
        PolicyError: The pattern cannot keep so many.
    """
    if width == weight.size:
        return np.arange(weight.size)
    if pattern == UNSTRUCTURED:
        return _largest(scores, width)
    if 2 * width != weight.size:
        raise PolicyError(f"2:4 keeps half or all of the {weight.size} weights of {weight.name!r}, not {width}")
    positions = _quads(np.arange(weight.size).reshape(weight.shape), weight.in_dim)
    best = np.argsort(-scores[positions], axis=1, kind="stable")[:, :2]
    return np.sort(np.take_along_axis(positions, best, axis=1).reshape(-1))


def mask_tensors(network: Network, selection: Selection) -> dict[str, Tensor]:
    """Returns parameter → boolean tensor of the weight's shape, true where it stays, for every group in `selection`."""
    weights = mask_weights(network)
    masks: dict[str, Tensor] = {}
    for name, kept in selection.items():
        if name not in weights:
            raise PolicyError(f"no mask group {name!r}{nearest(name, weights)}")
        flat = torch.zeros(weights[name].size, dtype=torch.bool)
        flat[torch.from_numpy(np.asarray(kept))] = True
        masks[weights[name].parameter] = flat.reshape(weights[name].shape)
    return masks


def masked(network: Network, selection: Selection) -> nn.Module:
    """Returns a copy of the dense model with zeros where `selection` keeps nothing.

    Raises:
        PolicyError: There is no such group.
    """
    tensors = {}
    for name, mask in mask_tensors(network, selection).items():
        weight = network.model.get_parameter(name).detach()
        tensors[name] = weight * mask.to(weight.device)
    return rebuild(network, tensors)


@contextmanager
def zeros_kept(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Trains with the masks: gradients of masked weights are zero within this context.

    A weight that is zero, without a gradient, stays exactly zero under momentum, weight decay and Adam's averages,
    which all are multiples of weight and gradients.
    """
    handles: list[RemovableHandle] = []
    try:
        for name, mask in masks.items():
            parameter = model.get_parameter(name)
            if parameter.requires_grad:
                handle: RemovableHandle = parameter.register_hook(_masking(~mask.to(parameter.device)))  # type: ignore[no-untyped-call]
                handles.append(handle)
        yield
    finally:
        for handle in handles:
            handle.remove()


def sparsities(model: nn.Module, network: Network) -> dict[str, dict[str, Any]]:
    """Returns for every mask group its parameter, the elements of that in `model`, its non-zeros and its sparsity."""
    found: dict[str, dict[str, Any]] = {}
    for name, weight in mask_weights(network).items():
        nonzero = int(torch.count_nonzero(model.get_parameter(weight.parameter)))
        found[name] = {
            "parameter": weight.parameter,
            "size": weight.size,
            "nonzero": nonzero,
            "sparsity": 1.0 - nonzero / weight.size,
        }
    return found


def masked_layers(network: Network, selection: Selection) -> list[dict[str, Any]]:
    """Returns for every weight how many of its elements stay, and its MACs and parameters, before and after."""
    biases = {layer.weight: layer.bias for layer in network.record.layers}
    shapes = {parameter.name: parameter.shape for parameter in network.record.parameters}
    rows: list[dict[str, Any]] = []
    for weight in all_weights(network):
        bias = biases[weight.parameter]
        rest = math.prod(shapes[bias]) if bias is not None else 0
        kept = len(selection[weight.name]) if weight.name in selection else weight.size
        rows.append(
            {
                "module": weight.name,
                "kind": weight.kind,
                "width_before": weight.size,
                "width_after": kept,
                "macs_before": weight.positions * weight.size,
                "macs_after": weight.positions * kept,
                "params_before": weight.size + rest,
                "params_after": kept + rest,
            }
        )
    return rows


# --- parts --------------------------------------------------------------------------------------------------------


def _weights(record: Record) -> tuple[MaskWeight, ...]:
    parameters = {parameter.name: parameter for parameter in record.parameters}
    stages = stages_of(record.layers)
    macs: dict[str, int] = {}
    found: dict[str, MaskWeight] = {}
    for layer in record.layers:
        if layer.kind not in _KINDS or layer.product is None:
            continue
        parameter = parameters[layer.weight]
        product = record.products[layer.product]
        count = product.factor * math.prod(d if isinstance(d, int) else len(d) for d in product.dims)
        macs[layer.weight] = macs.get(layer.weight, 0) + count // record.batch
        module = module_of(layer.weight)
        found.setdefault(
            layer.weight,
            MaskWeight(
                name=module if layer.weight == f"{module}.weight" else layer.weight,
                parameter=layer.weight,
                module=module,
                kind=layer.kind,
                shape=parameter.shape,
                in_dim=1 - layer.out_dim,
                positions=0,
                itemsize=parameter.itemsize,
                stage=stages[layer.weight],
            ),
        )
    return tuple(replace(weight, positions=macs[name] // weight.size) for name, weight in found.items())


def _cost_model(weights: Iterable[MaskWeight], dense: Mapping[str, int]) -> CostModel:
    chosen = tuple(weights)

    def terms(cost: str, factor: Callable[[MaskWeight], int]) -> tuple[Term, ...]:
        rest = dense[cost] - sum(factor(weight) * weight.size for weight in chosen)
        own = (Term(factor(weight), (Form(0, ((i, 1),)),)) for i, weight in enumerate(chosen))
        return (Term(rest), *own)

    return CostModel(
        groups=tuple(weight.name for weight in chosen),
        sizes=tuple(weight.size for weight in chosen),
        macs=terms(MACS, lambda weight: weight.positions),
        params=terms(PARAMS, lambda weight: 1),
        size_bytes=terms(SIZE, lambda weight: weight.itemsize),
        live=((Term(dense[MEMORY]),),),
    )


def _whole(weight: MaskWeight) -> str | None:
    return None if weight.size > 1 else "it is a single number"


def _unpaired(weight: MaskWeight) -> str | None:
    channels = weight.shape[weight.in_dim]
    if channels % 4 == 0:
        return None
    what = "1 input channel" if channels == 1 else f"{channels} input channels"
    return f"each output reads {what}, and 2:4 takes them four at a time"


_REASONS: Mapping[str, Callable[[MaskWeight], str | None]] = {UNSTRUCTURED: _whole, SEMI_STRUCTURED: _unpaired}
"""Pattern → why a weight stays whole, or None."""


def _largest(scores: np.ndarray, width: int) -> np.ndarray:
    place = len(scores) - width
    threshold = np.partition(scores, place)[place]
    above = np.flatnonzero(scores > threshold)
    equal = np.flatnonzero(scores == threshold)[: width - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _quads(positions: np.ndarray, in_dim: int) -> np.ndarray:
    """Returns the positions `(n, 4)` of consecutive input channels."""
    quads: np.ndarray = np.moveaxis(positions, in_dim, -1).reshape(-1, 4)
    return quads


def _masking(gone: Tensor) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:
        return gradient.masked_fill(gone.to(gradient.device), 0.0)

    return hook
