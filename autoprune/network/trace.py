"""Traces a model once: `torch.export`, one pass of label rules over the graph, groups, index map and exact cost model.

Decides how a module becomes a `Network`. Everything after that is arithmetic on it: the traced result is a plain value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.cost import CostModel, Surface
from autoprune.errors import TraceError, nearest
from autoprune.network.attention import prunable
from autoprune.network.copies import runs_channels_last, sharing_copy
from autoprune.network.graph import (
    export_program,
    kernel_weights,
    lays_out_itself,
    live_tensors,
    module_path,
    module_paths,
    norm_behind,
    place_of,
    training_program,
    unread,
)
from autoprune.network.groups import (
    Assembly,
    Frozen,
    IndexMap,
    Links,
    Parameter,
    PruningGroup,
    Record,
    assemble,
    units_of,
)
from autoprune.network.hooked_weights import check_hooks
from autoprune.network.labels import Labels, Value
from autoprune.network.literals import (
    SPLITS,
    Attribute,
    following,
    inferred_axis,
    made_sizes,
    width_attributes,
    width_lists,
    written_sizes,
)
from autoprune.network.queries import query_rows
from autoprune.network.rules import RULES, operator_name
from autoprune.network.tape import Product, Tape, Width
from autoprune.policy import CHANNEL


@dataclass(frozen=True, slots=True)
class Told:
    """A size that a module is told: the `axis` of a call in its forward pass, counted from 0, has `labels`."""

    module: str
    call: int
    axis: int
    labels: Labels


@dataclass(frozen=True)
class Network:
    """A model that was traced: its pruning groups, what is frozen and why, and its exact cost model.

    `model` is the dense model itself, or a copy with the same tensors in which attention modules that cannot lose heads
    are replaced by equivalent ones; it is never changed. `example_inputs` keep the shapes that it was traced with;
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
    told: tuple[Told, ...] = ()
    """Sizes that modules cannot know by themselves, as `computed_sizes.with_told_sizes` found them."""
    checked: tuple[Width, ...] = ()
    """Attributes that modules compare with a width, as `checked_widths` found them."""
    followers: tuple[Attribute, ...] | None = None
    """What `attributes` returns of a network that was cut before: its numbers do not name dimensions any more."""
    channels_last: bool = True
    """Whether images may lie channels-last in memory; `runs_channels_last` tells."""
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
        if self.followers is not None:
            return self.followers
        sizes = [(size, self.units_of(size.labels)) for size in self.record.literals]
        checked = (Attribute(width.module, width.name, self.units_of(width.labels)) for width in self.checked)
        return (*following(self.model, sizes), *(own for own in checked if (own.units >= 0).any()))

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
    check_hooks(model)
    model = prunable(model)
    with evaluating(model):
        program = export_program(sharing_copy(model), inputs)
        training = training_program(model, inputs, program)
        record, unknown = walk(program, model, inputs[0].shape[0], training=training)
    notes = _notes(unknown) if pruning == CHANNEL else ()  # masks change no shape: an operator needs no rule for them
    network = Network(model, inputs, record, assemble(record, {}), {}, notes)
    if lays_out_itself(program.graph):
        network = replace(network, channels_last=runs_channels_last(model, inputs))
    if verify and pruning == CHANNEL and network.groups:
        network = _verified(network, ruled=not unknown)
        if unread(program, model):
            from autoprune.network.verify import verified_in_training

            network = verified_in_training(network)
    else:
        network = _with_uncounted(network)
    if pruning != CHANNEL:
        from autoprune.network.masks import mask_assembly

        assembly = mask_assembly(network.record, network.cost_model.dense(), pruning)
        network = replace(network, assembly=assembly, pruning=pruning)
    if not network.groups:
        reasons = "\n".join(f"  {f.name} ({f.size}): {f.reason}" for f in network.frozen[:10])
        raise TraceError(
            f"nothing in {type(model).__name__} can be pruned:\n{reasons or '  it has no layer with channels'}"
        )
    return network


def _verified(network: Network, *, ruled: bool) -> Network:
    """Verifies a network, whose operators all have a rule where it is `ruled`: then pruned copies tell whether MACs are
    those that are predicted, and the dense network is counted only where they are not.
    """
    if ruled:
        found = _freed(network)
        if not found.broken:
            return found
    whole = _with_uncounted(network)
    return found if ruled and whole is network else _freed(whole)


def _freed(network: Network) -> Network:
    """Verifies a network, with attributes following and sizes told where that lets pruned copies run."""
    from autoprune.network.checked_widths import with_checked_widths, with_checks_of_single_groups
    from autoprune.network.computed_sizes import with_told_sizes
    from autoprune.network.verify import verified

    return with_checks_of_single_groups(with_told_sizes(verified(network, heal=with_checked_widths)))


def _with_uncounted(network: Network) -> Network:
    """Adds the MACs of operators without a rule as a constant: what they read is frozen, so their cost stays."""
    from autoprune.network.complexity import count_macs

    rest = count_macs(network.model, network.example_inputs) - network.cost_model.dense()["macs"]
    if rest <= 0:
        return network
    product = Product(rest * network.record.batch, ())
    note = f"{rest:,} MACs are spent in operators without a rule; they stay whatever is pruned"
    record = replace(network.record, products=(*network.record.products, product))
    return replace(network, record=record, assembly=assemble(record, {}), notes=(*network.notes, note))


def device_of(model: nn.Module) -> torch.device:
    """Returns where the parameters of `model` lie; the CPU where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


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
            tape.literals += written_sizes(node, operator_name(node.target), module_path(node), env[node])
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


def unsaved_buffers(model: nn.Module) -> set[str]:
    """Returns the names of the buffers that are no part of the state dict."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }


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
    name = operator_name(node.target)
    result = node.meta.get("val")
    tape.module = module_path(node)
    tape.sizes = widths.get(tape.module, frozenset())
    tape.told = name in SPLITS
    tape.inferred = inferred_axis(node, name, result.ndim) if isinstance(result, Tensor) else None
    tape.query = query_rows(node, named) if name == "scaled_dot_product_attention" else None


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
