"""Nothing is believed: every group is pruned on a copy, run, and compared with its masked twin.

Decides which groups are frozen because pruning them breaks or changes the network. All groups are tried together
first; only where that fails are they halved until the guilty ones are found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from autoprune.network.complexity import count_macs
from autoprune.network.surgery import Selection, cut, masked_twin
from autoprune.network.trace import Network, evaluating

TOLERANCE = 1e-3
"""Largest difference from the masked twin, relative to the largest output: float32 rounding in deep networks, no
more."""


def verified(network: Network) -> Network:
    """Returns the network with every group frozen that does not survive pruning, with the reason."""
    reasons = bisected(lambda names: check(network, names), [group.name for group in network.groups])
    return network.freeze(reasons) if reasons else network


def bisected(tried: Callable[[list[str]], str | None], names: list[str]) -> dict[str, str]:
    """Returns the names that cannot be `tried` together with the others, with what is then wrong.

    All are tried together first; only where that fails they are halved until the guilty ones are found.
    """
    fault = tried(names)
    if fault is None:
        return {}
    if len(names) == 1:
        return {names[0]: fault}
    middle = len(names) // 2
    found = bisected(tried, names[:middle]) | bisected(tried, names[middle:])
    left = [name for name in names if name not in found]
    if not left or tried(left) is None:
        return found
    # Each half is sound and both together are not: add one at a time and freeze those that do not get along.
    good: list[str] = []
    for name in left:
        fault = tried([*good, name])
        if fault is None:
            good.append(name)
        else:
            found[name] = fault
    return found


def halved(network: Network, names: list[str], seed: int = 0) -> Selection:
    """Returns a selection that removes a random half (at least one channel) of each named group."""
    rng = np.random.default_rng(seed)
    return {
        group.name: np.sort(rng.choice(group.size, size=max(1, group.size // 2), replace=False))
        for group in network.groups
        if group.name in names
    }


def check(network: Network, names: list[str]) -> str | None:
    """Halves the named groups on a copy; returns what is wrong, or None where all is well."""
    return faults(network, halved(network, names))


def faults(network: Network, selection: Selection) -> str | None:
    """Prunes a copy to `selection`; returns what is wrong, or None where all is well."""
    inputs = informative(network.example_inputs)
    pruned = cut(network, selection)
    try:
        with evaluating(pruned), torch.no_grad():
            output = pruned(*inputs)
    except Exception as error:  # whatever the model's own code raises on unexpected widths
        line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return f"the pruned network does not run: {type(error).__name__}: {line}"
    # A group that is gone as a whole has nothing left that its norm could shift.
    if not any(group.approximate and len(selection.get(group.name, ())) for group in network.groups):
        twin = masked_twin(network, selection)
        with evaluating(twin), torch.no_grad():
            expected = twin(*inputs)
        difference = relative_error(output, expected)
        if not difference <= TOLERANCE:
            return f"the pruned network differs from its masked twin (relative error {difference:.1e})"
    widths = {name: len(kept) for name, kept in selection.items()}
    counted, priced = count_macs(pruned, network.example_inputs), network.cost_model.cost("macs", widths)
    if counted != priced:
        return f"its MACs cannot be predicted (counted {counted:,}, predicted {priced:,})"
    return None


def informative(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns `inputs` with random numbers in place of constant ones: zeros would hide any fault of a network that has
    no biases.
    """
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(x.shape, generator=generator).to(x)
        if x.is_floating_point() and x.numel() and bool((x == x.flatten()[0]).all())
        else x
        for x in inputs
    )


def relative_error(output: object, expected: object) -> float:
    """Returns the largest absolute difference over all output tensors, relative to the largest expected value.

    Infinite where shapes differ, or where one of them is not finite and the other one is not the same.
    """
    pairs = list(zip(torch.utils._pytree.tree_leaves(output), torch.utils._pytree.tree_leaves(expected), strict=True))
    worst = 0.0
    for a, b in pairs:
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
            if a.shape != b.shape:
                return math.inf
            same = (a == b) | (a.isnan() & b.isnan())
            difference = float(torch.where(same, 0.0, (a - b).abs()).max())
            scale = float(torch.where(b.isfinite(), b.abs(), 0.0).max()) or 1.0
            worst = max(worst, difference / scale if math.isfinite(difference) else math.inf)
    return worst
