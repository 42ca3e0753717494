"""Traces kept on disk: a model of the same structure is not exported again.

Decides what makes two models one structure, what is kept of a trace, and when a kept one is believed. The key is made
of everything that the graph may follow from: the classes of all modules and the source files that these stand in,
plain attributes, names and shapes of the state, the shapes of the inputs, the versions of torch and Python, and this
package's own sources. Weights are no part of it. As code that modules call in other files, and what weights do, are in
no key, a kept trace is verified on the model at hand as a fresh one is: pruned copies are run and compared with their
masked twins, and MACs are counted. What does not pass is traced anew.

A file is one safetensors file: an array of integers, and a JSON text that names places in it. Nothing is unpickled. A
file that cannot be read is reported and written anew. Knows nothing of policies.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.errors import CheckpointError
from autoprune.network.graph.assembly import assemble
from autoprune.network.graph.copies import deep_copy
from autoprune.network.graph.labels import Solution
from autoprune.network.graph.modules import unsaved_buffers
from autoprune.network.graph.network import Network, Told
from autoprune.network.graph.record import Layer, LiveTensor, Parameter, Product, Query, Record, Size, Width
from autoprune.network.models.checkpoints import read_metadata, read_state, save_state
from autoprune.network.surgery.attention import prunable
from autoprune.network.surgery.masks import mask_assembly
from autoprune.network.surgery.sizes import tell, told_numbers
from autoprune.network.tracing.counting import count_macs
from autoprune.network.tracing.trace import trace
from autoprune.network.tracing.verify import verified
from autoprune.policy import CHANNEL, digest

SCHEMA = 1
_KINDS = {
    kind.__name__: kind for kind in (Record, Solution, Layer, Product, Parameter, LiveTensor, Size, Query, Told, Width)
}
"""The values that a file may hold besides numbers, texts, sequences and arrays."""

Note = Callable[[str], None]


def trace_or_read(model: nn.Module, example: Tensor, *, pruning: str, folder: Path, note: Note) -> Network:
    """Returns the trace of `model`, from `folder` where it holds that of a model of the same structure.

    Args:
        model: The module, as for `trace`.
        example: Its input `(B, ...)`.
        pruning: What is pruned, as for `trace`.
        folder: Where traces are kept.
        note: Told of a file that cannot be used.

    Raises:
        TraceError: See `trace`.
        InputError: `pruning` is unknown.
        OSError: The file cannot be written.
    """
    key = structure_key(model, example, pruning)
    if key is None:
        return trace(model, example, pruning=pruning)
    path = folder / f"trace-{key}.safetensors"
    if path.is_file():
        try:
            return read_trace(path, model, example)
        except CheckpointError as error:
            note(f"the kept trace is not used and is made anew: {error}")
    network = trace(model, example, pruning=pruning)
    write_trace(path, network)
    return network


# --- the key ------------------------------------------------------------------------------------------------------


def structure_key(model: nn.Module, example: Tensor, pruning: str) -> str | None:
    """Returns the same text for models of one structure; None where a structure cannot be told.

    That is where a class has no source file, or a module has hooks or a forward pass of its own.
    """
    modules: list[Any] = []
    classes: set[type] = set()
    paths: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return None
        classes.update(type(module).__mro__)
        modules.append([path, paths.setdefault(id(module), path), _name(type(module)), _plain(module)])
    sources = _sources(classes)
    if sources is None:
        return None
    names: dict[int, str] = {}
    unsaved = unsaved_buffers(model)
    state = []
    both = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for kind, found in enumerate(both):
        for name, tensor in found:
            first = names.setdefault(id(tensor), name)  # tied tensors are one
            state.append([kind, name, first, name in unsaved, list(tensor.shape), str(tensor.dtype)])
    shapes = [list(example.shape), str(example.dtype)]
    return digest([SCHEMA, pruning, modules, sources, state, shapes, torch.__version__, sys.version, _own_sources()])


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _plain(module: nn.Module) -> list[list[str]]:
    """Returns a module's own attributes, but for parameters, buffers and submodules: name and what it is."""
    own = vars(module).items()
    return sorted([name, _told(value)] for name, value in own if name not in _TORCHS and not isinstance(value, Tensor))


_TORCHS = frozenset(vars(nn.Module())) - {"training"} | {"_flat_weights"}
"""What every module has; the state that a graph depends on is in the key anyway."""


def _told(value: Any) -> str:
    """Returns plain values and containers of them as text, functions by name, and of anything else the class."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.Size):
        return repr(value)
    if isinstance(value, list | tuple | set | frozenset):
        inner = [_told(v) for v in value]
        return f"{_name(type(value))}[{', '.join(sorted(inner) if isinstance(value, set | frozenset) else inner)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_told(k)}: {_told(v)}" for k, v in value.items()) + "}"
    if inspect.isroutine(value) or isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return _name(type(value))


def _sources(classes: set[type]) -> list[list[str]] | None:
    """Returns name and digest of the source files of all classes; None where one has none."""
    found: dict[str, str] = {}
    for kind in classes - {object, nn.Module}:
        name = kind.__module__
        if name in ("builtins", "abc", "typing"):
            continue
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is None or name == "__main__":
            return None
        try:
            found.setdefault(name, hashlib.sha256(Path(file).read_bytes()).hexdigest())
        except OSError:
            return None
    return [[name, found[name]] for name in sorted(found)]


@cache
def _own_sources() -> str:
    """Returns a digest of this package's own files: a trace is made by all of them."""
    total = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


