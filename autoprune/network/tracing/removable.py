"""Which groups may be removed whole, so that depth is searched together with width.

Decides the rule: a group may go where the network's output still depends on its input without it. It is tried on the
masked twin: the weights that consume the group are zero, and the output is compared on two different inputs. A layer
of a plain chain and the residual stream itself fail, because everything runs through them; the inside of a residual
block, the squeeze of an SE gate, the layers that a dense block adds and the hidden width of a transformer's MLP pass.
What passes is then removed on a copy, run, and compared with its masked twin; what does not survive stays.

Groups are tried one at a time, and all together once, so that what is built for them fits. Whether a *combination*
leaves a path from input to output is not asked: a policy that removes everything that is parallel scores badly, and
the search learns it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.network.graph.copies import deep_copy
from autoprune.network.graph.modules import evaluating
from autoprune.network.graph.network import Network
from autoprune.network.surgery.selection import Selection
from autoprune.network.surgery.twin import ignoring, informative, relative_error
from autoprune.network.tracing.verify import Shapes, bisected, faults, halved

NEEDED = "without it the output no longer depends on the input"
RECURRENT = "a recurrent layer keeps at least one hidden unit"


def with_removable(network: Network, names: Iterable[str] | None = None) -> tuple[Network, dict[str, str]]:
    """Returns the network with the groups that may be removed whole marked, and why the others may not, by name.

    Args:
        network: What `trace` returned.
        names: The groups to try; by default all of them.
    """
    wanted = [group.name for group in network.groups] if names is None else list(names)
    asked = replace(network, removable=network.removable | set(wanted))
    recurrent = {links.module for links in network.links if links.layer.kind == "recurrent"}
    twin = _lively(network.model)
    reasons: dict[str, str] = {}
    for group in network.groups:
        if group.name not in wanted:
            continue
        if recurrent & set(group.producers):
            reasons[group.name] = RECURRENT
            continue
        with ignoring(asked, twin, {group.name: _NONE}):
            if not depends_on_input(twin, network.example_inputs):
                reasons[group.name] = NEEDED
    candidates = [name for name in wanted if name not in reasons]
    if candidates:
        reasons |= bisected(lambda tried: _removed(asked, tried), candidates)
    found = frozenset(name for name in wanted if name not in reasons)
    return replace(network, removable=network.removable | found), reasons


_NONE = np.empty(0, dtype=np.int64)


def _lively(model: nn.Module) -> nn.Module:
    """Returns a copy in which no parameter is all zeros, as heads and residual scales are when training begins."""
    twin = deep_copy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1 and not bool(parameter.any()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return twin


def depends_on_input(model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether the outputs for two different inputs of these shapes differ.

    At all, not by some tolerance: what reads nothing computes the very same numbers, and in an untrained network of
    many squeezes a signal that is there is a millionth of the output.
    """
    with evaluating(model), torch.no_grad():
        first = model(*informative(inputs))
        second = model(*(_other(x) for x in informative(inputs)))
    return relative_error(second, first) > 0.0


def _other(x: Tensor) -> Tensor:
    """Returns another input: other noise, or other numbers among those that occur (0 and 1 where one alone does)."""
    generator = torch.Generator().manual_seed(1)
    if x.is_floating_point():
        return torch.randn(x.shape, generator=generator).to(x)
    if x.dtype == torch.bool:
        return ~x
    flat = x.flatten()
    if bool((flat == flat[0]).all()):
        return torch.randint(0, 2, x.shape, generator=generator).to(x)
    return flat[torch.randperm(len(flat), generator=generator).to(x.device)].reshape(x.shape)


def _removed(network: Network, names: list[str]) -> str | None:
    """Removes the named groups on a copy while all others are halved; returns what is wrong, or None."""
    rest = [group.name for group in network.groups if group.name not in names and not group.approximate]
    alone: Selection = dict.fromkeys(names, _NONE)
    shapes = Shapes(network)
    return faults(network, alone, shapes) or faults(network, {**halved(network, rest), **alone}, shapes)
