"""From solved labels to pruning groups, frozen layers, the index map that surgery uses, and the cost model.

Decides which channels form a group and what it is called. Knows nothing of `torch.export` or of how a policy is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from autoprune.network.graph.costs import cost_model
from autoprune.network.graph.groups import (
    Assembly,
    Frozen,
    IndexMap,
    Links,
    PruningGroup,
    module_named,
    module_of,
    units_of,
)
from autoprune.network.graph.labels import Labels, Solution
from autoprune.network.graph.record import TAKEN_APART, Layer, Parameter, Record


def assemble(record: Record, broken: dict[str, str]) -> Assembly:
    """Turns solved labels into groups, frozen layers, index map and cost model.

    Channels with the same set of places form a group; it is named after its first producer. Groups named in `broken`
    (name → reason) are frozen.
    """
    solution = record.solution
    producers = [layer for layer in record.layers if layer.kind not in ("norm", "depthwise")]
    unit = np.full(solution.number, -1, dtype=np.int64)  # (components,): the unit of each, -1 where it stays
    groups: list[PruningGroup] = []
    reasons: dict[int, str] = {}
    frozen: list[Frozen] = []
    stages = stages_of(record.layers)
    offset = 0
    buckets = _buckets(record, producers)
    for (name, first, members), users in zip(buckets, _users(record, [b[2] for b in buckets]), strict=True):
        reason = broken.get(name)
        if reason is None and len(members) < 2:
            # factors (outputs, k): how many outputs hold the one component that there is
            reason = _alone(int((solution.factors_of(first.outputs) == members[0]).any(axis=1).sum()))
        if reason is not None:
            reasons.update(dict.fromkeys(members.tolist(), reason))
            if ":" in name:
                frozen.append(Frozen(name, len(members), reason))
            continue
        unit[members] = np.arange(offset, offset + len(members))
        groups.append(_group(record, name, members, (offset, stages[first.weight]), users))
        offset += len(members)

    known_units: dict[int, Labels] = {}  # the record holds the labels, so that none is made with the id of another

    def units(labels: Labels) -> Labels:
        if id(labels) not in known_units:
            known_units[id(labels)] = units_of(solution, unit, labels)
        return known_units[id(labels)]

    whole = _frozen(record, producers, units, reasons)
    whole += tuple(Frozen(*entry) for entry in record.computed if entry[0] not in {found.name for found in whole})
    known = {entry.name for entry in whole}
    return Assembly(
        groups=tuple(groups),
        # A part of a layer (its heads, the dimensions of its heads) is told apart where the rest of it is free.
        frozen=(*whole, *(f for f in (*frozen, *_fixed_parts(record, producers)) if module_named(f.name) not in known)),
        index_map=_index_map(record.parameters, units),
        links=tuple(
            Links(
                layer,
                module_of(layer.weight),
                None if layer.inputs is None else units(layer.inputs),
                units(layer.outputs),
            )
            for layer in record.layers
        ),
        cost_model=cost_model(record, groups, units),
        unit=unit,
    )


def _buckets(record: Record, producers: Sequence[Layer]) -> list[tuple[str, Layer, Labels]]:
    """Returns name, first producer and components of every set of channels that lie in the same places."""
    solution = record.solution
    movable = np.ones(solution.number, dtype=bool)
    movable[list(solution.frozen)] = False
    produced = np.zeros(solution.number, dtype=bool)
    for layer in producers:
        factors = solution.factors_of(layer.outputs)  # (outputs, k), -1 fills up
        produced[factors[factors >= 0]] = True
    # A channel that nothing consumes and nothing produces (a table, a mask) is no group.
    members = np.flatnonzero(movable & produced)
    # (buckets,) different signatures, and (members,) the bucket of each member
    signatures, own = np.unique(_signatures(record)[members], return_inverse=True)
    bucket = np.full(solution.number, -1)  # (components,)
    bucket[members] = own
    # Members in the order of their buckets, cut where the running count of a bucket ends; ascending within each.
    buckets = np.split(members[np.argsort(own, kind="stable")], np.cumsum(np.bincount(own, minlength=1))[:-1])
    found: list[tuple[str, Layer, Labels]] = []
    names: dict[str, int] = {}
    for key, (first, slot) in _first_producer(producers, solution, bucket, len(signatures)).items():
        base = module_of(first.weight) + ("" if slot is None else (":heads", ":dims")[min(slot, 1)])
        names[base] = names.get(base, 0) + 1
        name = base if names[base] == 1 else f"{base}:{names[base]}"
        found.append((name, first, buckets[key]))
    return found


def _alone(channels: int) -> str:
    if channels < 2:
        return "it has a single removable channel"
    # A shuffle that is repeated with residual sums in between ties every channel to every other one.
    return f"{channels} of its channels are tied together and could only go all at once"


def _signatures(record: Record) -> Labels:
    """Returns a 64-bit sum for each component, `(components,)`, equal for components with the same set of places.

    A place is a dimension of a parameter, of a product or of a live tensor. Each place has a random number, and a
    component's signature is the sum of those of its places, once for every index there.
    """
    arrays: dict[tuple[object, ...], Labels] = {}  # place → (n,) labels of its indices
    for parameter in record.parameters:
        for k, labels in enumerate(parameter.dims):
            if labels is not None:
                arrays[parameter.name, k] = labels
    for i, product in enumerate(record.products):
        for k, dim in enumerate(product.dims):
            if not isinstance(dim, int):
                arrays["product", i, k] = dim
    for tensors in record.live:
        for tensor in tensors:
            for dim in tensor.dims:
                if not isinstance(dim, int):
                    arrays["live", dim.tobytes()] = dim
    rng = np.random.default_rng(20260101)
    # (places, k): the outer and the inner factor of a product are different places.
    salts = rng.integers(1, 2**62, size=(len(arrays), record.solution.factors.shape[1]), dtype=np.int64)
    signature = np.zeros(record.solution.number, dtype=np.int64)
    with np.errstate(over="ignore"):  # sums modulo 2**64 tell sets apart as well
        for row, labels in zip(salts, arrays.values(), strict=True):
            # (n, k) factors, transposed: `column` is (n,), the k-th factor of every index, -1 where there is none
            for salt, column in zip(row, record.solution.factors_of(labels).T, strict=True):
                # `add.at` counts a component as often as it occurs; `signature[column] += salt` would count it once
                np.add.at(signature, column[column >= 0], salt)
    return signature


def _first_producer(
    producers: Sequence[Layer], solution: Solution, bucket: Labels, number: int
) -> dict[int, tuple[Layer, int | None]]:
    """Returns the first layer that makes each bucket, and which factor of its outputs the bucket is (None: all).

    `bucket` is `(components,)`: which of the `number` buckets each is in, -1 for none. Outputs come in their order, and
    the factors of an output in theirs: that decides which bucket is found first.
    """
    # Both have one entry more than there are components or buckets: index -1, for a factor that is not there, hits it.
    free = np.ones(solution.number + 1, dtype=bool)
    free[[-1, *solution.frozen]] = False
    unseen = np.ones(number + 1, dtype=bool)
    unseen[-1] = False
    seen: dict[int, tuple[Layer, int | None]] = {}
    for layer in producers:
        factors = solution.factors_of(layer.outputs)  # (outputs, k)
        movable = free[factors]  # (outputs, k)
        keys = np.where(movable, bucket[factors], -1).ravel()  # (outputs * k,): output by output, factor by factor
        places = np.flatnonzero(unseen[keys])  # positions in `keys` of buckets that no layer before has made
        new, at = np.unique(keys[places], return_index=True)  # each such bucket, and where in `places` it comes first
        # Of an output's movable factors the first is slot 0, the next slot 1: [stays, a, b] → [-1, 0, 1].
        slots = (movable.cumsum(axis=1) - 1).ravel()  # (outputs * k,)
        several = np.repeat(movable.sum(axis=1) > 1, factors.shape[1])  # (outputs,) → (outputs * k,)
        for k in np.argsort(at):  # `unique` sorts by bucket: back to the order of the outputs
            place = places[at[k]]
            seen[int(new[k])] = (layer, int(slots[place]) if several[place] else None)
        unseen[new] = False
    return seen


def stages_of(layers: Iterable[Layer]) -> dict[str, str]:
    """Returns weight → stage.

    Spatial resolutions are numbered in the order in which layers reach them; layers without space are the `head`.
    """
    stages: dict[str, str] = {}
    resolutions: dict[tuple[int, ...], str] = {}
    for layer in layers:
        if layer.kind == "recurrent":
            stage = "recurrent"
        elif layer.kind == "linear" and len(layer.out_shape) <= 2:
            stage = "head"
        else:
            space = layer.out_shape[2:] if layer.kind != "linear" else layer.out_shape[1:-1]
            # convolutions make (B, C, *space), linear layers (B, *space, C)
            if math.prod(space) <= 1 and resolutions:
                # A squeeze (pooled to one pixel) belongs to the stage that it serves.
                stage = list(resolutions.values())[-1]
            else:
                stage = resolutions.setdefault(space, f"stage{len(resolutions) + 1}")
        stages.setdefault(layer.weight, stage)
    return stages


_Users = tuple[list[str], list[str]]
"""Modules that make a set of channels, and modules that use it, in the order of the graph."""


def _group(record: Record, name: str, members: Labels, place: tuple[int, str], users: _Users) -> PruningGroup:
    approximate = record.solution.approximate
    makers, readers = users
    return PruningGroup(
        name=name,
        size=len(members),
        offset=place[0],
        producers=tuple(dict.fromkeys(makers)),
        consumers=tuple(dict.fromkeys(readers)),
        stage=place[1],
        approximate=next((approximate[c] for c in members.tolist() if c in approximate), None),
    )


def _users(record: Record, buckets: Sequence[Labels]) -> list[_Users]:
    """Returns which modules make and use each set of components."""
    bucket = np.full(record.solution.number + 1, -1)  # (components + 1,): the last is for a factor that is not there
    for k, members in enumerate(buckets):
        bucket[members] = k
    found: list[_Users] = [([], []) for _ in buckets]

    def touched(labels: Labels) -> list[int]:
        hit = np.zeros(len(buckets) + 1, dtype=bool)  # the last is for components of no bucket (-1)
        # labels (n,) → factors (n, k) → buckets (n, k)
        hit[bucket[record.solution.factors_of(labels)]] = True
        return np.flatnonzero(hit[:-1]).tolist()

    for layer in record.layers:
        module = module_of(layer.weight)
        if layer.kind != "norm":
            for k in touched(layer.outputs):
                found[k][0].append(module)
        if layer.inputs is not None:
            for k in touched(layer.inputs):
                found[k][1].append(module)
    return found


_Units = Callable[[Labels], Labels]


def _frozen(record: Record, producers: Sequence[Layer], units: _Units, reasons: dict[int, str]) -> tuple[Frozen, ...]:
    found: dict[str, Frozen] = {}
    for layer in producers:
        if (units(layer.outputs) >= 0).any():
            continue
        factors = record.solution.factors_of(layer.outputs).ravel().tolist()
        whole = record.solution.component[layer.outputs].tolist()
        texts = [record.solution.frozen.get(c) or reasons.get(c) for c in (*whole, *factors)]
        told = sorted((text for text in texts if text), key=lambda text: text.startswith(TAKEN_APART))
        reason = told[0] if told else "its channels are not consumed by any layer"
        name = module_of(layer.weight)
        found.setdefault(name, Frozen(name, len(layer.outputs), reason))
    return tuple(found.values())


def _fixed_parts(record: Record, producers: Sequence[Layer]) -> list[Frozen]:
    """Returns the factors (heads, dimensions of heads) of the layers' outputs that stay, with the reason."""
    found: dict[str, Frozen] = {}
    reasons = record.solution.frozen
    for layer in producers:
        factors = record.solution.factors_of(layer.outputs)
        if layer.outputs.size == 0 or factors.shape[1] < 2 or (factors[:, 1] < 0).any():
            continue
        # factors (outputs, k): column 0 holds the outer factor (the heads), column 1 the inner one (their dimensions)
        slots = [np.unique(column[column >= 0]) for column in factors.T]
        for place, part in enumerate(s for s in slots if len(s) and len(s) <= len(layer.outputs) // 2):
            if all(c in reasons and not reasons[c].startswith(TAKEN_APART) for c in part.tolist()):
                name = f"{module_of(layer.weight)}:{'heads' if place == 0 else 'dims'}"
                found.setdefault(name, Frozen(name, len(part), reasons[int(part[0])]))
    return list(found.values())


def _index_map(parameters: Iterable[Parameter], units: _Units) -> IndexMap:
    index_map: IndexMap = {}
    for parameter in parameters:
        for k, labels in enumerate(parameter.dims):
            if labels is not None:
                found = units(labels)
                if (found >= 0).any():
                    index_map.setdefault(parameter.name, {})[k] = found
    return index_map
