"""Merging: folds each removed channel into the kept one that is most like it, without any data.

Decides which kept channel takes over for a removed one, and with what coefficient. Two channels are alike where the
filters that make them are: the likeness is the cosine of the weights of all their producers (of a depthwise convolution
behind them times its own). The weights that read the removed channel `j` are added, times a coefficient, to those that
read the kept channel `i` of largest likeness `r`.

Where a BatchNorm stands behind the producers it says how the channel is distributed, and the network itself, fed with
constants in the BatchNorm's place, says what its activations `f` make of that. With normal distributions of correlation
`r` the least-squares coefficient is then `cov(f(z_j), f(z_i)) / var(f(z_i))`, from the Hermite coefficients of `f`; and
what is still missing in the mean (a removed channel's constant part) goes into the consumer's bias or into the mean of
the BatchNorm behind it. Where there is none the coefficient is that of a projection of the filters, biases included, as
a rectifier passes positive factors on. Both are exact for a removed channel that is the copy or, under a rectifier, a
multiple of a kept one. Of a channel that resembles no kept one nothing but that
constant part is left.

Source: Theus et al., Towards Meta-Pruning via Optimal Transport (Intra-Fusion), ICLR 2024, for the folding of channels
into their nearest ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autoprune.network.calibration.layer_inputs import rows_of
from autoprune.network.graph.copies import deep_copy
from autoprune.network.graph.groups import PruningGroup
from autoprune.network.graph.labels import Labels
from autoprune.network.graph.modules import device_of, evaluating
from autoprune.network.graph.network import Network
from autoprune.network.surgery.selection import Selection, kept_indices, unit_mask
from autoprune.network.surgery.sizes import uncounted

_PRODUCERS = ("conv", "transposed", "depthwise", "linear", "embedding", "recurrent")
_NODES = 9
"""Points of the quadrature over a BatchNorm's output; a rectifier's mean is off by at most 2 % of the scale."""


@dataclass(frozen=True, slots=True)
class Heir:
    """The channel `to` takes over for `gone` (both in the numbering of the index map).

    `likeness` in [0, 1] is their correlation, `scale` the coefficient where nothing is known of distributions.
    """

    gone: int
    to: int
    likeness: float
    scale: float


def merge(network: Network, model: nn.Module, selection: Selection) -> None:
    """Gives the pruned `model`, which was cut from `network` to `selection`, its merged weights, in place."""
    heirs = heirs_of(network, selection)
    if not heirs:
        return
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    with torch.no_grad():
        for name, tensor in merged_tensors(network, selection, heirs).items():
            state[name].copy_(tensor)


# --- who takes over -----------------------------------------------------------------------------------------------


def heirs_of(network: Network, selection: Selection) -> tuple[Heir, ...]:
    """Returns who takes over for each channel that `selection` leaves out; with likeness 0, nobody does."""
    found: list[Heir] = []
    for group in network.groups:
        kept = selection.get(group.name)
        if kept is None or not 0 < len(kept) < group.size:
            continue
        factors = _factors(network, group)
        if not factors:
            continue
        gone = np.setdiff1d(np.arange(group.size), kept)
        likeness = torch.ones(len(gone), len(kept), dtype=torch.float64)
        for rows, _ in factors:
            a, b = rows[gone], rows[kept]
            lengths = a.norm(dim=1)[:, None] * b.norm(dim=1)[None, :]
            likeness *= (a @ b.T / lengths.clamp_min(1e-12)).clamp(0, 1)
        best, place = likeness.max(1)
        for j, r, i in zip(gone.tolist(), best.tolist(), kept[place.numpy()].tolist(), strict=True):
            scale = r
            for rows, homogeneous in factors:
                if homogeneous and r > 0:
                    # Of a chain of producers each passes its factor on. The gates of a recurrent unit do not.
                    scale *= float(rows[j].norm() / rows[i].norm())
            found.append(Heir(group.offset + j, group.offset + i, r, scale))
    return tuple(found)


def _factors(network: Network, group: PruningGroup) -> list[tuple[Tensor, bool]]:
    """Returns `(n, fan-in)` filters: those of all parallel producers in one, those of each depthwise one apart."""
    parts = _filters(network, group)
    homogeneous = not any(kind == "recurrent" for _, kind in parts)
    mixing = [rows for rows, kind in parts if kind != "depthwise"]
    factors = [torch.cat(mixing, 1)] if mixing else []
    factors += [rows for rows, kind in parts if kind == "depthwise"]
    return [(rows, homogeneous) for rows in factors]


def _filters(network: Network, group: PruningGroup) -> list[tuple[Tensor, str]]:
    """Returns the `(n, fan-in)` filters of a group's channels, double, one entry a producing weight, with its kind.

    A BatchNorm behind a producer scales its filters, and takes care of what is constant; elsewhere the bias is one more
    weight.
    """
    found: dict[str, tuple[Tensor, str]] = {}
    for place, links in enumerate(network.links):
        inside = (links.outputs >= group.offset) & (links.outputs < group.offset + group.size)
        if links.layer.kind not in _PRODUCERS or links.layer.weight in found or not inside.any():
            continue
        rows = rows_of(links, _values(network, links.layer.weight))
        norm = _norm_behind(network, place)
        if norm is not None:
            rows = rows * _gain(norm)[:, None]
        elif links.layer.bias is not None:
            bias = _values(network, links.layer.bias).double()
            own = bias[links.layer.bias_start : links.layer.bias_start + len(rows)]
            rows = torch.cat([rows, own[:, None]], 1)
        order = _by_channel(links.outputs, group)
        if order is None:
            continue
        picked = rows[torch.from_numpy(order)]  # (n, times, fan-in)
        found[links.layer.weight] = picked.flatten(1), links.layer.kind
    return list(found.values())


def _by_channel(units: Labels, group: PruningGroup) -> np.ndarray | None:
    """Returns the indices of each channel of the group, `(n, times)`; None where channels do not occur alike.

    Neither do heads of an attention: an index belongs to a head and to a dimension.
    """
    if units.ndim > 1:
        return None
    inside = np.flatnonzero((units >= group.offset) & (units < group.offset + group.size))
    if len(inside) == 0 or len(inside) % group.size:
        return None
    ordered = inside[np.argsort(units[inside], kind="stable")].reshape(group.size, -1)
    same = (units[ordered] == np.arange(group.offset, group.offset + group.size)[:, None]).all()
    return ordered if same else None


def _norm_behind(network: Network, place: int) -> nn.modules.batchnorm._BatchNorm | None:
    """Returns the BatchNorm that reads the output of the link at `place`, where there is one with statistics."""
    links = network.links[place]
    if not links.layer.normalised:
        return None
    for other in network.links[place + 1 :]:
        if other.layer.kind == "norm" and np.array_equal(other.outputs, links.outputs):
            module = network.model.get_submodule(other.module)
            fine = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
            return module if fine else None  # type: ignore[return-value]
    return None


def _gain(norm: nn.modules.batchnorm._BatchNorm) -> Tensor:
    """Returns what a BatchNorm in eval mode multiplies with, `(C,)` double, on the CPU."""
    assert norm.running_var is not None
    return norm.weight.detach().double().cpu() / (norm.running_var.double().cpu() + norm.eps).sqrt()


def _values(network: Network, name: str) -> Tensor:
    """Returns a parameter's values on the CPU: the numbers of each pair of channels are looked at one by one."""
    return network.model.get_parameter(name).detach().cpu()


