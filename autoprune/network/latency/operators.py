"""The operators of a traced network as calls that can be made alone, at the shapes that any widths give them.

Decides which nodes of the graph take time, which of their dimensions follow the widths of which groups, and how their
other arguments follow. Knows nothing of clocks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from autoprune.cost import Form
from autoprune.errors import InputError
from autoprune.network.graph.labels import Labels, Value
from autoprune.network.graph.modules import device_of, evaluating
from autoprune.network.graph.network import Network
from autoprune.network.graph.rules.table import OPERATORS, Operator, Sizing, operator_name, operator_of
from autoprune.network.latency.timing import Conditions, batch_of
from autoprune.network.tracing.program import export_program, training_program
from autoprune.network.tracing.walk import walk

_RECURRENT = frozenset(["lstm", "gru", "rnn_tanh", "rnn_relu"])


@dataclass(frozen=True, slots=True)
class Extent:
    """One dimension of a tensor: `factor` times the sizes on some axes of its call (heads and their dimensions)."""

    factor: int
    axes: tuple[int, ...] = ()

    def at(self, sizes: Sequence[int]) -> int:
        """Returns the dimension at the sizes of the axes."""
        return self.factor * math.prod(sizes[axis] for axis in self.axes)


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor that a call reads. `order` are its dimensions from the slowest to the fastest in memory."""

    extents: tuple[Extent, ...]
    dtype: torch.dtype
    order: tuple[int, ...]

    def make(self, sizes: Sequence[int], conditions: Conditions) -> Tensor:
        """Returns a tensor of this kind: ones where it holds real numbers, else zeros, which index anything."""
        dtype = conditions.torch_dtype if self.dtype.is_floating_point else self.dtype
        shape = [extent.at(sizes) for extent in self.extents]
        plain = torch.full(
            [shape[dim] for dim in self.order],
            1.0 if dtype.is_floating_point else 0,
            dtype=dtype,
            device=conditions.device,
        )
        return plain.permute([self.order.index(dim) for dim in range(len(shape))])


@dataclass(frozen=True, slots=True)
class Kind:
    """What two calls must have in common to take the same time.

    `leaves` are the flattened arguments, in which an `Operand` stands for each tensor; `structure` puts them together
    again. `sizes` are the dense sizes of the axes, `least` those with one channel left in every group.
    """

    target: str
    leaves: tuple[Any, ...]
    structure: str
    sizes: tuple[int, ...]
    least: tuple[int, ...]

    @property
    def name(self) -> str:
        """The operator's short name, such as `conv2d`."""
        return self.target.split(".")[1]


