"""Traces a model once: `torch.export`, one pass of label rules over the graph, groups, index map and exact cost model.

Decides how a module becomes a `Network`. Everything after that is arithmetic on it: the traced result is a plain value.
"""

from __future__ import annotations

import io
import operator
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.cost import CostModel, Surface
from autoprune.errors import TraceError, nearest
from autoprune.network.attention import prunable
from autoprune.network.groups import (
    Assembly,
    Frozen,
    IndexMap,
    Links,
    LiveTensor,
    Parameter,
    PruningGroup,
    Record,
    assemble,
    units_of,
)
from autoprune.network.labels import Labels, Value
from autoprune.network.literals import Attribute, following, inferred_axis, width_attributes, written_sizes
from autoprune.network.queries import query_rows
from autoprune.network.rules import RULES, operator_name
from autoprune.network.tape import Product, Tape
from autoprune.policy import CHANNEL

ALIASES = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "permute",
        "transpose",
        "t",
        "slice",
        "select",
        "expand",
        "chunk",
        "split",
        "split_with_sizes",
        "dropout",
        "alias",
        "detach",
        "contiguous",
        "to",
    ]
)


_COMPUTED = 40
"""A convolution's weight that is computed by more operators than this is taken for an activation."""


@dataclass(frozen=True)
class Network:
    """A model that was traced: its pruning groups, what is frozen and why, and its exact cost model.

    `model` is the dense model itself, or a copy of it in which attention modules that cannot lose heads are replaced
    by equivalent ones; it is never changed. `example_inputs` keep the shapes that it was traced with;
    the first dimension of the first one is the batch, and costs are for one sample.
    """

    model: nn.Module
    example_inputs: tuple[Tensor, ...]
    record: Record
    assembly: Assembly
    broken: dict[str, str]
    notes: tuple[str, ...] = ()
    removable: frozenset[str] = frozenset()
    """Groups that may lose all of their channels, as `blocks.with_removable` found them."""
    pruning: str = CHANNEL
    """What a group is: `channel`, or a weight whose elements are masked (`unstructured`, `2:4`)."""

    @property
    def masked(self) -> bool:
        """Whether single weights are masked, instead of channels removed."""
        return self.pruning != CHANNEL

    @property
    def groups(self) -> tuple[PruningGroup, ...]:
        """The groups that may be pruned, in the order of the graph."""
        return self.assembly.groups

    @property
    def frozen(self) -> tuple[Frozen, ...]:
        """Layers whose output channels all stay, with the reason."""
        return self.assembly.frozen

    @property
    def cost_model(self) -> CostModel:
        """Prices any widths: MACs, parameters, bytes, activation memory."""
        return self.assembly.cost_model

    @property
    def index_map(self) -> IndexMap:
        """Which index of which dimension of which parameter belongs to which channel."""
        return self.assembly.index_map

    @property
    def links(self) -> tuple[Links, ...]:
        """Every use of a weight, in the order of the graph."""
        return self.assembly.links

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """Integer attributes of modules that must follow when channels go."""
        return following(self.model, [(s.module, s.number, self.units_of(s.labels)) for s in self.record.literals])

    def group(self, name: str) -> PruningGroup:
        """Returns the group called `name`.

        Raises:
            TraceError: There is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise TraceError(f"no pruning group {name!r}{nearest(name, [g.name for g in self.groups])}")

    def units_of(self, labels: Labels) -> Labels:
        """Returns the units of labels of the record, as in the index map."""
        return units_of(self.record.solution, self.assembly.unit, labels)

    def with_latency(self, surfaces: tuple[Surface, ...]) -> Network:
        """Returns the network with a cost model that also predicts latency, from the surfaces of a latency table."""
        model = replace(self.cost_model, latency=surfaces)
        return replace(self, assembly=replace(self.assembly, cost_model=model))

    def freeze(self, reasons: dict[str, str]) -> Network:
        """Returns the network with the groups in `reasons` frozen."""
        broken = self.broken | reasons
        return replace(
            self, broken=broken, assembly=assemble(self.record, broken), removable=self.removable - reasons.keys()
        )


def trace(
    model: nn.Module, example_inputs: Tensor | Sequence[Tensor], *, verify: bool = True, pruning: str = CHANNEL
) -> Network:
    """Finds what can be pruned in `model`, and what every choice costs.

    Args:
        model: Any module that `torch.export` accepts. It is not changed.
        example_inputs: One tensor `(B, ...)`, or the tuple of positional inputs. Their values do not matter.
        verify: Prune each group on a copy, run it, and compare it with its masked twin; a group that fails is frozen.
            Masks change no shape and need none of that.
        pruning: What is pruned: `channel`, or single weights: `unstructured`, `2:4`.

    Raises:
        TraceError: The model cannot be exported (the message names the operator), or nothing in it can be pruned.
        InputError: `pruning` is unknown.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not inputs or not isinstance(inputs[0], Tensor) or inputs[0].ndim < 1:
        raise TraceError("example_inputs must hold at least one tensor with a batch dimension")
    model = prunable(model)
    with evaluating(model):
        program = export_program(model, inputs)
        record, unknown = walk(program, model, inputs[0].shape[0])
    record, assembly, uncounted = _with_uncounted(record, model, inputs)
    network = Network(model, inputs, record, assembly, {}, (*_notes(unknown), *uncounted))
    if pruning != CHANNEL:
        from autoprune.network.masks import mask_assembly

        assembly = mask_assembly(record, assembly.cost_model.dense(), pruning)
        network = replace(network, assembly=assembly, pruning=pruning, notes=tuple(uncounted))
    elif verify and network.groups:
        from autoprune.network.verify import verified

        network = verified(network)
    if not network.groups:
        reasons = "\n".join(f"  {f.name} ({f.size}): {f.reason}" for f in network.frozen[:10])
        raise TraceError(
            f"nothing in {type(model).__name__} can be pruned:\n{reasons or '  it has no layer with channels'}"
        )
    return network