# --- what it changes ----------------------------------------------------------------------------------------------


def merged_tensors(network: Network, selection: Selection, heirs: Iterable[Heir]) -> dict[str, Tensor]:
    """Returns the changed weights, biases and running means by name, cut to the channels that stay, on the CPU."""
    kept = unit_mask(network, selection)
    heirs = tuple(heirs)
    profiles = _profiles(network, heirs)
    tensors: dict[str, Tensor] = {}
    for place, links in enumerate(network.links):
        dim = links.layer.in_dim
        if links.inputs is None or dim is None or links.layer.weight in tensors:
            continue
        pairs = _pairs(links.inputs, heirs)
        if not pairs:
            continue
        weight = _values(network, links.layer.weight)
        if len(links.outputs) < weight.shape[links.layer.out_dim]:
            continue  # packed with others in one weight
        old = weight.double().movedim(dim, 0)  # (inputs, ...)
        merged = old.clone()
        profile = profiles.get(links.module)
        shift = torch.zeros(weight.shape[links.layer.out_dim], dtype=torch.float64)
        for gone, to, heir in pairs:
            scale, missing = _coefficients(profile, gone, to, heir)
            merged[to] += scale * old[gone]
            if missing:
                removed = (
                    weight.double().select(dim, gone).movedim(links.layer.out_dim - (dim < links.layer.out_dim), 0)
                )
                shift += missing * removed.reshape(len(shift), -1).sum(1)
        stay = torch.from_numpy(kept_indices(links.inputs, kept))
        rows = torch.from_numpy(kept_indices(links.outputs, kept))
        new = merged.index_select(0, stay).movedim(0, dim).index_select(links.layer.out_dim, rows)
        tensors[links.layer.weight] = new.to(weight.dtype)
        if bool(shift.any()):
            tensors |= _absorbed(network, place, shift, rows)
    return tensors


