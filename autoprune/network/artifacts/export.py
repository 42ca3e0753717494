"""Exports: a pruned model as state dict, `torch.export` program or ONNX file, each checked after writing.

Decides the formats and what is checked: the same output as the model with batches of one and of three, and as many
parameters in the file as the model has. A file that fails a check is not left behind.
"""

from __future__ import annotations

import inspect
import io
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.errors import AutopruneError, CheckpointError, InputError, MissingExtraError, nearest
from autoprune.files import write_whole
from autoprune.network.artifacts.saved import DOCUMENT, WEIGHTS, load, read_document
from autoprune.network.graph.copies import deep_copy
from autoprune.network.graph.modules import evaluating
from autoprune.network.models.checkpoints import read_state
from autoprune.network.tracing.counting import count_params

TOLERANCE = 1e-4
"""Largest difference between the model and what was exported, relative to the largest output."""
_COARSE = 2e-2
"""The same for outputs in half precision, which keep two to three digits."""
_CHECKED = (1, 3)
"""Batches that what was exported must take; it is exported with a batch of two."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a model takes: for each positional input shape, type, and whether its first dimension is the batch.

    `highs` bound whole numbers, which may be indices into a table.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    batched: tuple[bool, ...]
    highs: tuple[int, ...]

    def sample(self, batch: int) -> tuple[Tensor, ...]:
        """Returns inputs of a batch, the same ones at every call."""
        generator = torch.Generator().manual_seed(batch)
        made = []
        for shape, dtype, batched, high in zip(self.shapes, self.dtypes, self.batched, self.highs, strict=True):
            full = (batch, *shape) if batched else shape
            if dtype.is_floating_point:
                made.append(torch.randn(full, generator=generator).to(dtype))
            else:
                made.append(torch.randint(0, 2 if dtype == torch.bool else high, full, generator=generator).to(dtype))
        return tuple(made)

    def dynamic(self, batch: Any) -> tuple[dict[int, Any] | None, ...]:
        """Returns which dimensions are the batch, as `torch.export` wants it."""
        return tuple({0: batch} if batched else None for batched in self.batched)

    def widened(self) -> Inputs:
        """Returns the same inputs with real numbers in float32."""
        dtypes = tuple(torch.float32 if dtype.is_floating_point else dtype for dtype in self.dtypes)
        return Inputs(self.shapes, dtypes, self.batched, self.highs)


def inputs_of(document: Mapping[str, Any]) -> Inputs:
    """Returns the inputs that a saved model's document names; an old document names the shape of a single one.

    Raises:
        CheckpointError: It names none.
    """
    rows = document.get("inputs") or [{"shape": document.get("input_shape")}]
    try:
        return Inputs(
            tuple(tuple(int(n) for n in row["shape"]) for row in rows),
            tuple(getattr(torch, row.get("dtype", "float32")) for row in rows),
            tuple(bool(row.get("batched", True)) for row in rows),
            tuple(max(2, int(row.get("high", 2))) for row in rows),
        )
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{DOCUMENT} does not say what inputs the model takes") from error


# --- formats ------------------------------------------------------------------------------------------------------


def export_safetensors(folder: Path, model: nn.Module, inputs: Inputs, target: Path) -> list[str]:
    """Copies weights and policy; `autoprune.load` reads them back.

    Raises:
        AutopruneError: What was written does not give the model's output.
    """
    for name in (WEIGHTS, DOCUMENT):
        write_whole(target / name, (folder / name).read_bytes())
    twin = load_like(model, target)
    for batch in _CHECKED:
        x = inputs.sample(batch)
        _compare(WEIGHTS, _leaves(twin, x), _leaves(model, x))
    _count(WEIGHTS, count_params(twin), model)
    return [WEIGHTS, DOCUMENT]


def export_pt2(folder: Path, model: nn.Module, inputs: Inputs, target: Path) -> list[str]:
    """Writes a `torch.export` program with a dynamic batch; `torch.export.load` reads it.

    Raises:
        InputError: The model cannot be exported.
        AutopruneError: What was written does not give the model's output.
    """
    name = "model.pt2"
    program = _program(model, inputs)
    stream = io.BytesIO()
    torch.export.save(program, stream)
    write_whole(target / name, stream.getvalue())
    loaded = torch.export.load(target / name).module()
    for batch in _CHECKED:
        x = inputs.sample(batch)
        _compare(name, _tensors(loaded(*x)), _leaves(model, x))
    _count(name, sum(p.numel() for p in loaded.parameters()), model)
    return [name]


def export_onnx(folder: Path, model: nn.Module, inputs: Inputs, target: Path) -> list[str]:
    """Writes an ONNX file with a dynamic batch, checked with onnxruntime.

    A model in half precision is written in float32, which holds the same weights: onnxruntime has few kernels for
    anything else on a CPU. Only what follows from constants is folded: parameters stay as they are, and runtimes fold
    them into others on loading.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        InputError: The model cannot be exported.
        AutopruneError: What was written does not give the model's output.
    """
    try:
        import onnxruntime
        from onnxscript.optimizer import fold_constants, remove_unused_nodes  # the exporter needs onnxscript too
    except ImportError as error:
        raise MissingExtraError(f"FORMAT=onnx needs {error.name}: pip install 'autoprune[onnx]'") from error
    name = "model.onnx"
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
        model, inputs = deep_copy(model).float(), inputs.widened()
    program = _program(model, inputs)
    names = _input_names(model, len(inputs.shapes))
    outputs = _output_names(model, inputs.sample(2), names)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            written = torch.onnx.export(
                program,
                inputs.sample(2),
                dynamo=True,
                input_names=names,
                output_names=outputs,
                external_data=False,
                optimize=False,
                verbose=False,
            )
        assert written is not None
        # What follows from constants alone, so that runtimes see plain biases and can fold batch norms into the layers
        # before them. The exporter's own optimiser does that folding in the file, whose parameters are counted below.
        owners = dict(model.named_parameters(remove_duplicate=False))

        def foldable(node: Any) -> bool | None:
            reads = any(value is not None and value.name in owners for value in node.inputs)
            return False if reads and node.op_type != "Shape" else None

        fold_constants(written.model, should_fold=foldable)
        remove_unused_nodes(written.model)
        graph = written.model_proto.graph
        write_whole(target / name, written.model_proto.SerializeToString())
        session = onnxruntime.InferenceSession(str(target / name), providers=["CPUExecutionProvider"])
    except OSError:
        raise
    except Exception as error:  # the exporter and the runtime raise classes of their own, and of protobuf
        raise InputError(f"{type(model).__name__} cannot be written as ONNX: {_head(error)}; try FORMAT=pt2") from error
    known = {entry.name for entry in session.get_inputs()}
    for batch in _CHECKED:
        x = inputs.sample(batch)
        fed = {key: value.numpy() for key, value in zip(names, x, strict=True) if key in known}
        found = [torch.from_numpy(array) for array in session.run(None, fed)]
        _compare(name, found, _leaves(model, x))
    _count(name, _stored(graph, model), model, unused=_unused(program, model))
    return [name]


FORMATS: dict[str, Callable[[Path, nn.Module, Inputs, Path], list[str]]] = {
    "safetensors": export_safetensors,
    "pt2": export_pt2,
    "onnx": export_onnx,
}
"""Format → a function that writes a model into a folder, checks it, and returns the names of its files."""


def export(folder: Path, target: Path, *, format: str, factory: Callable[[], nn.Module] | None = None) -> list[Path]:
    """Writes the pruned model saved in `folder` to the folder `target`; returns the files.

    They are written and checked beside `target` and moved there at the end, so that a failure leaves nothing behind.
    Whose code builds the model is the caller's to ask: see `artifacts.check_model`.

    Raises:
        InputError: The format is unknown, the model cannot be exported, or `target` cannot be written.
        CheckpointError: `folder` holds no usable model.
        AutopruneError: What was written does not give the model's output.
    """
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}{nearest(format, FORMATS)}")
    model, document = load(folder, factory, allow_code=True), read_document(folder)
    _count_zeros(folder, model, document)
    inputs = inputs_of(document)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work, evaluating(model):
            names = FORMATS[format](folder, model, inputs, Path(work))
            target.mkdir(exist_ok=True)
            for name in names:
                os.replace(Path(work) / name, target / name)
    except OSError as error:
        raise InputError(f"the model cannot be written to {target}: {error.strerror or error}") from error
    return [target / name for name in names]


def load_like(model: nn.Module, folder: Path) -> nn.Module:
    """Returns a copy of `model` with the weights that were written to `folder`."""
    twin = deep_copy(model)
    twin.load_state_dict(read_state(folder / WEIGHTS))
    return twin


# --- the exporter -------------------------------------------------------------------------------------------------


def _program(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The tensor attributes? self.*_flat_weights")
            # A parameter `*args` takes all positional inputs as one.
            shapes: Any = inputs.dynamic(batch)
            if _variadic(model):
                shapes = (shapes,)
            return torch.export.export(model, inputs.sample(2), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export lets through whatever the model's own code raises
        fixed = "Constraints violated" in str(error) or "specialized" in str(error)
        advice = (
            "its forward pass fixes the batch: take it from the input's shape, or write -1 where it is reshaped"
            if fixed
            else "its forward pass must not depend on the values of tensors; FORMAT=safetensors needs no export"
        )
        raise InputError(
            f"{type(model).__name__} cannot be exported with a dynamic batch: {_head(error)}\n  {advice}"
        ) from error


def _variadic(model: nn.Module) -> bool:
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    return bool(kinds) and kinds[0] == inspect.Parameter.VAR_POSITIONAL


def _head(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


def _input_names(model: nn.Module, count: int) -> list[str]:
    """Returns `input` for a single input, else what the forward pass calls them."""
    if count == 1:
        return ["input"]
    named = [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    return named[:count] if len(named) >= count else [f"input_{number}" for number in range(count)]


def _output_names(model: nn.Module, x: Sequence[Tensor], names: Sequence[str]) -> list[str]:
    """Returns `output` for a single tensor, else keys and places: `logits`, `output_1`, `hidden_0`.

    An input that is handed through is one value in the graph, with one name: its own.
    """
    output = _output(model, x)
    if isinstance(output, Tensor):
        return ["output"]

    def walk(value: Any, name: str) -> list[str]:
        if isinstance(value, Tensor):
            through = next((own for own, given in zip(names, x, strict=True) if given is value), None)
            return [through or (f"{name}_output" if name in names else name)]
        if isinstance(value, Mapping):
            parts = [(str(key), part) for key, part in value.items()]
        elif hasattr(value, "_fields"):
            parts = list(zip(value._fields, value, strict=True))
        elif isinstance(value, (tuple, list)):
            parts = [(f"{name or 'output'}_{place}", part) for place, part in enumerate(value)]
            return [found for key, part in parts for found in walk(part, key)]
        else:
            return []
        return [found for key, part in parts for found in walk(part, f"{name}_{key}" if name else key)]

    found = [re.sub(r"\W", "_", name) for name in walk(output, "")]
    return found if len(set(found)) == len(found) else [f"output_{number}" for number in range(len(found))]


# --- checks -------------------------------------------------------------------------------------------------------


def _output(model: nn.Module, x: Sequence[Tensor]) -> Any:
    with evaluating(model), torch.no_grad():
        return model(*x)


def _leaves(model: nn.Module, x: Sequence[Tensor]) -> list[Tensor]:
    found = _tensors(_output(model, x))
    if not found:
        raise InputError(f"{type(model).__name__} returns no tensor, so there is nothing to export")
    return found


def _tensors(output: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _compare(name: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    if [tuple(a.shape) for a in found] != [tuple(b.shape) for b in expected]:
        shapes = [[tuple(t.shape) for t in side] for side in (found, expected)]
        raise AutopruneError(f"{name} gives outputs of the shapes {shapes[0]}, the model {shapes[1]}")
    for a, b in zip(found, expected, strict=True):
        coarse = b.dtype in (torch.bfloat16, torch.float16)
        if not b.numel():
            continue
        difference = float((a.double() - b.double()).abs().max()) / (float(b.double().abs().max()) or 1.0)
        if not difference <= (_COARSE if coarse else TOLERANCE):
            raise AutopruneError(f"{name} does not give the model's output (relative difference {difference:.1e})")


def _count(name: str, stored: int, model: nn.Module, *, unused: int = 0) -> None:
    expected = count_params(model) - unused
    if stored != expected:
        raise AutopruneError(f"{name} holds {stored:,} parameters, the model {expected:,}")


def _stored(graph: Any, model: nn.Module) -> int:
    """Returns the elements of the model's parameters among an ONNX graph's initializers, tied ones once."""
    owners = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    sizes: dict[int, int] = {}
    for tensor in graph.initializer:
        if tensor.name in owners:
            total = 1
            for n in tensor.dims:
                total *= n
            sizes[owners[tensor.name]] = total
    return sum(sizes.values())


def _unused(program: torch.export.ExportedProgram, model: nn.Module) -> int:
    """Returns the elements of parameters that the forward pass never reads: ONNX has no place for them."""
    owners = dict(model.named_parameters(remove_duplicate=False))
    names = program.graph_signature.inputs_to_parameters
    read = {id(owners[names[n.name]]) for n in program.graph.nodes if n.name in names and n.users}
    return sum(p.numel() for p in model.parameters() if id(p) not in read)


def _count_zeros(folder: Path, model: nn.Module, document: Mapping[str, Any]) -> None:
    """Checks that each masked weight holds as many non-zeros as the model's document counts."""
    for entry in document.get("sparsity", {}).values():
        stored = int(torch.count_nonzero(model.get_parameter(entry["parameter"])))
        if stored != entry["nonzero"]:
            raise AutopruneError(
                f"{entry['parameter']} in {folder} has {stored:,} non-zeros, its document says {entry['nonzero']:,}"
            )