# --- the file -----------------------------------------------------------------------------------------------------


def write_trace(path: Path, network: Network) -> None:
    """Writes what cannot be worked out again without the graph; the file is whole or not there."""
    arrays = _Arrays()
    told = [arrays.encode(t) for t in network.told]
    content = {
        "record": arrays.encode(network.record),
        "broken": network.broken,
        "notes": list(network.notes),
        "told": told,
        "checked": [arrays.encode(width) for width in network.checked],
        "pruning": network.pruning,
    }
    numbers, places = arrays.joined()
    content["arrays"] = places
    text = json.dumps(content)
    metadata = {"schema": str(SCHEMA), "trace": text, "digest": _digest(text, numbers)}
    save_state({"numbers": numbers}, path, metadata)


def _digest(text: str, numbers: Tensor) -> str:
    return hashlib.sha256(text.encode() + numbers.numpy().tobytes()).hexdigest()


def read_trace(path: Path, model: nn.Module, example: Tensor) -> Network:
    """Returns the trace that `write_trace` wrote, for `model`, once it has been verified on it.

    Raises:
        CheckpointError: The file is damaged or of another version, or does not fit the model.
    """
    metadata, state = read_metadata(path), read_state(path)
    if metadata.get("schema") != str(SCHEMA):
        raise CheckpointError(f"{path} has the schema {metadata.get('schema')}, expected {SCHEMA}")
    if "numbers" not in state or metadata.get("digest") != _digest(metadata.get("trace", ""), state["numbers"]):
        raise CheckpointError(f"{path} is damaged")
    try:
        content = json.loads(metadata["trace"])
        decode = _decoder(state["numbers"].numpy(), content["arrays"])
        record, broken, pruning = decode(content["record"]), dict(content["broken"]), str(content["pruning"])
        told, notes = tuple(decode(t) for t in content["told"]), tuple(content["notes"])
        checked = tuple(decode(width) for width in content["checked"])
        network = _network(prunable(model), example, record, broken=broken, pruning=pruning)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} does not hold a trace: {type(error).__name__}: {error}") from error
    network = replace(network, notes=notes, told=told, checked=checked)
    if told:
        dense = told_numbers(network, np.ones(sum(group.size for group in network.groups), dtype=bool))
        network = replace(network, model=tell(deep_copy(network.model), dense))
    if network.masked:
        sound = count_macs(network.model, network.example_inputs) == assemble(record, {}).cost_model.dense()["macs"]
    else:
        sound = verified(network) is network
    if not sound:
        raise CheckpointError(f"{path} does not fit the model any more")
    return network


def _network(model: nn.Module, example: Tensor, record: Any, *, broken: dict[str, str], pruning: str) -> Network:
    """Returns the network that a record describes.

    Raises:
        TypeError: It is no record.
    """
    if not isinstance(record, Record):
        raise TypeError(f"a {type(record).__name__} is no record")
    assembly = assemble(record, broken)
    if pruning != CHANNEL:
        assembly = mask_assembly(record, assembly.cost_model.dense(), pruning)
    return Network(model, (example,), record, assembly, broken, pruning=pruning)


class _Arrays:
    """Turns values into JSON, and collects the arrays in them, each once."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._found: list[np.ndarray] = []

    def encode(self, value: Any) -> Any:
        """Returns `value` as JSON values.

        Raises:
            TypeError: It holds something that a file may not.
        """
        if value is None or isinstance(value, bool | str | float):
            return value
        if isinstance(value, int | np.integer):
            return int(value)
        if isinstance(value, np.ndarray):
            if id(value) not in self._places:
                self._places[id(value)] = len(self._found)
                self._found.append(value)
            return {"array": self._places[id(value)]}
        if isinstance(value, tuple):
            return [self.encode(v) for v in value]
        if isinstance(value, dict):
            return {"pairs": [[self.encode(k), self.encode(v)] for k, v in value.items()]}
        if is_dataclass(value) and type(value).__name__ in _KINDS:
            own = [self.encode(getattr(value, field.name)) for field in fields(value)]
            return {type(value).__name__: own}
        raise TypeError(f"a trace cannot hold {type(value).__name__}")

    def joined(self) -> tuple[Tensor, list[list[int]]]:
        """Returns all numbers in one tensor, and the shape of each array, in their order."""
        parts = [array.astype(np.int64).reshape(-1) for array in self._found]
        numbers = np.concatenate(parts) if parts else np.empty(0, np.int64)
        return torch.from_numpy(numbers), [list(array.shape) for array in self._found]


def _decoder(numbers: np.ndarray, shapes: list[list[int]]) -> Callable[[Any], Any]:
    """Returns what turns the JSON values of `_Arrays` back into values.

    Raises:
        ValueError: There are fewer or more numbers than the arrays have elements.
    """
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes]).tolist()
    if (ends[-1] if ends else 0) != len(numbers):
        raise ValueError(f"{len(numbers)} numbers where {ends[-1] if ends else 0} were written")
    arrays = [numbers[end - int(np.prod(shape)) : end].reshape(shape) for end, shape in zip(ends, shapes, strict=True)]

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(decode(v) for v in value)
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        if kind == "array":
            return arrays[inner]
        if kind == "pairs":
            return {decode(k): decode(v) for k, v in inner}
        return _KINDS[kind](*(decode(v) for v in inner))

    return decode