def _pairs(inputs: Labels, heirs: tuple[Heir, ...]) -> list[tuple[int, int, Heir]]:
    """Returns (input that goes, input that takes over, heir); the k-th place of a channel goes to the k-th place."""
    if inputs.ndim > 1:
        return []
    places: dict[int, list[int]] = {}
    for index, unit in enumerate(inputs.tolist()):
        if unit >= 0:
            places.setdefault(unit, []).append(index)
    return [
        (gone, to, heir)
        for heir in heirs
        for gone, to in zip(places.get(heir.gone, []), places.get(heir.to, []), strict=False)
    ]


def _coefficients(profile: Tensor | None, gone: int, to: int, heir: Heir) -> tuple[float, float]:
    """Returns the coefficient of an input that takes over, and what is then missing in the mean.

    `profile` `(inputs, nodes)` holds the Hermite coefficients of what arrives; NaN where that is not known.
    """
    if profile is None or bool(profile[[gone, to]].isnan().any()):
        return heir.scale, 0.0
    first, second = profile[gone], profile[to]
    powers = heir.likeness ** torch.arange(1, len(first), dtype=torch.float64)
    variance = float(second[1:].square().sum())
    scale = max(0.0, float((powers * first[1:] * second[1:]).sum()) / variance) if variance > 1e-12 else 0.0
    return scale, float(first[0] - scale * second[0])


def _absorbed(network: Network, place: int, shift: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Returns the bias of the link at `place` with `shift` `(N,)` added, or the mean of the BatchNorm behind it less
    that; nothing where there is neither.
    """
    links = network.links[place]
    if links.layer.groups > 1:
        return {}  # its inputs are those of several groups in one, so the shift is not each group's own
    if links.layer.bias is not None:
        bias = _values(network, links.layer.bias)
        return {links.layer.bias: (bias + shift.to(bias.dtype)).index_select(0, rows)}
    norm = _norm_behind(network, place)
    if norm is None or norm.running_mean is None:
        return {}
    path = next(name for name, module in network.model.named_modules() if module is norm)
    return {f"{path}.running_mean": (norm.running_mean.cpu() - shift.to(norm.running_mean.dtype)).index_select(0, rows)}


def _profiles(network: Network, heirs: tuple[Heir, ...]) -> dict[str, Tensor]:
    """Returns, by consumer, the Hermite coefficients `(C, nodes)` of each input channel; NaN where none are known.

    Every BatchNorm of a channel that is merged puts out a constant, `shift + scale * z`, for each point `z` of a
    quadrature over the standard normal distribution; what arrives at the consumers is projected on the polynomials.
    """
    units = np.unique([unit for heir in heirs for unit in (heir.gone, heir.to)])
    normed = np.unique(np.concatenate([n.outputs for n in network.links if n.layer.kind == "norm"] or [units[:0]]))
    known = np.intersect1d(units, normed)
    norms = {n.module for n in network.links if n.layer.kind == "norm" and np.isin(n.outputs, known).any()}
    modules = dict(network.model.named_modules())
    if not norms or not all(isinstance(modules[path], nn.modules.batchnorm._BatchNorm) for path in norms):
        return {}
    consumers = {
        n.module: n.inputs
        for n in network.links
        if n.inputs is not None
        and np.isin(n.inputs, known).any()
        and isinstance(modules.get(n.module), (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }
    points, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    lengths = np.sqrt([math.factorial(n) for n in range(_NODES)])
    basis = np.polynomial.hermite_e.hermevander(points, _NODES - 1) / lengths  # (points, polynomials)
    shares = basis * (weights / weights.sum())[:, None]
    found: dict[str, Tensor] = {}
    for z, share in zip(points.tolist(), torch.from_numpy(shares), strict=True):
        for path, values in _constant_inputs(network, norms, consumers, z).items():
            part = values[:, None] * share
            found[path] = found[path] + part if path in found else part
    for path, inputs in consumers.items():
        found[path][torch.from_numpy(~np.isin(inputs, known))] = torch.nan
    return found


def _constant_inputs(network: Network, norms: set[str], consumers: Iterable[str], z: float) -> dict[str, Tensor]:
    """Returns the mean input `(C,)` of every consumer when the named BatchNorms put out `shift + scale * z`."""
    twin = deep_copy(network.model)
    with torch.no_grad():
        for path in norms:
            norm = twin.get_submodule(path)
            assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
            norm.bias.add_(norm.weight * z)
            norm.weight.zero_()
    found: dict[str, Tensor] = {}

    def watch(path: str) -> RemovableHandle:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            with uncounted():
                x = args[0].detach().double()
                by_channel = x.movedim(-1 if isinstance(module, nn.Linear) else 1, 0)  # (C, ...)
                found[path] = by_channel.flatten(1).mean(1).cpu()

        return twin.get_submodule(path).register_forward_pre_hook(record)

    for path in consumers:
        watch(path)
    device = device_of(twin)
    with evaluating(twin), torch.no_grad():
        twin(*(x.to(device) for x in network.example_inputs))
    return found
