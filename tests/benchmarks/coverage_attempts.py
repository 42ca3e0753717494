"""What is tried on one model: pruned by autoprune and checked in every way, pruned by Torch-Pruning and run.

Decides how a model is built, pruned to half of its MACs and judged. Each step is written down before it begins, so that
a crash tells where it happened. Knows nothing of lists, processes or tables.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.network.artifacts.export import Inputs, export_onnx
from autoprune.network.artifacts.saved import model_document, save_model, shrink_to
from autoprune.network.graph.network import Network
from autoprune.network.models.building import build_model
from autoprune.network.models.torchvision import import_torchvision
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.selection import Selection
from autoprune.network.surgery.twin import masked_twin, relative_error
from autoprune.network.tracing.counting import count_bytes, count_macs, count_params
from autoprune.network.tracing.trace import trace
from autoprune.policy import Group, feasible_widths

if TYPE_CHECKING:
    from coverage import Model

import_torchvision()
import timm  # noqa: E402  it imports torchvision

Write = Callable[..., None]
CLASSES = 1000
PEER_RATIO = 0.3
"""Uniform ratio for Torch-Pruning: 0.7 of the inputs times 0.7 of the outputs is about half of the MACs."""


def build(model: Model) -> nn.Module:
    """Returns the model with random weights, and norms and biases in which a mistake would show."""
    torch.manual_seed(0)
    if model.library == "timm":
        network = timm.create_model(model.name, num_classes=CLASSES)
    else:
        network = build_model(name=model.name, num_classes=CLASSES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 1 and name == "bias":
                    parameter.normal_(0, 0.1, generator=generator)
                elif parameter.ndim == 1 and parameter.numel() > 1:
                    # Norm scales, layer scales (some start at 1e-6 and would hide a whole branch), skip gains.
                    parameter.uniform_(0.5, 1.5, generator=generator)
                elif parameter.ndim <= 1 and not parameter.any():
                    parameter.fill_(0.5)
                elif not parameter.any():
                    parameter.normal_(0, 0.02, generator=generator)
    return network.eval()


def sample(model: Model) -> Tensor:
    """Returns two random images."""
    return torch.randn(2, 3, model.pixels, model.pixels, generator=torch.Generator().manual_seed(0))


def halve(network: Network) -> Selection:
    """Returns a random selection at the common ratio that keeps about half of the MACs (the ratio ends at 0.9)."""
    groups = [Group(g.name, g.size, feasible_widths(g.size)) for g in network.groups]
    dense = network.cost_model.dense()["macs"]
    low, high = 0.0, 0.9
    for _ in range(12):
        middle = (low + high) / 2
        cost = network.cost_model.cost("macs", {g.name: g.width(middle) for g in groups})
        low, high = (middle, high) if cost > dense / 2 else (low, middle)
    rng = np.random.default_rng(1)
    return {g.name: np.sort(rng.choice(g.size, g.width(high), replace=False)) for g in groups if g.width(high) < g.size}


def autoprune(model: Model, options: dict[str, Any], write: Write) -> None:
    """Trace, prune to half of the MACs, run, compare with the masked twin, count, save and load, export to ONNX."""
    _quiet()
    write(step="building")
    dense, x = build(model), sample(model)
    write(step="tracing", params=sum(p.numel() for p in dense.parameters()))
    try:
        network = trace(dense, x)
    except AutopruneError as error:
        text = str(error)
        write(exported="cannot be exported" not in text, failure=_short(text, dense))
        return
    write(exported=True, groups=len(network.groups), frozen=len(network.frozen), reasons=_reasons(network))
    write(step="pruning", notes=list(network.notes), broken=len(network.broken))
    selection = halve(network)
    small = cut(network, selection).eval()
    costs = network.cost_model.costs({name: len(kept) for name, kept in selection.items()})
    kept = costs["macs"] / network.cost_model.dense()["macs"]
    with torch.no_grad():
        output = small(x)
        write(step="comparing with the twin", runs=True, macs_kept=round(kept, 4))
        error = relative_error(output, masked_twin(network, selection).eval()(x))
        approximate = [g.approximate for g in network.groups if g.approximate]
        if approximate and error > 1e-4:
            sound = {g.name: selection[g.name] for g in network.groups if not g.approximate and g.name in selection}
            rest = cut(network, sound).eval()(x) if sound else None
            twin = masked_twin(network, sound).eval()(x) if sound else None
            write(approximate=_general(approximate[0], network.model), approximate_groups=len(approximate))
            error = relative_error(rest, twin) if sound else None
    exact = (costs["macs"], costs["params"], costs["size_bytes"])
    counted = (count_macs(small, (x,)), count_params(small), count_bytes(small))
    write(step="saving and loading", twin=error, costs_exact=exact == counted)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        document = model_document(network, None, selection, {}, {})
        save_model(Path(folder) / "m", small, document)
        back = shrink_to(build(model), Path(folder) / "m", document).eval()
        write(step="exporting to ONNX", reload=relative_error(back(x), output))
    del back, network, dense
    if options["onnx"]:
        fault = _onnx_fault(small, x)
        if fault is not None and _onnx_fault(build(model), x) is not None:
            fault += " (and so does the dense model)"
        write(onnx=fault or "equal")
    write(step="done")


def _onnx_fault(model: nn.Module, x: Tensor) -> str | None:
    """Returns what is wrong with a model's ONNX export, or None where it gives the model's output."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            export_onnx(Path(folder), model, Inputs((tuple(x.shape[1:]),), (x.dtype,), (True,), (2,)), Path(folder))
        except Exception as error:  # whatever the exporter and the runtime raise is what the table tells
            return f"{type(error).__name__}: {_first_line(error)}".replace("\x1b[96m", "").replace("\x1b[0m", "")
    return None