def _with_uncounted(record: Record, model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Record, Assembly, list[str]]:
    """Adds the MACs of operators without a rule as a constant: what they read is frozen, so their cost stays."""
    from autoprune.network.complexity import count_macs

    assembly = assemble(record, {})
    rest = count_macs(model, inputs) - assembly.cost_model.dense()["macs"]
    if rest <= 0:
        return record, assembly, []
    product = Product(rest * record.batch, ())
    note = f"{rest:,} MACs are spent in operators without a rule; they stay whatever is pruned"
    record = replace(record, products=(*record.products, product))
    return record, assemble(record, {}), [note]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module of `model` into eval mode, and each back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _notes(unknown: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"no rule for the operator {name}: what it reads is frozen" for name in dict.fromkeys(unknown))


def export_program(model: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Returns the model's graph of ATen operators at the shapes of `inputs`.

    Raises:
        TraceError: It cannot be exported; the message names the operator.
    """
    printed = io.StringIO()
    try:
        # A failed export prints the whole graph up to the fault; recurrent modules cache their weights in a list.
        with torch.no_grad(), redirect_stderr(printed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The tensor attributes? self.*_flat_weights")
            program = torch.export.export(model, inputs, strict=False)
    except Exception as error:  # torch.export lets through whatever the model's own code raises
        raise TraceError(_why(model, error, printed.getvalue())) from error
    sys.stderr.write(printed.getvalue())
    _drop_unused(program)
    return program


def _why(model: nn.Module, error: Exception, graph: str) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    head = lines[0] if lines else type(error).__name__
    recorded = re.findall(r"torch\.ops\.(\w+\.\w+)", graph)
    found = [next((line for line in lines if "aten." in line or "Unsupported" in line), "")]
    found.append(f"the last operator that was recorded is {recorded[-1]}" if recorded else "")
    where = next((k for k, line in enumerate(lines) if line.startswith('File "') and "/torch/" not in line), None)
    found += [] if where is None else lines[where : where + 2]  # the place and the code that stands there
    detail = "".join(f"\n  {line}" for line in dict.fromkeys(found) if line and line != head)
    return (
        f"{type(model).__name__} cannot be exported: {type(error).__name__}: {head}{detail}\n"
        "  torch.export needs a forward pass without control flow that depends on the data"
    )


# --- the pass over the graph --------------------------------------------------------------------------------------


def walk(
    program: torch.export.ExportedProgram, model: nn.Module, batch: int, env: dict[torch.fx.Node, Any] | None = None
) -> tuple[Record, list[str]]:
    """Applies the rules to every node of a graph; returns what they wrote down, and the operators without a rule.

    `env` is filled with the `Value` of each node (or a tuple of them), for whoever wants to know every tensor.
    """
    tape = Tape()
    env = {} if env is None else env
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    parameters: dict[str, Parameter] = {}
    tied: dict[int, Value] = {}
    widths = {path: frozenset(width_attributes(module).values()) for path, module in model.named_modules()}
    kernels = _kernels(program.graph)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = named.get(node.name)
            tensor = state.get(name) if name is not None else None
            # A tied parameter may come under each of its names: it is one tensor, known by the first.
            env[node] = tied.get(id(tensor)) or _placeholder(tape, node, name, state, parameters)
            if node in kernels and name is not None and isinstance(tensor, nn.Parameter):
                env[node] = _without_kernel(env[node], name, parameters)
            if tensor is not None:
                tied[id(tensor)] = env[node]
        elif node.op == "call_function":
            _prepare(tape, node, widths, named)
            tape.norm = _norm_behind(node, named)
            env[node] = _call(tape, node, env)
            tape.literals += written_sizes(node, operator_name(node.target), _module(node), env[node])
        elif node.op == "get_attr":
            env[node] = None
        elif node.op == "output":
            for value in tree_leaves(torch.fx.map_arg(node.args, lambda n: env[n])):
                tape.freeze_all(value, "the model's output")
    for name, tensor in state.items():
        if name not in parameters and not _is_alias(tensor, parameters, state):
            # What the forward pass never reads still has a size.
            parameters[name] = Parameter(
                name,
                tuple(tensor.shape),
                tensor.element_size(),
                isinstance(tensor, nn.Parameter),
                (None,) * tensor.ndim,
            )
    record = Record(
        solution=tape.labels.solve(),
        layers=tuple(tape.layers),
        products=tuple(tape.products),
        parameters=tuple(parameters.values()),
        live=_live(program.graph, env),
        batch=batch,
        literals=tuple(tape.literals),
        queries=tuple(tape.queries),
        contracted=tuple(tape.contracted),
    )
    return record, tape.unknown


def _is_alias(tensor: Tensor, parameters: dict[str, Parameter], state: dict[str, Tensor]) -> bool:
    return any(state.get(name) is tensor for name in parameters)


def _placeholder(
    tape: Tape, node: torch.fx.Node, name: str | None, state: dict[str, Tensor], parameters: dict[str, Parameter]
) -> Any:
    example = node.meta.get("val")
    if not isinstance(example, Tensor):
        return None
    shape = tuple(int(n) for n in example.shape)
    if name is None or name not in state:
        # The model's input, or a constant tensor made inside the forward pass: nothing of it can go.
        return Value(shape, (None,) * len(shape))
    dims = tuple(tape.labels.fresh(n) if n > 1 else None for n in shape)
    tensor = state[name]
    trainable = isinstance(tensor, nn.Parameter)
    parameters[name] = Parameter(name, shape, tensor.element_size(), trainable, dims)
    tape.stored[name] = dims
    return Value(shape, dims, name)


def _prepare(tape: Tape, node: torch.fx.Node, widths: dict[str, frozenset[int]], named: dict[str, str]) -> None:
    """Tells the tape what the rules of reshaping and of attention need to know about a call."""
    name = operator_name(node.target)
    result = node.meta.get("val")
    tape.sizes = widths.get(_module(node), frozenset())
    tape.inferred = inferred_axis(node, name, result.ndim) if isinstance(result, Tensor) else None
    tape.query = query_rows(node, named) if name == "scaled_dot_product_attention" else None


def _drop_unused(program: torch.export.ExportedProgram) -> None:
    """Removes calls that nothing reads, such as averages of attention weights.

    The model still runs them, so what needs two widths to agree stays: layers, and sums of two tensors.
    """
    signature = program.graph_signature
    stored = {*signature.inputs_to_parameters, *signature.inputs_to_buffers}

    def stays(node: torch.fx.Node) -> bool:
        return node.is_impure() or len(node.all_input_nodes) > 1 or any(n.name in stored for n in node.all_input_nodes)

    program.graph.eliminate_dead_code(stays)


def _kernels(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Returns the placeholders that convolutions use as weights, as they are or computed from them (standardised)."""
    found: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or not operator_name(node.target).startswith(
            ("conv1d", "conv2d", "conv3d", "conv_t")
        ):
            continue
        weight = node.args[1]
        shape = tuple(weight.meta["val"].shape)
        waiting, seen = [weight], {weight}
        while waiting:
            one = waiting.pop()
            example = one.meta.get("val")
            if one.op == "placeholder" and isinstance(example, Tensor) and tuple(example.shape) == shape:
                found.add(one)
            new = [n for n in one.all_input_nodes if n not in seen]
            if len(seen) + len(new) > _COMPUTED:
                break  # it depends on activations
            seen.update(new)
            waiting += new
    return found


def _without_kernel(value: Value, name: str, parameters: dict[str, Parameter]) -> Value:
    """Returns a convolution's weight with labels for its channels alone: the size of its kernel is not pruned."""
    dims = (*value.dims[:2], *([None] * (len(value.shape) - 2)))
    parameters[name] = replace(parameters[name], dims=dims)
    return replace(value, dims=dims)


def _call(tape: Tape, node: torch.fx.Node, env: dict[torch.fx.Node, Any]) -> Any:
    args = torch.fx.map_arg(node.args, lambda n: env[n])
    kwargs = torch.fx.map_arg(node.kwargs, lambda n: env[n])
    if node.target is operator.getitem:
        source = args[0]
        return source[int(str(args[1]))] if isinstance(source, (tuple, list)) else None
    result = node.meta.get("val")
    results = [r for r in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(r, Tensor)]
    if not results:
        return None
    tape.node = node.name
    tape.where = _where(node)
    tape.shapes = tuple(tuple(int(n) for n in r.shape) for r in results)
    tape.shape = tape.shapes[0]
    tape.normalised = bool(node.users) and all(operator_name(user.target) == "batch_norm" for user in node.users)
    name = operator_name(node.target)
    rule: Callable[..., Any] | None = RULES.get(name)
    if rule is not None:
        try:
            return rule(tape, *args, **kwargs)
        except NotImplementedError:
            pass  # the rule does not cover this form of the operator
    if any(d is not None for value in tree_leaves((args, kwargs)) if isinstance(value, Value) for d in value.dims):
        tape.unknown.append(str(node.target))
    reason = f"no rule for the operator {node.target} at {tape.where}"
    tape.freeze_all(list(args), reason)
    tape.freeze_all(list(kwargs.values()), reason)
    values = tuple(Value(shape, (None,) * len(shape)) for shape in tape.shapes)
    return values if isinstance(result, (tuple, list)) else values[0]


def _norm_behind(node: torch.fx.Node, named: dict[str, str]) -> str | None:
    """Returns the name of the weight of the batch norm that alone reads a node's result, where it has one."""
    users = list(node.users)
    if len(users) != 1 or operator_name(users[0].target) != "batch_norm":
        return None
    weight = users[0].args[1] if len(users[0].args) > 1 else None
    return named.get(weight.name) if isinstance(weight, torch.fx.Node) else None


def _module(node: torch.fx.Node) -> str:
    """Returns the path of the module whose forward pass made a node; the root's is empty."""
    path = ""
    for entry in (node.meta.get("nn_module_stack") or {}).values():
        path = entry[0] if isinstance(entry, tuple) else str(entry)
    return re.sub(r"@\d+", "", path)  # a module's second call is written with a number


def _where(node: torch.fx.Node) -> str:
    return _module(node) or node.name


def _live(graph: torch.fx.Graph, env: dict[torch.fx.Node, Any]) -> tuple[tuple[LiveTensor, ...], ...]:
    """Returns, for every call in the graph, the activations that are alive while it runs (views share their base)."""
    base: dict[torch.fx.Node, torch.fx.Node] = {}
    last: dict[torch.fx.Node, int] = {}
    made: dict[torch.fx.Node, int] = {}
    for step, node in enumerate(graph.nodes):
        value = env.get(node)
        if node.op == "call_function":
            raw = str(getattr(node.target, "__name__", node.target)).split(".")[0]
            inplace = raw.endswith("_") and not raw.startswith("__")
            alias = node.target is operator.getitem or inplace or operator_name(node.target) in ALIASES
            first = node.args[0] if node.args and isinstance(node.args[0], torch.fx.Node) else None
            base[node] = base.get(first, first) if alias and first is not None else node
            made.setdefault(base[node], step)
        elif node.op == "placeholder" and isinstance(value, Value) and value.name is None:
            base[node] = node
            made[node] = step
        for used in node.all_input_nodes:
            if used in base:
                last[base[used]] = step
    tensors: dict[torch.fx.Node, list[LiveTensor]] = {}
    for node in made:
        value = env.get(node)
        values = value if isinstance(value, tuple) else (value,)
        example = node.meta.get("val")
        examples = example if isinstance(example, (tuple, list)) else (example,)
        tensors[node] = [
            LiveTensor(e.element_size(), tuple(n if d is None else d for n, d in zip(v.shape, v.dims, strict=True)))
            for v, e in zip(values, examples, strict=False)
            if isinstance(v, Value) and isinstance(e, Tensor)
        ]
    points = []
    for step, node in enumerate(graph.nodes):
        if node.op == "call_function" and base.get(node) is node:
            alive = [n for n in made if made[n] <= step <= last.get(n, step)]
            points.append(tuple(t for n in alive for t in tensors[n]))
    return tuple(points)
