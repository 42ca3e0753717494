"""The exported graph of a model: how it is made, and what can be read off it before any label is known.

Decides what is dropped from it, which placeholders are kernels, and where a node stands in the model. Knows nothing of
pruning groups.
"""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
from torch import Tensor, nn
from torch.fx._lazy_graph_module import _use_lazy_graph_module

from autoprune.errors import TraceError
from autoprune.network.graph.copies import deep_copy, sharing_copy
from autoprune.network.graph.rules.table import operator_name
from autoprune.network.tracing.inlining import inline_regions

_LOGGERS = ("torch._subclasses.fake_tensor", "torch.export")
"""What torch logs here as an error, with a traceback, it also raises."""
_EXPORTING = threading.Lock()
"""Settings of an export hold for the whole process, and torch itself lets one run at a time."""
_COMPUTED = 40
"""A convolution's weight that is computed by more operators than this is taken for an activation."""


def export_program(model: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Returns the model's graph of ATen operators at the shapes of `inputs`.

    Raises:
        TraceError: It cannot be exported; the message names the operator.
    """
    printed = io.StringIO()
    try:
        # A failed export prints the whole graph up to the fault; recurrent modules cache their weights in a list.
        with torch.no_grad(), unlogged(), _hastily(), redirect_stderr(printed), warnings.catch_warnings():
            # Of recurrent modules, and of code that keeps a tensor on its module: it does so on a copy.
            warnings.filterwarnings("ignore", message="The tensor attributes? self")
            program = torch.export.export(model, inputs, strict=False)
    except Exception as error:  # torch.export lets through whatever the model's own code raises
        raise TraceError(_why(model, inputs, error, printed.getvalue())) from error
    sys.stderr.write(printed.getvalue())
    inline_regions(program.graph, program.graph_module)
    _drop_unused(program)
    return program


def unread(program: torch.export.ExportedProgram, model: nn.Module) -> bool:
    """Whether `model` has parameters that the graph does not read, such as those of a head of the training alone."""
    named = program.graph_signature.inputs_to_parameters
    read = {
        named[node.name]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.users and node.name in named
    }
    state = dict(model.named_parameters(remove_duplicate=False))
    known = {id(state[name]) for name in read if name in state}
    return any(id(parameter) not in known for parameter in model.parameters())


def training_program(
    model: nn.Module, inputs: tuple[Tensor, ...], program: torch.export.ExportedProgram
) -> torch.export.ExportedProgram | None:
    """Returns the graph of a forward pass in training, where the one of `program` leaves parameters unread.

    None where it cannot be exported with these inputs: many networks take targets in training.
    """
    if not unread(program, model):
        return None
    try:
        return export_program(sharing_copy(model).train(), inputs)
    except TraceError:
        return None


@contextmanager
def unlogged() -> Iterator[None]:
    """Keeps torch from logging what it raises; its handlers write to the terminal past `redirect_stderr`."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _hastily() -> Iterator[None]:
    """Keeps torch.export from writing down where in the code each node was made (from torch 2.12 on), and from
    compiling code for the graph after each of its passes: a third of its time, for what nobody reads here.
    """
    config, name = torch.fx.config, "do_not_emit_stack_traces"
    with _EXPORTING, _use_lazy_graph_module(True):
        before = getattr(config, name, None)
        if before is not None:
            setattr(config, name, True)
        try:
            yield
        finally:
            if before is not None:
                setattr(config, name, before)


def _why(model: nn.Module, inputs: tuple[Tensor, ...], error: Exception, graph: str) -> str:
    """Returns what stopped an export, and what can be done about it where the cause is known.

    Where the model does not run by itself either, its own error is told: the export's may use other words.
    """
    depends = _depends_on_data(error)
    packed = any(word in (frame.line or "") for frame in traceback.extract_tb(error.__traceback__) for word in _PACKING)
    own = None if depends or packed else _own_error(model, inputs)
    if own is not None:
        given = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in inputs)
        advice = f"the model does not run on these example inputs, without an export either: {given}"
        return _told(model, own, "", advice)
    return _told(model, error, graph, _PACKED if packed else _NEEDED if depends else None)


def _told(model: nn.Module, error: Exception, graph: str, advice: str | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    head = lines[0] if lines else type(error).__name__
    recorded = re.findall(r"torch\.ops\.(\w+\.\w+)", graph)
    found = [next((line for line in lines if "aten." in line or "Unsupported" in line), "")]
    found.append(f"the last operator that was recorded is {recorded[-1]}" if recorded else "")
    where = next((k for k, line in enumerate(lines) if line.startswith('File "') and "/torch/" not in line), None)
    found += [] if where is None else lines[where : where + 2]  # the place and the code that stands there
    stack = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.line]
    own = [frame for frame in stack if "/torch/" not in frame.filename and frame.filename != __file__]
    if where is None and own:
        found.append(f'File "{own[-1].filename}", line {own[-1].lineno}: {own[-1].line}')
    found += [] if advice is None else [advice]
    detail = "".join(f"\n  {line}" for line in dict.fromkeys(found) if line and line != head)
    return f"{type(model).__name__} cannot be exported: {type(error).__name__}: {head}{detail}"


