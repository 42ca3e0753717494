"""The table of the coverage run: totals on top, a line a model, and what fails with its reason.

Decides how rows read. Knows nothing of how they came about.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

HALF = 0.52
"""A network that keeps more of its MACs than this was not halved: too much of it is frozen."""
EQUAL = 1e-4
HEADER = (
    "| model | px | params | groups | frozen | MACs kept | masked twin | costs | reload | ONNX | CPU s | MiB "
    "| Torch-Pruning | its MACs | what stays, and why |"
)


def environment() -> dict[str, str]:
    """Returns versions and hardware."""
    packages = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime")
    versions = {name: importlib.metadata.version(name) for name in packages}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread a process, no GPU"
    return {"python": platform.python_version(), **versions, "torch-pruning": "1.6.1", "machine": machine}


def render(document: Mapping[str, Any], wanted: int) -> str:
    """Returns the table as Markdown."""
    rows: Mapping[str, Mapping[str, Any]] = document["rows"]
    told = ", ".join(f"{name} {version}" for name, version in document["environment"].items())
    lines = [
        "# Coverage",
        "",
        f"{len(rows)} of {wanted} models of `coverage_models.txt`, random weights: `make coverage` reproduces this."
        f" {told}.",
        "",
        "Each model is pruned at one common ratio to half of its MACs (channels drawn at random), run, and compared"
        " with its masked twin in float32 (relative error of the output at most 1e-4). Where a normalisation averages"
        " over pruned channels there is no exact twin for them: the other groups are compared alone and the model is"
        " marked ≈."
        " Costs: MACs as `torch.utils.flop_counter` counts them, parameters and bytes all equal the prediction. Reload:"
        " saved, loaded, same output. ONNX: the pruned network in onnxruntime at batch 1 and 3, within 1e-4."
        " Torch-Pruning: magnitude pruner at ratio 0.3, classifier left out, attention heads given.",
        "",
        *_totals(rows),
    ]
    for library in dict.fromkeys(key.split("/")[0] for key in rows):
        mine = {key: row for key, row in rows.items() if key.startswith(f"{library}/")}
        lines += ["", f"## {library}", "", HEADER, "|---" * (HEADER.count("|") - 1) + "|"]
        lines += [_line(key.split("/")[1], row) for key, row in sorted(mine.items())]
    return "\n".join(lines) + "\n"


def _totals(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    libraries = list(dict.fromkeys(key.split("/")[0] for key in rows))
    checks: dict[str, Callable[[Mapping[str, Any]], bool]] = {
        "models": lambda r: True,
        "exported and pruned": lambda r: bool(_ours(r).get("runs")),
        "halved: at most 52 % of the MACs, and it runs": lambda r: _halved(_ours(r)),
        "equal to the masked twin": lambda r: bool(_ours(r).get("runs")) and _twin(_ours(r)) and not _approximate(r),
        "≈: exact groups equal, the others change a norm": lambda r: _approximate(r) and _twin(_ours(r)),
        "MACs, parameters, bytes exact": lambda r: bool(_ours(r).get("costs_exact")),
        "reload equal": lambda r: _ours(r).get("reload", 1) <= 1e-5,
        "ONNX equal": lambda r: _ours(r).get("onnx") == "equal",
        "ONNX not tried": lambda r: bool(_ours(r).get("runs")) and "onnx" not in _ours(r),
        "Torch-Pruning: tried": lambda r: bool(_peer(r)),
        "Torch-Pruning: runs": lambda r: bool(_peer(r).get("runs")),
        "Torch-Pruning: runs, at most 60 % of the MACs": lambda r: (
            _peer(r).get("macs_kept", 1) <= 0.6 and bool(_peer(r).get("runs"))
        ),
    }
    lines = ["| | " + " | ".join(libraries) + " |", "|---" * (len(libraries) + 1) + "|"]
    for title, check in checks.items():
        counts = [sum(check(r) for k, r in rows.items() if k.startswith(f"{name}/")) for name in libraries]
        lines.append(f"| {title} | " + " | ".join(map(str, counts)) + " |")
    return lines


def _ours(row: Mapping[str, Any]) -> Mapping[str, Any]:
    ours: Mapping[str, Any] = row.get("autoprune", {})
    return ours


def _peer(row: Mapping[str, Any]) -> Mapping[str, Any]:
    peer: Mapping[str, Any] = row.get("torch_pruning", {})
    return peer


def _halved(ours: Mapping[str, Any]) -> bool:
    return bool(ours.get("runs")) and ours.get("macs_kept", 1) <= HALF


def _approximate(row: Mapping[str, Any]) -> bool:
    return "approximate" in _ours(row)


def _twin(ours: Mapping[str, Any]) -> bool:
    error = ours.get("twin")
    return "twin" in ours and (error is None or error <= EQUAL)


def _line(name: str, row: Mapping[str, Any]) -> str:
    ours, peer = _ours(row), _peer(row)
    twin = ours.get("twin")
    mark = "≈ " if _approximate(row) else ""
    onnx = ours.get("onnx", "")
    cells = [
        name,
        row["pixels"],
        f"{ours['params'] / 1e6:.1f}M" if "params" in ours else "",
        ours.get("groups", "–"),
        ours.get("frozen", "–"),
        f"{ours['macs_kept']:.2f}" if "macs_kept" in ours else "–",
        f"{mark}{twin:.0e}" if twin is not None else mark or "–",
        {True: "exact", False: "WRONG"}.get(ours.get("costs_exact"), "–"),
        {True: "equal", False: "DIFFERS"}[ours["reload"] <= 1e-5] if "reload" in ours else "–",
        onnx if onnx in ("", "equal") else "fails",
        ours.get("seconds", ""),
        ours.get("peak_mib", ""),
        "runs" if peer.get("runs") else ("fails" if peer else ""),
        f"{peer['macs_kept']:.2f}" if "macs_kept" in peer else "",
        _why(ours, peer),
    ]
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def _why(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> str:
    parts = [f"**{ours['failure']}**"] if ours.get("failure") else []
    reasons = {k: v for k, v in ours.get("reasons", {}).items() if k != "the model's output"}
    parts += [f"{count} x {reason}" for reason, count in list(reasons.items())[:3]]
    if len(reasons) > 3:
        parts.append(f"{sum(list(reasons.values())[3:])} x other reasons")
    if ours.get("approximate"):
        parts.append(f"≈ {ours['approximate_groups']} groups: {ours['approximate']}")
    if ours.get("onnx", "equal") != "equal":
        parts.append(f"ONNX: {ours['onnx'][:120]}")
    if peer.get("failure"):
        parts.append(f"Torch-Pruning: {peer['failure'][:100]}")
    return "; ".join(parts)
