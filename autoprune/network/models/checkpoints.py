"""Weights on disk.

Decides which checkpoint files are read, how their names are brought to the model's, and how a state dict is written
whole or not at all. Must not know what the weights are for. No pickle is ever executed.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from autoprune.errors import CheckpointError
from autoprune.files import write_whole

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_COUNTER = "num_batches_tracked"
_SHOWN = 8


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Loads a checkpoint into `model`, in place; a model that does not fit is left as it was.

    Reads `.safetensors`, and anything else as a state dict that `torch.load(weights_only=True)` accepts, alone or under
    `state_dict`, `model_state_dict` or `model`. The prefixes of `DataParallel` and `torch.compile` are taken off. The
    counters `num_batches_tracked`, which old checkpoints lack, may be missing.

    Raises:
        CheckpointError: There is no such file; it cannot be read; it holds no state dict; names or shapes differ; a
            number is not finite.
    """
    path = Path(path)
    state = read_state(path)
    expected = model.state_dict()
    state = _strip_prefixes(state, expected)
    optional = {name for name in expected if name.endswith(_COUNTER)}
    missing = [name for name in expected if name not in state and name not in optional]
    unexpected = sorted(
        (name for name in state if name not in expected), key=lambda name: (name.endswith(_COUNTER), name)
    )
    differing = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if missing or unexpected or differing:
        faults = [("missing", missing), ("unexpected", unexpected), ("of another shape", differing)]
        raise CheckpointError(
            "\n".join(
                [f"the checkpoint {path} does not fit the model:", *(_fault(*fault) for fault in faults if fault[1])]
            )
        )
    for name, value in expected.items():
        if name in state:
            _check_numbers(name, state[name], value, path)
    model.load_state_dict({**{name: expected[name] for name in optional}, **state}, strict=True)


def _check_numbers(name: str, value: Tensor, expected: Tensor, path: Path) -> None:
    """Refuses weights that no trained model has: of another kind than the model's, or not finite."""
    if expected.is_floating_point() and not value.is_floating_point():
        kind = str(value.dtype).removeprefix("torch.")
        raise CheckpointError(f"the checkpoint {path} holds {kind} numbers in {name}, where the model has real ones")
    if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
        raise CheckpointError(f"the checkpoint {path} holds NaN or infinity in {name}: its training diverged")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint file by name, on the CPU.

    Raises:
        CheckpointError: There is no such file; it cannot be read; it holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"the checkpoint {path} is not a safetensors file that can be read: {error}"
            ) from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"the checkpoint {path} holds more than tensors, or no pickle at all, and is not opened because "
            "unpickling it could run code: save the model's state_dict() instead"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = "it is cut off" if isinstance(error, EOFError) else str(error).partition(". ")[0]
        if isinstance(error, KeyError):
            reason = "it is no file that torch.save has written"
        raise CheckpointError(f"the checkpoint {path} cannot be read: {reason}") from error
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        kind = f"a mapping with the keys {list(found)[:_SHOWN]}" if isinstance(found, Mapping) else type(found).__name__
        raise CheckpointError(f"the checkpoint {path} holds no state dict but {kind}")
    return {str(name): value for name, value in found.items()}


def read_metadata(path: str | Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file.

    Raises:
        CheckpointError: There is no such file, or it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint at {path}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the checkpoint {path} is not a safetensors file that can be read: {error}") from error


def save_state(
    model_or_state: nn.Module | Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a model's state dict, or the tensors of a mapping, as safetensors: the file is whole or not there.

    Tensors that share memory are written once each. Folders are made where they are missing.
    """
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    # Bytes, not save_file: that one makes files which only their owner may read.
    write_whole(Path(path), save(tensors, metadata=dict(metadata or {})))


def file_digest(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        CheckpointError: There is no such file.
    """
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint at {path}") from error


def _strip_prefixes(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Takes off wrappers' prefixes that every name carries and the model's own names do not."""
    while True:
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in expected):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
                break
        else:
            return state


def _fault(kind: str, names: Sequence[str]) -> str:
    rest = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"  {len(names)} {kind}: {', '.join(names[:_SHOWN])}{rest}"
