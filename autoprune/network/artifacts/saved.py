"""Pruned models on disk: `model.safetensors` and `policy.json`, never a pickle, and how they come back.

Decides what is written beside the weights so that a pruned model can be rebuilt from its original class without
tracing: the kept channels, the depthwise layers whose `groups` follow, integer attributes such as the number of heads,
which attention modules were replaced by equivalent ones that may lose heads, and how the dense model was built. A
folder is written whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import CheckpointError, InputError
from autoprune.network.artifacts.layers import layer_table
from autoprune.network.graph.attributes import set_attributes
from autoprune.network.graph.network import Network
from autoprune.network.models.building import build_model
from autoprune.network.models.checkpoints import read_state, save_state
from autoprune.network.surgery.activations import replace_activations
from autoprune.network.surgery.attention import replace_attention, replaced
from autoprune.network.surgery.cut import attribute_values, uniform_norms
from autoprune.network.surgery.masks import masked, masked_layers, sparsities
from autoprune.network.surgery.refresh import refresh_attributes
from autoprune.network.surgery.selection import Selection, kept_indices, unit_mask
from autoprune.network.surgery.sizes import tell, told_numbers
from autoprune.network.surgery.stand_ins import settle
from autoprune.policy import Policy
from autoprune.space.code import check_code

SCHEMA = 1
WEIGHTS = "model.safetensors"
DOCUMENT = "policy.json"


def model_document(
    network: Network,
    policy: Policy | None,
    selection: Selection,
    result: Mapping[str, Any],
    origin: Mapping[str, Any],
    *,
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """Returns what `policy.json` says about a pruned model.

    Of a masked network the zeros of the weights tell which ones are kept; `sparsity` then counts what is not zero in
    each weight of `model` (None: as the selection says), and costs are non-zeros too.
    """
    dense = network.cost_model.dense()
    if network.masked:
        own: dict[str, Any] = {
            "pruning": network.pruning,
            "kept": {},
            "sparsity": sparsities(model if model is not None else masked(network, selection), network),
            "layers": masked_layers(network, selection),
        }
    else:
        kept = {name: [int(i) for i in kept] for name, kept in selection.items()}
        norms = uniform_norms(network, unit_mask(network, selection))
        own = {"kept": kept, "uniform_norms": norms, "layers": layer_table(network, selection)}
    return {
        **own,
        "schema": SCHEMA,
        "policy": policy.to_json() if policy is not None else None,
        "depthwise": sorted({links.module for links in network.links if links.layer.kind == "depthwise"}),
        "replaced": replaced(network.model),
        "attributes": attribute_values(network, unit_mask(network, selection)),
        "told": told_numbers(network, unit_mask(network, selection)),
        "buffers": _unsaved_buffers(network, selection),
        "origin": dict(origin),
        "input_shape": [int(n) for n in network.example_inputs[0].shape[1:]],
        "inputs": [_input_row(x, len(network.example_inputs[0])) for x in network.example_inputs],
        "dense_costs": dense,
        "costs": network.cost_model.costs({name: len(kept) for name, kept in selection.items()}),
        "result": {key: result[key] for key in ("metrics", "widths", "fidelity", "identity", "seed") if key in result},
    }


def _input_row(x: Tensor, batch: int) -> dict[str, Any]:
    """Returns what a document says of one input; `high` bounds whole numbers by what the example holds."""
    batched = x.ndim > 0 and x.shape[0] == batch
    row: dict[str, Any] = {
        "shape": [int(n) for n in (x.shape[1:] if batched else x.shape)],
        "dtype": str(x.dtype).removeprefix("torch."),
        "batched": batched,
    }
    if not x.is_floating_point() and x.dtype != torch.bool and x.numel():
        row["high"] = int(x.max()) + 1
    return row


def save_model(folder: Path, model: nn.Module, document: Mapping[str, Any]) -> Path:
    """Writes a pruned model's weights and document into `folder`, which is replaced as a whole."""
    with replace_folder(folder) as work:
        save_state(model, work / WEIGHTS, {"format": "pt", "autoprune_schema": str(SCHEMA)})
        (work / DOCUMENT).write_text(json.dumps(document, indent=1, allow_nan=True) + "\n", encoding="utf-8")
    return folder


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to write into, which takes the place of `folder` at the end; after an error it is gone."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    old = work.with_name(f"{work.name}.old")
    try:
        yield work
        os.chmod(work, 0o755)
        if folder.exists():  # moved as a whole: killed while deleting it, half of a model would be left
            os.replace(folder, old)
        os.replace(work, folder)
    finally:
        for left in (work, old):
            shutil.rmtree(left, ignore_errors=True)


def read_document(folder: Path) -> dict[str, Any]:
    """Returns the document of a saved model.

    Raises:
        CheckpointError: The folder holds none, or its schema is unknown.
    """
    path = folder / DOCUMENT
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no pruned model at {folder}: {DOCUMENT} is missing") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else None
        raise CheckpointError(f"{path} has the unknown schema {found!r}; this version reads schema {SCHEMA}")
    return document


