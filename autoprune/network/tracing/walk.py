"""One pass over an exported graph: every node's rule is applied to the labels of what it reads.

Decides what is recorded of a node, and what is frozen where no rule covers it. Knows no operator by itself.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.network.graph.attributes import width_attributes, width_lists
from autoprune.network.graph.labels import Value
from autoprune.network.graph.modules import unsaved_buffers
from autoprune.network.graph.record import Parameter, Record, Width
from autoprune.network.graph.recorder import Tape
from autoprune.network.graph.rules.table import Sizing, operator_name, operator_of
from autoprune.network.tracing.attention_scale import query_rows
from autoprune.network.tracing.liveness import live_tensors
from autoprune.network.tracing.program import kernel_weights, module_path, module_paths, norm_behind, place_of
from autoprune.network.tracing.written_sizes import inferred_axis, made_sizes, written_sizes

# --- the pass over the graph --------------------------------------------------------------------------------------


def walk(
    program: torch.export.ExportedProgram,
    model: nn.Module,
    batch: int,
    env: dict[torch.fx.Node, Any] | None = None,
    *,
    training: torch.export.ExportedProgram | None = None,
) -> tuple[Record, list[str]]:
    """Applies the rules to every node of a graph; returns what they wrote down, and the operators without a rule.

    `env` is filled with the `Value` of each node (or a tuple of them), for whoever wants to know every tensor. What
    lives and dies together in the graph of `training` does so here too; nothing else is taken from it.
    """
    first: dict[nn.Module, str] = {}
    aliases = {path: first.setdefault(m, path) for path, m in model.named_modules(remove_duplicate=False)}
    tape = Tape(aliases=aliases)
    walked = _Walked.of(model)
    env = {} if env is None else env
    _apply(tape, program, walked, env)
    if training is not None:
        aside = Tape(aliases=aliases, labels=tape.labels, stored=tape.stored, trainable=tape.trainable)
        _apply(aside, training, walked, {}, mode=" in training")
        seen = {size.module for size in tape.literals}
        # Numbers of its own modules follow; their calls are none of the forward pass that sizes are told to.
        tape.literals += [replace(size, shapes=()) for size in aside.literals if size.module not in seen]
    state, parameters = walked.state, walked.parameters
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
    unsaved = unsaved_buffers(model)
    record = Record(
        solution=tape.labels.solve(),
        layers=tuple(tape.layers),
        products=tuple(tape.products),
        parameters=tuple(replace(p, saved=p.name not in unsaved) for p in parameters.values()),
        live=live_tensors(program.graph, env),
        batch=batch,
        literals=tuple(tape.literals),
        queries=tuple(tape.queries),
        contracted=tuple(tape.contracted),
        widths=tuple(walked.met.values()),
        computed=tuple(dict.fromkeys(tape.computed)),
    )
    return record, tape.unknown


@dataclass(frozen=True, slots=True)
class _Walked:
    """What is known of a model's tensors and attributes while its graphs are walked."""

    state: dict[str, Tensor]
    widths: dict[str, frozenset[Any]]
    numbers: dict[str, set[int]]
    """The integers of modules with code of their own: PyTorch's have their sizes from their parameters."""
    parameters: dict[str, Parameter] = field(default_factory=dict)
    tied: dict[int, Value] = field(default_factory=dict)
    met: dict[tuple[str, int, bytes], Width] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> _Walked:
        own = {p: m for p, m in model.named_modules() if not type(m).__module__.startswith("torch.nn.")}
        return cls(
            {
                **dict(model.named_parameters(remove_duplicate=False)),
                **dict(model.named_buffers(remove_duplicate=False)),
            },
            {
                path: frozenset([*width_attributes(module).values(), *width_lists(module).values()])
                for path, module in model.named_modules()
            },
            {path: found for path, module in own.items() if (found := set(width_attributes(module).values()))},
        )


