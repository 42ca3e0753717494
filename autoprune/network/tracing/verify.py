"""Nothing is believed: every group is pruned on a copy, run, and compared with its masked twin.

Decides which groups are frozen because pruning them breaks or changes the network. All groups are tried together
first; only where that fails are they halved until the guilty ones are found.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.network.graph.modules import device_of, evaluating
from autoprune.network.graph.network import Network
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.narrowing import narrowed
from autoprune.network.surgery.selection import Selection
from autoprune.network.surgery.twin import TOLERANCE, informative, masked_twin, relative_error
from autoprune.network.tracing.counting import counting, macs_counted, macs_of_shapes, run_shapes, shapes_alone

BREAKS = "the pruned network does not run"
LARGE = 2 * 10**9
"""A network that spends more MACs on the batch that it was traced with is verified in fewer passes of fewer samples."""


Heal = Callable[[Network, "list[str]"], Network]
"""Returns a network of which copies run without some channels of the named groups, or as much of that as can be had."""


def verified(network: Network, heal: Heal | None = None) -> Network:
    """Returns the network with every group frozen that does not survive pruning, with the reason.

    Groups that must equal their masked twin are compared with it first; then all are tried, unless these are all. MACs
    are counted with all of them. Of a large network both is tried at once, and one after the other where that fails.
    Where copies do not run it is tried to `heal` that before the guilty groups are looked for.
    """
    shapes = Shapes(network)
    exact = [group.name for group in network.groups if not group.approximate]
    whole = [group.name for group in network.groups]
    if exact and exact != whole and _is_large(network) and _sound(network, shapes):
        return network
    reasons: dict[str, str] = {}
    for names in (exact, whole):
        if names is whole and exact == whole and not reasons:
            break  # these very groups were tried together and are sound
        left = {group.name for group in network.groups}
        tried = [name for name in names if name in left]
        uncounted = tried if names is exact and exact != whole else None
        fault = _checked(network, shapes, uncounted)(tried) if tried else None
        if fault is not None and fault.startswith(BREAKS) and heal is not None:
            healed = heal(network, tried)
            if healed is not network:
                network, shapes = healed, Shapes(healed)
        reasons = {} if fault is None else bisected(_checked(network, shapes, uncounted), tried)
        if reasons:
            network, shapes = network.freeze(reasons), shapes.freeze(reasons)
    return network


def verified_in_training(network: Network) -> Network:
    """Returns the network with every group frozen that a forward pass in training does not survive.

    For networks with layers that run in training alone: one that takes no such pass with these inputs is left as it is.
    """
    if _fault_in_training(network, []) is not None:
        return network
    reasons = bisected(lambda names: _fault_in_training(network, names), [group.name for group in network.groups])
    return network.freeze(reasons) if reasons else network


def _fault_in_training(network: Network, names: list[str]) -> str | None:
    try:
        model = cut(network, halved(network, names)).train()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model(*network.example_inputs)
    except Exception as error:  # whatever the model's own code raises
        return f"{BREAKS} in training{_broken(error).removeprefix(BREAKS)}"
    return None


def _is_large(network: Network) -> bool:
    return network.cost_model.dense()["macs"] * network.record.batch > LARGE


def _sound(network: Network, shapes: Shapes) -> bool:
    """Whether all groups can be halved, and those that must equal their masked twin do so on a copy without the others'
    channels: there it is smaller, and what normalises over channels normalises over the same ones. That they can be
    halved alone is tried by shapes.
    """
    selection = halved(network, [group.name for group in network.groups])
    exact = {group.name: selection[group.name] for group in network.groups if not group.approximate}
    others = {name: kept for name, kept in selection.items() if name not in exact}
    try:
        shapes.run(exact)
        counted = shapes.count(selection)
        smaller = narrowed(network, others, cut(network, others))
    except Exception:  # `faults` says which group it is
        return False
    return not (_miscounted(network, selection, counted) or _fault(smaller, exact, _batches(network), own=True))


class Shapes:
    """A network without numbers: cut copies of it run on fake tensors, where what does not fit fails in no time.

    Where the dense network itself does not run so, because its code looks at numbers, it tells nothing.
    """

    def __init__(self, network: Network) -> None:
        self._given, self._device = network, device_of(network.model)

    @cached_property
    def _network(self) -> Network:
        return replace(self._given, model=shapes_alone(self._given.model))

    def run(self, selection: Selection) -> None:
        """Runs a copy that is cut to `selection`; it raises what the forward pass raises."""
        run_shapes(cut(self._network, selection), self._network.example_inputs, self._device)

    def count(self, selection: Selection) -> int:
        """Returns the MACs of one sample in a copy that is cut to `selection`; it raises what the pass raises."""
        return macs_of_shapes(cut(self._network, selection), self._network.example_inputs, self._device)

    def cut(self, network: Network, selection: Selection) -> nn.Module:
        """Returns a copy without numbers that is cut to `selection` of another network over the same model."""
        return cut(replace(network, model=self._network.model), selection)

    def run_cut(self, model: nn.Module) -> None:
        """Runs what `cut` returned, once; it raises what the forward pass raises."""
        run_shapes(model, self._network.example_inputs, self._device)

    @cached_property
    def tell(self) -> bool:
        """Whether the dense network runs without numbers, so that a cut copy which does not is broken."""
        try:
            self.run({})
        except Exception:  # whatever its code raises on tensors without numbers
            return False
        return True

    def freeze(self, reasons: dict[str, str]) -> Shapes:
        """Returns the same with the groups in `reasons` frozen."""
        frozen = copy.copy(self)
        frozen._given = self._given.freeze(reasons)
        if "_network" in vars(self):
            vars(frozen)["_network"] = self._network.freeze(reasons)
        return frozen


def _checked(network: Network, shapes: Shapes, uncounted: list[str] | None) -> Callable[[list[str]], str | None]:
    return lambda names: check(network, names, None if names == uncounted else shapes)


def bisected(tried: Callable[[list[str]], str | None], names: list[str]) -> dict[str, str]:
    """Returns the names that cannot be `tried` together with the others, with what is then wrong.

    All are tried together first; only where that fails they are divided until the guilty ones are found.
    """
    fault = tried(names) if names else None
    if fault is None:
        return {}
    if len(names) == 1:
        return {names[0]: fault}
    found: dict[str, str] = {}
    for part in _parts(names):
        found |= bisected(tried, part)
    left = [name for name in names if name not in found]
    if not left or tried(left) is None:
        return found
    # Each part is sound and all together are not: add one at a time and freeze those that do not get along.
    good: list[str] = []
    for name in left:
        fault = tried([*good, name])
        if fault is None:
            good.append(name)
        else:
            found[name] = fault
    return found


def _parts(names: list[str]) -> list[list[str]]:
    """Divides groups by kind where there are several (names that differ in numbers alone), else into halves.

    What breaks the heads of one layer breaks them in every layer, and leaves the hidden widths alone.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    if len(kinds) > 1:
        return list(kinds.values())
    return [names[: len(names) // 2], names[len(names) // 2 :]]


def halved(network: Network, names: list[str], seed: int = 0) -> Selection:
    """Returns a selection that removes about half (at least one channel) of each named group, at random.

    No two groups lose the same fraction: a width that the code takes for another one must not happen to be right.
    """
    rng = np.random.default_rng(seed)
    chosen = [group for group in network.groups if group.name in names]
    fractions = np.linspace(0.35, 0.65, len(chosen)) if len(chosen) != 1 else np.array([0.5])
    widths = {
        group.name: min(max(1, round(group.size * float(fraction))), group.size - 1)
        for group, fraction in zip(chosen, rng.permutation(fractions), strict=True)
    }
    return {group.name: np.sort(rng.choice(group.size, size=widths[group.name], replace=False)) for group in chosen}


def check(network: Network, names: list[str], shapes: Shapes | None) -> str | None:
    """Halves the named groups on a copy; returns what is wrong, or None where all is well. See `faults`."""
    return faults(network, halved(network, names), shapes)


def faults(network: Network, selection: Selection, shapes: Shapes | None) -> str | None:
    """Prunes a copy to `selection`; returns what is wrong, or None where all is well.

    `shapes` is `Shapes` of the network; None: MACs are not counted.
    """
    if shapes is None or not _is_large(network):  # a small one runs for real in less time than on fake tensors
        return _fault(network, selection, _batches(network), counted=shapes is not None)
    try:
        counted = shapes.count(selection)
    except Exception as error:
        if shapes.tell:
            return _broken(error)
        return _fault(network, selection, _batches(network), counted=True)
    fault = _fault(network, selection, _batches(network))
    return fault if fault is not None else _miscounted(network, selection, counted)


def _batches(network: Network) -> list[tuple[Tensor, ...]]:
    """Returns the inputs to run a network on, each where the ones before did not do: code may need the whole batch."""
    inputs = network.example_inputs
    first = tuple(x[:1] if x.ndim and len(x) == len(inputs[0]) else x for x in inputs)
    return [informative(batch) for batch in ((first, inputs) if _is_large(network) else (inputs,))]


def _fault(
    network: Network,
    selection: Selection,
    batches: Sequence[tuple[Tensor, ...]],
    *,
    own: bool = False,
    counted: bool = False,
) -> str | None:
    """Runs a copy that is pruned to `selection`, and its masked twin where it must equal one; returns what is wrong
    with each of the batches, or None where one shows nothing. With `own` the network's model becomes the twin, with
    `counted` MACs are counted while the copy runs.
    """
    # A group that is gone as a whole has nothing left that its norm could shift.
    exact = not any(group.approximate and len(selection.get(group.name, ())) for group in network.groups)
    twin: nn.Module | None = None
    fault: str | None = None
    try:
        pruned = cut(network, selection)
    except Exception as error:  # whatever the model's own code raises on unexpected widths
        return _broken(error)
    for batch in batches:
        try:
            with counting() if counted else nullcontext() as counter:
                output = _run(pruned, batch)
        except Exception as error:
            fault = _broken(error)
            continue
        if counter is not None and (fault := _miscounted(network, selection, macs_counted(counter, batch))):
            return fault
        if not exact:
            return None
        if twin is None:
            twin = masked_twin(network, selection, own=own)
        difference = relative_error(output, _run(twin, batch))
        if difference <= TOLERANCE:
            return None
        fault = f"the pruned network differs from its masked twin (relative error {difference:.1e})"
    return fault


def _miscounted(network: Network, selection: Selection, counted: int) -> str | None:
    priced = network.cost_model.cost("macs", {name: len(kept) for name, kept in selection.items()})
    return None if counted == priced else f"its MACs cannot be predicted (counted {counted:,}, predicted {priced:,})"


def _run(model: nn.Module, inputs: Sequence[Tensor]) -> object:
    with evaluating(model), torch.no_grad():
        return model(*inputs)


def _broken(error: Exception) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{BREAKS}: {_told(type(error).__name__, line)}"


def _told(kind: str, line: str) -> str:
    """Returns what a person understands of an error that a forward pass raised."""
    sizes = ("is invalid for input of size", "split_sizes to sum exactly", "not enough values to unpack")
    if any(part in line for part in sizes):
        return f"its code has a width that does not follow ({kind}: {line})"
    return f"{kind}: {line}" if line else kind