def check_model(folder: Path, *, allow: bool) -> None:
    """Refuses a saved model that says it is built by code which may not be run; see `autoprune.space.code`.

    Raises:
        CheckpointError: The folder holds no model.
        InputError: Its code is not of the working directory, and `allow` is not set.
    """
    origin = read_document(folder).get("origin") or {}
    check_code(origin.get("factory"), allow=allow, what=f"{folder / DOCUMENT}: origin.factory")


def load(path: str | Path, factory: Callable[[], nn.Module] | None = None, *, allow_code: bool = False) -> nn.Module:
    """Returns a pruned model that was saved, as an instance of its original class, in eval mode.

    Args:
        path: The folder with `model.safetensors` and `policy.json`.
        factory: Builds the dense model. Not needed for models that were named in a space file (zoo, torchvision).
        allow_code: Whether a function that the document names may come from outside the working directory.

    Raises:
        CheckpointError: Files are missing or damaged, or do not belong to the model that `factory` builds.
        InputError: `factory` builds no module, or the document names code that is not of the working directory and
            `allow_code` is not set.
    """
    folder = Path(path)
    if folder.name in (WEIGHTS, DOCUMENT) and folder.is_file():
        folder = folder.parent
    document = read_document(folder)
    origin = document.get("origin") or {}
    if factory is not None:
        if isinstance(factory, nn.Module) or not callable(factory):
            raise InputError(f"factory is a function that builds the dense model, got {type(factory).__name__}")
        model = factory()
        if not isinstance(model, nn.Module):
            raise InputError(f"factory must return the dense torch.nn.Module, and returned {type(model).__name__}")
    elif origin.get("name") or origin.get("factory"):
        check_model(folder, allow=allow_code)
        model = build_model(
            name=origin.get("name"),
            factory=origin.get("factory"),
            arguments=origin.get("arguments"),
            num_classes=origin.get("num_classes"),
        )
    else:
        raise CheckpointError(f"{folder} does not say how its dense model is built: pass load(path, factory)")
    return shrink_to(model, folder, document).eval()


def shrink_to(model: nn.Module, folder: Path, document: Mapping[str, Any]) -> nn.Module:
    """Returns a dense `model` with the saved, smaller parameters, which it is given in place.

    Raises:
        CheckpointError: Names do not match, or a tensor is larger than the dense model's.
    """
    if document.get("replaced"):
        replace_attention(model)
    state = read_state(folder / WEIGHTS)
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    larger = [n for n in state.keys() & own.keys() if _larger(tuple(state[n].shape), tuple(own[n].shape))]
    if missing or unexpected or larger:
        lists = {"missing": missing, "unexpected": unexpected, "larger than dense": sorted(larger)}
        detail = "\n".join(f"  {len(names)} {kind}: {', '.join(names[:8])}" for kind, names in lists.items() if names)
        raise CheckpointError(f"{folder} does not belong to {type(model).__name__}:\n{detail}")
    dense = (document.get("dense_costs") or {}).get("params")
    found = sum(parameter.numel() for parameter in model.parameters())
    if dense is not None and dense != found:
        raise CheckpointError(
            f"{folder} was pruned from a {type(model).__name__} of {dense:,} parameters, and this one has {found:,}:"
            " build the dense model with the arguments that it had"
        )
    _cut_buffers(model, document.get("buffers", {}))
    depthwise = set(document.get("depthwise", ()))
    replaced: dict[int, nn.Parameter] = {}
    for module_path, module in model.named_modules():
        prefix = f"{module_path}." if module_path else ""
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in replaced:
                tensor = state[
                    prefix + name
                ]  # in the type in which it was saved, which may be another than the factory's
                replaced[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            module._parameters[name] = replaced[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and prefix + name in state:
                module._buffers[name] = state[prefix + name]
        refresh_attributes(module, depthwise=module_path in depthwise)
    set_attributes(model, document.get("attributes", {}))
    tell(model, document.get("told", {}))
    replace_activations(model, document.get("activations") or {})
    return settle(model, document.get("uniform_norms"))


def _unsaved_buffers(network: Network, selection: Selection) -> dict[str, dict[str, list[int]]]:
    """Returns what stays of the buffers that a state dict leaves out: name → dimension → indices."""
    kept, saved = unit_mask(network, selection), network.model.state_dict().keys()
    buffers = {name for name, _ in network.model.named_buffers(remove_duplicate=False)} - saved
    return {
        name: {str(dim): kept_indices(units, kept).tolist() for dim, units in dims.items()}
        for name, dims in network.index_map.items()
        if name in buffers
    }


def _cut_buffers(model: nn.Module, buffers: Mapping[str, Mapping[str, list[int]]]) -> None:
    for name, dims in buffers.items():
        path, _, own = name.rpartition(".")
        try:
            buffer = model.get_buffer(name)
        except AttributeError as error:
            raise CheckpointError(f"{type(model).__name__} has no buffer {name!r}") from error
        for dim, indices in dims.items():
            if max(indices) >= buffer.shape[int(dim)]:
                raise CheckpointError(f"the buffer {name!r} of {type(model).__name__} is smaller than the saved one's")
            buffer = buffer.index_select(int(dim), torch.tensor(indices, device=buffer.device))
        model.get_submodule(path)._buffers[own] = buffer


def _larger(saved: tuple[int, ...], dense: tuple[int, ...]) -> bool:
    return len(saved) != len(dense) or any(a > b for a, b in zip(saved, dense, strict=True))