_NEEDED = "torch.export needs a forward pass without control flow that depends on the data"
_PACKED = "the sizes of packed sequences depend on the data; give the recurrent layer the padded tensor itself"
_PACKING = ("pack_padded_sequence", "pad_packed_sequence", "pack_sequence", "max_batch_size")
"""What stands in a line of code that fails on packed sequences."""
_DEPENDENT = frozenset(
    [
        "GuardOnDataDependentSymNode",
        "DataDependentOutputException",
        "DynamicOutputShapeException",
        "PendingUnbackedSymbolNotFound",
    ]
)
"""Torch's errors where code asks for a value, or for a size that follows from values."""
_DEPENDENT_WORDS = re.compile(r"data-dependent|dynamic control flow|inputs to control flow", re.IGNORECASE)
"""What torch says where such an error has a more general class."""
_CHAIN = 20
"""Errors that led to one another, at most."""
_CHEAP = 1 << 28
"""Bytes of a model that is copied before it is run."""


def _depends_on_data(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is about control flow or sizes that depend on the data."""
    for _ in range(_CHAIN):
        if error is None:
            break
        if type(error).__name__ in _DEPENDENT or _DEPENDENT_WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _own_error(model: nn.Module, inputs: tuple[Tensor, ...]) -> Exception | None:
    """Runs a model by itself, in evaluation mode, and returns what it raises; None where it runs.

    It is a copy that runs, where that is cheap: an error may come half way. An export may leave tensors of its own in a
    model, and what they cause is no fault of the inputs.
    """
    from autoprune.network.graph.modules import evaluating

    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    try:
        runs = deep_copy(model) if size <= _CHEAP else model
    except Exception:  # what a model keeps need not be made to be copied
        runs = model
    try:
        with torch.no_grad(), evaluating(runs), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs(*(x.clone() for x in inputs))
    except Exception as error:  # whatever the model's own code raises
        return None if "fake" in str(error).lower() else error
    return None


def _drop_unused(program: torch.export.ExportedProgram) -> None:
    """Removes calls that nothing reads, such as averages of attention weights.

    The model still runs them, so what needs two widths to agree stays: layers, and sums of two tensors.
    """
    signature = program.graph_signature
    stored = {*signature.inputs_to_parameters, *signature.inputs_to_buffers}

    def stays(node: torch.fx.Node) -> bool:
        return node.is_impure() or len(node.all_input_nodes) > 1 or any(n.name in stored for n in node.all_input_nodes)

    program.graph.eliminate_dead_code(stays)


def lays_out_itself(graph: torch.fx.Graph) -> bool:
    """Whether code reshapes images in a way that depends on how they lie in memory: `view` or `as_strided`."""
    for node in graph.nodes:
        if node.op == "call_function" and operator_name(node.target) in ("view", "_unsafe_view", "as_strided"):
            source = node.args[0].meta.get("val") if isinstance(node.args[0], torch.fx.Node) else None
            if isinstance(source, Tensor) and source.dim() == 4:
                return True
    return False


def kernel_weights(graph: torch.fx.Graph) -> set[torch.fx.Node]:
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


def norm_behind(node: torch.fx.Node, named: dict[str, str]) -> str | None:
    """Returns the name of the weight of the batch norm that alone reads a node's result, where it has one."""
    users = list(node.users)
    if len(users) != 1 or operator_name(users[0].target) != "batch_norm":
        return None
    weight = users[0].args[1] if len(users[0].args) > 1 else None
    return named.get(weight.name) if isinstance(weight, torch.fx.Node) else None


def module_path(node: torch.fx.Node) -> str:
    """Returns the path of the module whose forward pass made a node; the root's is empty."""
    return next(reversed(module_paths(node)), "")


def module_paths(node: torch.fx.Node) -> list[str]:
    """Returns the paths of the modules whose forward passes were under way when a node was made, outermost first."""
    entries = (node.meta.get("nn_module_stack") or {}).values()
    paths = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in entries]
    return [re.sub(r"@\d+", "", path) for path in paths]  # a module's second call is written with a number


def place_of(node: torch.fx.Node) -> str:
    """Returns where a node stands, for reasons that a person reads: its module, or its own name at the root."""
    return module_path(node) or node.name
