"""A value's large tensors and arrays apart from the rest, so that several processes can read one copy of them.

Decides what is large, and how the parts come together again. They lie in a file that every process of a machine maps
(what one of them writes is its own), or travel beside the rest in a store that hands them out read-only. Must not know
what the value is.
"""

from __future__ import annotations

import fcntl
import io
import os
import pickle
import warnings
from collections.abc import Collection, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Bytes = npt.NDArray[np.uint8]
LEAST = 1 << 14
"""Bytes from which a tensor or an array is kept apart."""
_ALIGNED = 64


@dataclass(frozen=True)
class Packed:
    """A value taken apart: `rest` is its pickle, `buffers` are the large parts, one `(bytes,)` array a storage."""

    rest: bytes
    buffers: tuple[Bytes, ...]

    def value(self) -> Any:
        """Puts the value together; its large parts are views of `buffers` where these may be written to."""
        return _Unpickler(self.rest, self.buffers).load()


def pack(value: Any, *, own: Collection[Tensor] = ()) -> Packed:
    """Takes `value` apart. `own` are tensors of which every process needs a copy to write to, such as a network's.

    Tensors on a GPU become tensors of the process's current GPU again.

    Raises:
        pickle.PicklingError: A part cannot be pickled.
        AttributeError: Likewise, such as a function within a function.
        TypeError: Likewise.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream, {id(tensor) for tensor in own})
    pickler.dump(value)
    return Packed(stream.getvalue(), tuple(pickler.buffers))


class SharedFile:
    """A packed value in a file of `folder`, which any process of this machine can map while this object is open.

    The file is locked for as long; one whose owner was killed is removed by the next owner.
    """

    def __init__(self, packed: Packed, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        self.path = folder / f"{_PREFIX}{os.getpid()}-{id(self):x}.bin"
        self._stream = self.path.open("wb")
        fcntl.flock(self._stream, fcntl.LOCK_EX)
        self.spans: list[tuple[int, int]] = []
        for buffer in packed.buffers:
            self._stream.write(b"\0" * (-self._stream.tell() % _ALIGNED))
            self.spans.append((self._stream.tell(), len(buffer)))
            self._stream.write(buffer.data)
        self._stream.flush()
        self.rest = packed.rest

    def close(self) -> None:
        """Removes the file; who has mapped it keeps what it mapped."""
        self.path.unlink(missing_ok=True)
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_PREFIX = "shared-"


def mapped(path: Path, spans: Sequence[tuple[int, int]], rest: bytes) -> Any:
    """Returns the value of a `SharedFile`; what is written to it is seen by this process alone.

    Raises:
        FileNotFoundError: Its owner has closed it.
    """
    if not spans:
        return Packed(rest, ()).value()
    whole = np.memmap(path, dtype=np.uint8, mode="c")
    return Packed(rest, tuple(np.asarray(whole[start : start + size]) for start, size in spans)).value()


def _sweep(folder: Path) -> None:
    """Removes the files of owners that were killed: nobody holds their lock."""
    for path in folder.glob(f"{_PREFIX}*.bin"):
        with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


class _Pickler(pickle.Pickler):
    """Pickles everything but large tensors and arrays, which it collects by the memory that they lie in.

    The same object is given the same number, so that it stays one object.
    """

    def __init__(self, stream: io.BytesIO, own: Collection[int]) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._own = own
        self._alive: dict[int, Any] = {}
        self._places: dict[Hashable, int] = {}
        self.buffers: list[Bytes] = []

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        """Returns what stands for a large tensor or array; None: `value` is pickled as it is."""
        if type(value) in (Tensor, nn.Parameter):
            return self._tensor(value)
        if type(value) is np.ndarray and value.nbytes >= LEAST and value.flags.c_contiguous and _plain(value.dtype):
            return (
                "array",
                self._number(value),
                self._place((value.ctypes.data, value.nbytes), value),
                value.dtype.str,
                value.shape,
            )
        return None

    def _tensor(self, value: Tensor) -> tuple[Any, ...] | None:
        plain = value.layout is torch.strided and not (value.is_quantized or value.is_conj() or value.is_neg())
        if not plain or value.grad_fn is not None or value.device.type not in ("cpu", "cuda"):
            return None
        storage = value.untyped_storage()
        if storage.nbytes() < LEAST and value.device.type == "cpu":
            return None
        flat = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
        place = self._place((str(value.device), storage.data_ptr(), storage.nbytes()), flat.cpu().numpy())
        view = (value.dtype, value.storage_offset(), tuple(value.shape), tuple(value.stride()))
        flags = (value.requires_grad, isinstance(value, nn.Parameter), value.device.type, id(value) in self._own)
        return ("tensor", self._number(value), place, view, flags)

    def _number(self, value: Any) -> int:
        self._alive[id(value)] = value  # so that no other object can have its id
        return id(value)

    def _place(self, memory: Hashable, data: npt.NDArray[Any]) -> int:
        if memory not in self._places:
            self._places[memory] = len(self.buffers)
            self.buffers.append(data.reshape(-1).view(np.uint8))
        return self._places[memory]


def _plain(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "biufc"


class _Unpickler(pickle.Unpickler):
    """Puts a value together again."""

    def __init__(self, rest: bytes, buffers: Sequence[Bytes]) -> None:
        super().__init__(io.BytesIO(rest))
        self._buffers = buffers
        self._made: dict[int, Any] = {}
        self._storages: dict[tuple[int, bool], torch.UntypedStorage] = {}

    def persistent_load(self, parts: Any) -> Any:
        """Returns the tensor or array that `parts` stand for."""
        kind, number, place, *rest = parts
        if number not in self._made:
            self._made[number] = self._tensor(place, *rest) if kind == "tensor" else self._array(place, *rest)
        return self._made[number]

    def _array(self, place: int, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        return self._buffers[place].view(dtype).reshape(shape)

    def _tensor(self, place: int, view: tuple[Any, ...], flags: tuple[bool, bool, str, bool]) -> Tensor:
        dtype, offset, shape, stride = view
        requires_grad, parameter, device, own = flags
        storage = self._storage(place, own=own)
        tensor = torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
        tensor = tensor.to(device)
        return nn.Parameter(tensor, requires_grad) if parameter else tensor.requires_grad_(requires_grad)

    def _storage(self, place: int, *, own: bool) -> torch.UntypedStorage:
        """Returns the memory of a buffer: itself, or a copy where it is `own` and may not be written to."""
        buffer = self._buffers[place]
        copied = own and not buffer.flags.writeable
        if (place, copied) not in self._storages:
            with warnings.catch_warnings():
                # What is no network's own is only read: samples, targets, scores, moments.
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                tensor = torch.from_numpy(buffer.copy() if copied else buffer)
            self._storages[place, copied] = tensor.untyped_storage()
        return self._storages[place, copied]