@dataclass(frozen=True)
class Call:
    """A node of the graph: what it computes, and the linear form over the groups' widths behind each of its axes."""

    kind: Kind
    forms: tuple[Form, ...]
    where: str
    overload: Any
    spec: Any

    def prepare(self, sizes: Sequence[int], conditions: Conditions) -> Callable[[], Any]:
        """Returns the call at other sizes of the axes, its tensors made and its other arguments following them."""
        leaves = [leaf.make(sizes, conditions) if isinstance(leaf, Operand) else leaf for leaf in self.kind.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        args = _follow(self.kind.name, list(args))
        overload = self.overload
        return lambda: overload(*args, **kwargs)


def record_calls(network: Network, conditions: Conditions) -> list[Call]:
    """Returns every call in the network that takes time, in the order of the graph, for the batch of `conditions`.

    Views and what only makes constants are left out.

    Raises:
        InputError: The graph at that batch is another one than the one that was traced.
    """
    model, inputs = network.model, network.example_inputs
    device = device_of(model)
    env: dict[torch.fx.Node, Any] = {}
    with evaluating(model):
        traced = export_program(model, tuple(x.to(device) for x in inputs))
        training = training_program(model, inputs, traced)
        record, _ = walk(traced, model, inputs[0].shape[0], env, training=training)
        wanted = batch_of(inputs, Conditions(conditions.batch, "float32", 1, str(device)))
        wanted = tuple(x.to(old.dtype) for x, old in zip(wanted, inputs, strict=True))
        other = export_program(model, wanted)
    pairs = list(zip(traced.graph.nodes, other.graph.nodes, strict=False))
    same = len(traced.graph.nodes) == len(other.graph.nodes) and all(a.target == b.target for a, b in pairs)
    if not same or not np.array_equal(record.solution.component, network.record.solution.component):
        raise InputError(
            f"{type(model).__name__} computes something else with a batch of {conditions.batch} than with"
            f" {inputs[0].shape[0]}, so its latency cannot be predicted; set latency.batch to another number"
        )
    formed = Forms(network)
    calls = []
    for node, twin in pairs:
        if _takes_time(node):
            call = _call(node, twin, env, formed)
            if call is not None:
                calls.append(call)
    return calls


class Forms:
    """Turns labels into linear forms over the widths of a network's groups, whose product is how many are kept.

    The width of an attention is its heads times their dimension: two forms. Where the heads are not the same ones for
    every index, the heads alone stand for it; what is missing then is seen in the error that a table tells of itself.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        heads = [group for group in network.groups if group.name.endswith(":heads")]
        self._heads = np.array([unit for group in heads for unit in group.units], dtype=np.int64)
        self._bounds = np.array([group.offset for group in network.groups], dtype=np.int64)
        self.sizes = tuple(group.size for group in network.groups)
        self._known: dict[bytes, tuple[Form, ...]] = {}

    def of(self, labels: Labels) -> tuple[Form, ...]:
        """Returns the forms whose product is the number of kept channels among `labels`."""
        key = labels.tobytes()
        if key not in self._known:
            units = self._network.units_of(labels)
            self._known[key] = (self._linear(units),) if units.ndim == 1 else self._product(units)
        return self._known[key]

    def _linear(self, units: Labels) -> Form:
        index = self._members(units[units >= 0])
        counts = np.bincount(index, minlength=len(self.sizes))
        terms = tuple((int(g), int(counts[g] // self.sizes[g])) for g in np.flatnonzero(counts))
        return Form(int((units < 0).sum()), tuple((g, n) for g, n in terms if n))

    def _product(self, units: Labels) -> tuple[Form, ...]:
        """Returns the forms of indices `(n, k)` that belong to a head and to a dimension of heads."""
        is_head = np.isin(units, self._heads)
        first = units[np.arange(len(units)), is_head.argmax(axis=1)]
        heads = np.unique(self._members(first[first >= 0]))
        if units.shape[1] == 2 and is_head.sum(axis=1).min() == 1 == is_head.sum(axis=1).max() and len(heads) == 1:
            size = self.sizes[heads[0]]
            inner = self._linear(units[~is_head])  # every dimension once for each head
            if inner.const % size == 0 and all(n % size == 0 for _, n in inner.terms):
                per_head = Form(inner.const // size, tuple((g, n // size) for g, n in inner.terms))
                return Form(0, ((int(heads[0]), 1),)), per_head
        return (self._linear(first),)

    def _members(self, units: Labels) -> Labels:
        found: Labels = np.searchsorted(self._bounds, units, side="right") - 1
        return found

    def dense(self, form: Form) -> int:
        """Returns the form's value where every channel is kept."""
        return form.const + sum(n * self.sizes[g] for g, n in form.terms)


def _takes_time(node: torch.fx.Node) -> bool:
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    name = operator_name(node.target)
    inside = name.startswith(("_", "sym_"))
    return isinstance(node.target, torch._ops.OpOverload) and not operator_of(node.target).alias and not inside


def _call(node: torch.fx.Node, twin: torch.fx.Node, env: dict[torch.fx.Node, Any], forms: Forms) -> Call | None:
    """Returns a node as a call: labels come from the traced node, sizes from its `twin` at the wanted batch."""
    leaves, spec = tree_flatten((node.args, node.kwargs), is_leaf=lambda x: isinstance(x, torch.fx.Node))
    twins, _ = tree_flatten((twin.args, twin.kwargs), is_leaf=lambda x: isinstance(x, torch.fx.Node))
    axes: list[Form] = []
    found: list[Any] = []
    for leaf, other in zip(leaves, twins, strict=True):
        if not isinstance(leaf, torch.fx.Node):
            found.append(other)
            continue
        example = other.meta.get("val")
        if not isinstance(example, Tensor):
            return None  # a constant that the graph holds, or a size: nothing that can be made here
        value = env.get(leaf)
        dims = value.dims if isinstance(value, Value) else (None,) * example.ndim
        found.append(_operand(example, dims, forms, axes))
    if not any(isinstance(leaf, Operand) for leaf in found):
        return None
    kind = Kind(
        target=str(node.target),
        leaves=tuple(tuple(x) if isinstance(x, list) else x for x in found),
        structure=str(spec),
        sizes=tuple(forms.dense(form) for form in axes),
        least=tuple(form.const + sum(n for _, n in form.terms) for form in axes),
    )
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    where = str(stack[-1][0]) if stack else node.name
    return Call(kind, tuple(axes), where, node.target, spec)


def _operand(example: Tensor, dims: Sequence[Labels | None], forms: Forms, axes: list[Form]) -> Operand:
    extents = []
    for size, labels in zip(example.shape, dims, strict=True):
        parts = () if labels is None else forms.of(labels)
        if not any(form.terms for form in parts) or math.prod(map(forms.dense, parts)) != size:
            extents.append(Extent(int(size)))
            continue
        factor, places = 1, []
        for form in parts:
            common = math.gcd(form.const, *(n for _, n in form.terms))
            factor *= common
            axis = Form(form.const // common, tuple((g, n // common) for g, n in form.terms))
            if not axis.terms:
                continue  # as many of each head, whatever is pruned
            if axis not in axes:
                axes.append(axis)
            places.append(axes.index(axis))
        extents.append(Extent(factor, tuple(places)))
    strides = example.stride()
    order = tuple(sorted(range(example.ndim), key=lambda dim: (-strides[dim], dim)))
    return Operand(tuple(extents), example.dtype, order)


def _follow(name: str, args: list[Any]) -> list[Any]:
    """Returns arguments in which numbers that repeat a width say what the tensors say."""
    known = OPERATORS.get(name, Operator())
    if name.startswith("conv_transpose") and len(args) > 6:
        if args[6] > 1 and args[1].shape[1] == 1:  # depthwise
            args[6] = args[0].shape[1]
    elif name.startswith("conv") and len(args) > 6:
        args[6] = args[0].shape[1] // args[1].shape[1]
    elif known.sizing is Sizing.LAST:
        count = len(args[1])
        args[1] = list(args[0].shape[-count:])
    elif known.sizing is Sizing.CHANNELS and known.sizes is not None:
        args[1] = min(args[1], args[0].shape[1])  # fewer channels than groups: each was a group
    elif name in _RECURRENT:
        # The first states are made by the module, out of nothing but its own attributes.
        recurrent = args[2][1]  # (gates * hidden, states)
        widths = (recurrent.shape[1], recurrent.shape[0] // 4)
        states = list(args[1]) if name == "lstm" else [args[1]]
        made = [s.new_zeros(*s.shape[:-1], width) for s, width in zip(states, widths, strict=False)]
        args[1] = made if name == "lstm" else made[0]
    return args
