"""Exports: a pruned model as state dict, `torch.export` program or ONNX file, each checked after writing.

Decides the formats and what is checked: the same output as the model, and as many parameters in the file as were
counted.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError, InputError, MissingExtraError, nearest
from autoprune.network.artifacts import DOCUMENT, WEIGHTS, load, read_document
from autoprune.network.checkpoints import read_state, write_whole
from autoprune.network.complexity import count_params
from autoprune.network.trace import evaluating

TOLERANCE = 1e-4
"""Largest difference between the model and what was exported, relative to the largest output."""


def export_safetensors(folder: Path, model: nn.Module, example: Tensor, target: Path) -> list[Path]:
    """Copies weights and policy; `autoprune.load` reads them back.

    Raises:
        AutopruneError: What was written does not give the model's output.
    """
    target.mkdir(parents=True, exist_ok=True)
    paths = [target / WEIGHTS, target / DOCUMENT]
    for path in paths:
        write_whole(path, (folder / path.name).read_bytes())
    with evaluating(model):
        x = _sample(example, 3)
        _compare(paths[0], _output(load_like(model, target), x), _output(model, x))
    return paths


def export_pt2(folder: Path, model: nn.Module, example: Tensor, target: Path) -> list[Path]:
    """Writes a `torch.export` program with a dynamic batch; `torch.export.load` reads it.

    Raises:
        AutopruneError: What was written does not give the model's output.
    """
    target.mkdir(parents=True, exist_ok=True)
    path = target / "model.pt2"
    batch = torch.export.Dim("batch", min=1)
    with evaluating(model), torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=False)
    temporary = path.with_name(".model.tmp.pt2")
    torch.export.save(program, temporary)
    os.replace(temporary, path)
    loaded = torch.export.load(path).module()
    for size in (1, 3):
        x = _sample(example, size)
        _compare(path, loaded(x), _output(model, x))
    _count(path, sum(p.numel() for p in loaded.parameters()), model)
    return [path]


def export_onnx(folder: Path, model: nn.Module, example: Tensor, target: Path) -> list[Path]:
    """Writes an ONNX file with a dynamic batch, checked with onnxruntime.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        AutopruneError: What was written does not give the model's output.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  the exporter needs it and says so only half-way
    except ImportError as error:
        raise MissingExtraError(f"FORMAT=onnx needs {error.name}: pip install 'autoprune[onnx]'") from error
    target.mkdir(parents=True, exist_ok=True)
    path = target / "model.onnx"
    batch = torch.export.Dim("batch", min=1)
    temporary = path.with_name(".model.tmp.onnx")
    with evaluating(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            model,
            (example,),
            str(temporary),
            dynamo=True,
            dynamic_shapes=({0: batch},),
            input_names=["input"],
            output_names=["output"],
            external_data=False,
            verbose=False,
        )
    os.replace(temporary, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for size in (1, 3):
        x = _sample(example, size)
        (found,) = session.run(None, {"input": x.numpy()})
        _compare(path, torch.from_numpy(found), _output(model, x))
    graph = onnx.load(str(path)).graph
    stored = sum(_elements(t.dims) for t in graph.initializer)
    if stored > count_params(model) + sum(b.numel() for b in model.buffers()) + 1000:
        raise AutopruneError(f"{path} holds {stored:,} numbers, the model only {count_params(model):,} parameters")
    return [path]


def load_like(model: nn.Module, folder: Path) -> nn.Module:
    """Returns a copy of `model` with the weights that were written to `folder`."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(read_state(folder / WEIGHTS))
    return twin


def _elements(dims: object) -> int:
    total = 1
    for n in dims:  # type: ignore[attr-defined]
        total *= n
    return total


def _sample(example: Tensor, batch: int) -> Tensor:
    return torch.randn(batch, *example.shape[1:], generator=torch.Generator().manual_seed(batch))


def _output(model: nn.Module, x: Tensor) -> Tensor:
    with evaluating(model), torch.no_grad():
        output = model(x)
    if not isinstance(output, Tensor):
        raise InputError(f"the model returns {type(output).__name__}; a single tensor can be exported")
    return output


def _compare(path: Path, found: Tensor, expected: Tensor) -> None:
    difference = float((found.detach() - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
    if not difference <= TOLERANCE:
        raise AutopruneError(f"{path} does not give the model's output (relative difference {difference:.1e})")


def _count(path: Path, stored: int, model: nn.Module) -> None:
    if stored != count_params(model):
        raise AutopruneError(f"{path} holds {stored:,} parameters, the model {count_params(model):,}")


def _count_zeros(folder: Path, model: nn.Module, document: Mapping[str, Any]) -> None:
    """Checks that each masked weight holds as many non-zeros as the model's document counts."""
    for entry in document.get("sparsity", {}).values():
        stored = int(torch.count_nonzero(model.get_parameter(entry["parameter"])))
        if stored != entry["nonzero"]:
            raise AutopruneError(
                f"{entry['parameter']} in {folder} has {stored:,} non-zeros, its document says {entry['nonzero']:,}"
            )


FORMATS: dict[str, Callable[[Path, nn.Module, Tensor, Path], list[Path]]] = {
    "safetensors": export_safetensors,
    "pt2": export_pt2,
    "onnx": export_onnx,
}


def export(folder: Path, target: Path, *, format: str, factory: Callable[[], nn.Module] | None = None) -> list[Path]:
    """Writes the pruned model saved in `folder` to the folder `target`; returns the files.

    Raises:
        InputError: The format is unknown, or the model cannot be exported.
        CheckpointError: `folder` holds no usable model.
        AutopruneError: What was written does not give the model's output.
    """
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}{nearest(format, FORMATS)}")
    model, document = load(folder, factory), read_document(folder)
    _count_zeros(folder, model, document)
    example = torch.zeros(2, *document["input_shape"])
    return FORMATS[format](folder, model, example, target)