def torch_pruning(model: Model, options: dict[str, Any], write: Write) -> None:
    """The same model through Torch-Pruning's magnitude pruner, as its examples call it; the classifier is left out."""
    _quiet()
    sys.path.append(options["peer"])
    import torch_pruning as tp

    write(step="building")
    network, x = build(model), sample(model)
    dense = count_macs(network, (x,))
    ignored = [
        m for m in network.modules() if CLASSES in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))
    ]
    heads = {}
    for module in network.modules():
        if isinstance(module, nn.MultiheadAttention):
            heads[module] = module.num_heads
        elif isinstance(getattr(module, "qkv", None), nn.Linear) and isinstance(
            getattr(module, "num_heads", None), int
        ):
            heads[module.qkv] = module.num_heads
    try:
        write(step="building its graph")
        pruner = tp.pruner.MagnitudePruner(
            network,
            x,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=PEER_RATIO,
            ignored_layers=ignored,
            num_heads=heads,
        )
        write(step="pruning")
        pruner.step()
        for module in network.modules():
            if getattr(module, "qkv", None) in heads:
                module.num_heads = pruner.num_heads[module.qkv]
                module.head_dim = module.qkv.out_features // (3 * module.num_heads)
        write(step="running")
        with torch.no_grad():
            runs = tuple(network(x).shape) == (2, CLASSES)
        write(step="done", runs=runs, macs_kept=round(count_macs(network, (x,)) / dense, 4))
    except Exception as error:  # whatever it raises is what the table tells
        write(runs=False, failure=f"{type(error).__name__}: {_first_line(error)}")


def _quiet() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:160]


def _short(text: str, model: nn.Module) -> str:
    lines = [_general(line.strip(), model) for line in text.splitlines()]
    return "; ".join(dict.fromkeys(lines))[:400]


def _reasons(network: Network) -> dict[str, int]:
    """Returns how many layers are frozen for each reason, module paths left out."""
    return dict(Counter(_general(f.reason, network.model) for f in network.frozen).most_common())


def _general(text: str, model: nn.Module) -> str:
    paths = {name for name, _ in model.named_modules() if "." in name or re.search(r"\d", name)}
    paths |= {name for name, _ in model.named_children()} | {name for name, _ in model.named_parameters()}
    words = [word if word.strip("():,") not in paths else "…" for word in text.split(" ")]
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", " ".join(words)) if "rror" in text else " ".join(words)