def _apply(
    tape: Tape,
    program: torch.export.ExportedProgram,
    walked: _Walked,
    env: dict[torch.fx.Node, Any],
    mode: str = "",
) -> None:
    """Applies the rules to every node of one graph."""
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    state, parameters, tied = walked.state, walked.parameters, walked.tied
    kernels = kernel_weights(program.graph)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = named.get(node.name)
            tensor = state.get(name) if name is not None else None
            # A tied parameter may come under each of its names: it is one tensor, known by the first.
            env[node] = tied.get(id(tensor)) or _placeholder(tape, node, name, state, parameters)
            if node in kernels and name in parameters and isinstance(tensor, nn.Parameter):
                env[node] = _without_kernel(env[node], name, parameters)
            if tensor is not None:
                tied[id(tensor)] = env[node]
        elif node.op == "call_function":
            _prepare(tape, node, walked.widths, named)
            tape.norm = norm_behind(node, named)
            env[node] = _call(tape, node, env)
            _meet(walked.met, walked.numbers, node, env)
            tape.literals += written_sizes(node, operator_of(node.target), module_path(node), env[node])
        elif node.op == "get_attr":
            env[node] = None
        elif node.op == "output":
            for value in tree_leaves(torch.fx.map_arg(node.args, lambda n: tape.current(env[n]))):
                tape.freeze_all(value, f"the model's output{mode}")
    env.update({node: tape.current(value) for node, value in env.items()})
    tape.literals += made_sizes(tape.made)


def _meet(
    met: dict[tuple[str, int, bytes], Width],
    numbers: Mapping[str, set[int]],
    node: torch.fx.Node,
    env: dict[torch.fx.Node, Any],
) -> None:
    """Writes down the dimensions of a call's tensors that are as large as an attribute of a module under way."""
    paths = [path for path in module_paths(node) if path in numbers]
    if not paths:
        return
    values = [value for one in (*node.all_input_nodes, node) for value in tree_leaves(env.get(one))]
    for labels in (d for value in values if isinstance(value, Value) for d in value.dims if d is not None):
        for path in paths:
            if len(labels) in numbers[path]:
                met.setdefault((path, len(labels), labels.tobytes()), Width(path, len(labels), labels))


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
    if trainable:
        tape.trainable.add(name)
    return Value(shape, dims, name)


def _prepare(tape: Tape, node: torch.fx.Node, widths: dict[str, frozenset[Any]], named: dict[str, str]) -> None:
    """Tells the tape what the rules of reshaping and of attention need to know about a call."""
    known = operator_of(node.target)
    result = node.meta.get("val")
    tape.module = module_path(node)
    tape.sizes = widths.get(tape.module, frozenset())
    tape.told = known.sizing is Sizing.PARTS
    tape.inferred = inferred_axis(node, known, result.ndim) if isinstance(result, Tensor) else None
    attends = operator_name(node.target) == "scaled_dot_product_attention"
    tape.query = query_rows(node, named) if attends else None


def _without_kernel(value: Value, name: str, parameters: dict[str, Parameter]) -> Value:
    """Returns a convolution's weight with labels for its channels alone: the size of its kernel is not pruned."""
    dims = (*value.dims[:2], *([None] * (len(value.shape) - 2)))
    parameters[name] = replace(parameters[name], dims=dims)
    return replace(value, dims=dims)


def _call(tape: Tape, node: torch.fx.Node, env: dict[torch.fx.Node, Any]) -> Any:
    args = torch.fx.map_arg(node.args, lambda n: tape.current(env[n]))
    kwargs = torch.fx.map_arg(node.kwargs, lambda n: tape.current(env[n]))
    if node.target is operator.getitem:
        source = args[0]
        return source[int(str(args[1]))] if isinstance(source, (tuple, list)) else None
    result = node.meta.get("val")
    results = [r for r in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(r, Tensor)]
    if not results:
        return None
    tape.node = node.name
    place = place_of(node)
    tape.where = tape.aliases.get(place, place)
    tape.shapes = tuple(tuple(int(n) for n in r.shape) for r in results)
    tape.shape = tape.shapes[0]
    tape.normalised = bool(node.users) and all(operator_name(user.target) == "batch_norm" for user in node.users)
    rule = operator_of(node.target).rule
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
