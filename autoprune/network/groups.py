"""Pruning groups: which channels must be removed together, where they lie in each parameter, and what they cost.

Decides how solved labels become groups, frozen layers, the index map that surgery uses, and the cost model. Knows
nothing of `torch.export` or of how a policy is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from autoprune.cost import CostModel, Form, Term
from autoprune.network.labels import Labels, Solution
from autoprune.network.tape import Layer, Product


@dataclass(frozen=True, slots=True)
class PruningGroup:
    """Channels of one kind that are removed one by one, each from all of its places at once.

    `producers` and `consumers` are module paths. `units` are the group's channels in the numbering of `IndexMap`.
    `stage` counts changes of spatial resolution from the input on. `approximate` says why removal also changes the
    channels that stay (a LayerNorm over them), or is None where a pruned network equals its masked twin.
    """

    name: str
    size: int
    offset: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    stage: str
    approximate: str | None = None

    @property
    def units(self) -> range:
        """The group's channels, in the numbering of the index map."""
        return range(self.offset, self.offset + self.size)


@dataclass(frozen=True, slots=True)
class Frozen:
    """A layer whose output channels all stay, and why."""

    name: str
    size: int
    reason: str


IndexMap = dict[str, dict[int, Labels]]
"""Parameter or buffer → dimension → unit of each index; -1 stays."""


@dataclass(frozen=True, slots=True)
class Links:
    """One use of a weight in units instead of labels: `inputs[i]` is the unit of input channel i (-1 stays)."""

    layer: Layer
    module: str
    inputs: Labels | None
    outputs: Labels


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """Memory of one tensor: bytes an element and its dimensions."""

    itemsize: int
    dims: tuple[Labels | int, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter or buffer of the model."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    trainable: bool
    dims: tuple[Labels | None, ...]


@dataclass(frozen=True, slots=True)
class Assembly:
    """What `assemble` finds."""

    groups: tuple[PruningGroup, ...]
    frozen: tuple[Frozen, ...]
    index_map: IndexMap
    links: tuple[Links, ...]
    cost_model: CostModel


@dataclass(frozen=True, slots=True)
class Record:
    """What one pass over the graph wrote down, in labels."""

    solution: Solution
    layers: tuple[Layer, ...]
    products: tuple[Product, ...]
    parameters: tuple[Parameter, ...]
    live: tuple[tuple[LiveTensor, ...], ...]
    batch: int


def module_of(parameter: str) -> str:
    """Returns the path of the module that owns a parameter."""
    return parameter.rpartition(".")[0] or parameter


def assemble(record: Record, broken: dict[str, str]) -> Assembly:
    """Turns solved labels into groups, frozen layers, index map and cost model.

    Channels with the same set of places form a group; it is named after its first producer. Groups named in `broken`
    (name → reason) are frozen.
    """
    component = record.solution.component
    producers = [layer for layer in record.layers if layer.kind not in ("norm", "depthwise")]
    signature = _signatures(record)
    movable = np.ones(record.solution.number, dtype=bool)
    movable[list(record.solution.frozen)] = False
    produced = np.zeros(record.solution.number, dtype=bool)
    for layer in producers:
        produced[component[layer.outputs]] = True
    # A channel that nothing consumes and nothing produces (a table, a mask) is no group.
    candidates = np.flatnonzero(movable & produced)
    buckets: dict[int, list[int]] = {}
    for c in candidates.tolist():
        buckets.setdefault(int(signature[c]), []).append(c)
    stages = stages_of(record.layers)
    unit = np.full(record.solution.number, -1, dtype=np.int64)
    groups: list[PruningGroup] = []
    reasons: dict[int, str] = {}
    offset = 0
    order = _first_producer(producers, component, buckets)
    names: dict[str, int] = {}
    for key, first in order:
        members = np.array(buckets[key], dtype=np.int64)
        base = module_of(first.weight)
        names[base] = names.get(base, 0) + 1
        name = base if names[base] == 1 else f"{base}:{names[base]}"
        if name in broken:
            reasons.update(dict.fromkeys(members.tolist(), broken[name]))
            continue
        if len(members) < 2:
            reasons.update(dict.fromkeys(members.tolist(), _alone(int((component[first.outputs] == members[0]).sum()))))
            continue
        unit[members] = np.arange(offset, offset + len(members))
        groups.append(_group(record, name, members, (offset, stages[first.weight])))
        offset += len(members)
    unit_of = unit[component]
    return Assembly(
        groups=tuple(groups),
        frozen=_frozen(record, producers, unit_of, reasons),
        index_map=_index_map(record.parameters, unit_of),
        links=tuple(
            Links(
                layer,
                module_of(layer.weight),
                None if layer.inputs is None else unit_of[layer.inputs],
                unit_of[layer.outputs],
            )
            for layer in record.layers
        ),
        cost_model=_cost_model(record, groups, unit_of),
    )


def _alone(channels: int) -> str:
    if channels < 2:
        return "it has a single removable channel"
    # A shuffle that is repeated with residual sums in between ties every channel to every other one.
    return f"{channels} of its channels are tied together and could only go all at once"


def _signatures(record: Record) -> Labels:
    """Returns a 64-bit sum for each component that is equal for components with the same set of places."""
    component = record.solution.component
    arrays: dict[tuple[object, ...], Labels] = {}
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
    salts = rng.integers(1, 2**62, size=len(arrays), dtype=np.int64)
    signature = np.zeros(record.solution.number, dtype=np.int64)
    with np.errstate(over="ignore"):
        for salt, labels in zip(salts, arrays.values(), strict=True):
            np.add.at(signature, component[labels], salt)
    return signature


def _first_producer(
    producers: Sequence[Layer], component: Labels, buckets: dict[int, list[int]]
) -> list[tuple[int, Layer]]:
    bucket_of: dict[int, int] = {c: key for key, members in buckets.items() for c in members}
    seen: dict[int, Layer] = {}
    for layer in producers:
        for c in component[layer.outputs].tolist():
            key = bucket_of.get(c)
            if key is not None and key not in seen:
                seen[key] = layer
    return list(seen.items())


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
            if math.prod(space) <= 1 and resolutions:
                # A squeeze (pooled to one pixel) belongs to the stage that it serves.
                stage = list(resolutions.values())[-1]
            else:
                stage = resolutions.setdefault(space, f"stage{len(resolutions) + 1}")
        stages.setdefault(layer.weight, stage)
    return stages


def _group(record: Record, name: str, members: Labels, place: tuple[int, str]) -> PruningGroup:
    component = record.solution.component
    inside = np.zeros(record.solution.number, dtype=bool)
    inside[members] = True
    made: list[str] = []
    used: list[str] = []
    for layer in record.layers:
        if layer.kind != "norm" and inside[component[layer.outputs]].any():
            made.append(module_of(layer.weight))
        if layer.inputs is not None and inside[component[layer.inputs]].any():
            used.append(module_of(layer.weight))
    approximate = next(
        (record.solution.approximate[c] for c in members.tolist() if c in record.solution.approximate), None
    )
    return PruningGroup(
        name=name,
        size=len(members),
        offset=place[0],
        producers=tuple(dict.fromkeys(made)),
        consumers=tuple(dict.fromkeys(used)),
        stage=place[1],
        approximate=approximate,
    )


def _frozen(record: Record, producers: Sequence[Layer], unit_of: Labels, reasons: dict[int, str]) -> tuple[Frozen, ...]:
    found: dict[str, Frozen] = {}
    for layer in producers:
        if (unit_of[layer.outputs] >= 0).any():
            continue
        components = record.solution.component[layer.outputs].tolist()
        texts = [record.solution.frozen.get(c) or reasons.get(c) for c in components]
        reason = next((text for text in texts if text), "its channels are not consumed by any layer")
        name = module_of(layer.weight)
        found.setdefault(name, Frozen(name, len(layer.outputs), reason))
    return tuple(found.values())


def _index_map(parameters: Iterable[Parameter], unit_of: Labels) -> IndexMap:
    index_map: IndexMap = {}
    for parameter in parameters:
        for k, labels in enumerate(parameter.dims):
            if labels is not None:
                units = unit_of[labels]
                if (units >= 0).any():
                    index_map.setdefault(parameter.name, {})[k] = units
    return index_map


# --- costs --------------------------------------------------------------------------------------------------------


def _cost_model(record: Record, groups: Sequence[PruningGroup], unit_of: Labels) -> CostModel:
    bounds = np.array([group.offset for group in groups], dtype=np.int64)
    sizes = np.array([group.size for group in groups], dtype=np.int64)
    cache: dict[bytes, Form] = {}

    def form(labels: Labels) -> Form:
        key = labels.tobytes()
        if key not in cache:
            units = unit_of[labels]
            kept = units[units >= 0]
            index = np.searchsorted(bounds, kept, side="right") - 1
            counts = np.bincount(index, minlength=len(groups)) if len(groups) else np.empty(0, np.int64)
            terms = tuple((int(g), int(counts[g] // sizes[g])) for g in np.flatnonzero(counts))
            cache[key] = Form(int((units < 0).sum()), terms)
        return cache[key]

    def term(factor: int, dims: Iterable[Labels | int | None], divide: int = 1) -> Term:
        forms: list[Form] = []
        for dim in dims:
            if dim is None:
                continue
            if isinstance(dim, int):
                factor *= dim
                continue
            one = form(dim)
            if one.terms:
                forms.append(one)
            else:
                factor *= one.const
        return Term(factor // divide if factor % divide == 0 else factor, tuple(forms))

    def elements(parameter: Parameter, factor: int) -> Term:
        return term(factor, [n if d is None else d for n, d in zip(parameter.shape, parameter.dims, strict=True)])

    live = [tuple(_merge(term(t.itemsize, t.dims, record.batch) for t in tensors)) for tensors in record.live]
    return CostModel(
        groups=tuple(group.name for group in groups),
        sizes=tuple(group.size for group in groups),
        macs=_merge(term(p.factor, p.dims, record.batch) for p in record.products),
        params=_merge(elements(p, 1) for p in record.parameters if p.trainable),
        size_bytes=_merge(elements(p, p.itemsize) for p in record.parameters),
        live=_largest(live),
    )


def _merge(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Adds up terms with the same forms."""
    sums: dict[tuple[Form, ...], int] = {}
    for term in terms:
        forms = tuple(sorted(term.forms, key=lambda f: (f.terms, f.const)))
        sums[forms] = sums.get(forms, 0) + term.factor
    return tuple(Term(factor, forms) for forms, factor in sums.items() if factor)


def _largest(points: Sequence[tuple[Term, ...]]) -> tuple[tuple[Term, ...], ...]:
    """Drops points of the graph whose sum can never be the largest: each of their terms is exceeded in another
    point.
    """
    kept: list[dict[tuple[Form, ...], int]] = []
    for terms in sorted({frozenset(p) for p in points}, key=lambda p: -sum(t.factor for t in p)):
        table = {t.forms: t.factor for t in terms}
        if not any(all(other.get(forms, 0) >= factor for forms, factor in table.items()) for other in kept):
            kept.append(table)
    return tuple(tuple(Term(factor, forms) for forms, factor in table.items()) for table in kept)
