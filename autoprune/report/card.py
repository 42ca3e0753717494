"""The model card that lies beside an exported model: what it is, how it compares, how it was made, how to load it.

Decides what the card says. Numbers and links come from whoever exports; what was not measured is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoprune.cost import COSTS, LATENCY
from autoprune.objective import ACCURACY, Objective
from autoprune.report import units
from autoprune.report.markdown import table, widths_markdown


@dataclass(frozen=True)
class ClassScores:
    """Dense and pruned on one split: accuracies as fractions, and rows of (class, samples, dense, pruned)."""

    split: str
    count: int
    dense: float
    pruned: float
    classes: Sequence[tuple[str, int, float, float]] = ()


@dataclass(frozen=True)
class Card:
    """What a model card tells.

    `document` is the `policy.json` beside the weights, `dense` the dense network's metrics. `latency` holds `device`,
    `batch`, `dtype`, `threads`, `dense_ms`, `dense_spread_ms`, `pruned_ms`, `pruned_spread_ms` where they were
    measured. `made` are short facts (search, versions, seed), `settings` the space as run, `files` what was exported.
    `objective` says what the metrics `*_accuracy` are.
    """

    title: str
    document: Mapping[str, Any]
    dense: Mapping[str, float]
    files: Sequence[str]
    latency: Mapping[str, Any] | None = None
    scores: Sequence[ClassScores] = ()
    made: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = None
    objective: Objective = ACCURACY


def card_markdown(card: Card) -> str:
    """Returns the model card as Markdown."""
    document = card.document
    groups = (document.get("policy") or {}).get("groups", {})
    sizes = {name: round(document["result"]["widths"][name] / (1 - g["ratio"])) for name, g in groups.items()}
    criteria = {name: str(group["criterion"]) for name, group in groups.items()}
    parts = [f"# {card.title}", _summary(card), "## Dense and pruned", _numbers(card)]
    for scores in card.scores:
        parts += [f"## By class, {scores.split} ({scores.count} samples)", _classes(card.objective, scores)]
    parts += ["## What was removed", widths_markdown(sizes, document["result"]["widths"], criteria)]
    parts += ["## How it was made", table(["", ""], [[name, value] for name, value in card.made.items()])]
    if card.settings is not None:
        parts += ["The space as run:", f"```json\n{json.dumps(dict(card.settings), indent=1)}\n```"]
    parts += ["## How to load it", _loading(card)]
    return "\n\n".join(parts) + "\n"


def _summary(card: Card) -> str:
    result, dense = card.document["result"], card.document["dense_costs"]
    shares = [f"{units.share(card.document['costs'][c] / dense[c])} of the {units.LABELS[c]}" for c in COSTS[:2]]
    own, value = card.objective, card.objective.text(result["metrics"]["val_accuracy"], 2)
    return f"A structurally pruned network with {' and '.join(shares)}, at {value} {own.long('val')}{own.hint}."


def _numbers(card: Card) -> str:
    metrics, costs, dense = card.document["result"]["metrics"], card.document["costs"], card.document["dense_costs"]
    rows, own = [], card.objective
    for split in ("val", "test"):
        key = f"{split}_accuracy"
        if key in metrics:
            before = card.dense.get(key, math.nan)
            change = own.difference(metrics[key], before) if math.isfinite(before) else "–"
            rows.append([f"{own.label(split)}{own.hint}", own.text(before, 2), own.text(metrics[key], 2), change])
    for cost in (*COSTS, *([LATENCY] if LATENCY in costs else [])):
        values = [units.cost(cost, n) for n in (dense[cost], costs[cost])]
        rows.append([units.AXES[cost], *values, f"{units.share(costs[cost] / dense[cost])} of dense"])
    text = table(["", "dense", "pruned", "change"], rows)
    if card.latency is None:
        return text
    times = card.latency
    both = [f"{units.milliseconds(times[f'{n}_ms'])} (IQR {times[f'{n}_spread_ms']:.2g})" for n in ("dense", "pruned")]
    factor = f"{times['dense_ms'] / times['pruned_ms']:.2f} times as fast"
    text += "\n" + table(["", "", "", ""], [["measured latency", *both, factor]]).splitlines()[2]
    threads = f" with {times['threads']} thread{'s' if times['threads'] > 1 else ''}"
    how = f"batch {times['batch']}, {times['dtype']}, on {times['device']}{threads if times['device'] == 'cpu' else ''}"
    return f"{text}\n\nLatency: median of repeated passes, {how}."


def _classes(own: Objective, scores: ClassScores) -> str:
    rows = [["**all**", str(scores.count), *_accuracies(own, scores.dense, scores.pruned)]]
    rows += [[name, str(count), *_accuracies(ACCURACY, dense, pruned)] for name, count, dense, pruned in scores.classes]
    return table(["class", "samples", "dense", "pruned", "change"], rows)


def _accuracies(own: Objective, dense: float, pruned: float) -> list[str]:
    known = math.isfinite(pruned - dense)
    change = own.change(pruned - dense, near=max(dense, pruned, key=abs)) if known else "–"
    return [own.text(dense), own.text(pruned), change]


def _loading(card: Card) -> str:
    shape = ", ".join(map(str, card.document["input_shape"]))
    origin = card.document.get("origin") or {}
    known = bool(origin.get("name") or origin.get("factory"))
    call = "autoprune.load(folder)" if known else "autoprune.load(folder, factory)  # factory builds the dense model"
    ways = {
        "model.safetensors": f"import autoprune\n\nmodel = {call}  # an ordinary nn.Module in eval mode",
        "model.pt2": 'import torch\n\nmodel = torch.export.load("model.pt2").module()  # needs no autoprune',
        "model.onnx": 'import onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")\n'
        '(output,) = session.run(None, {"input": samples})',
    }
    blocks = [f"```python\n{code}\n```" for name, code in ways.items() if name in card.files]
    inputs = f"Input: float32, shape `(N, {shape})`, prepared as in training."
    classes = [str(name) for name in origin.get("classes") or ()]
    names = f" Classes, in order: {', '.join(classes)}." if 0 < len(classes) <= 100 else ""
    return "\n\n".join([inputs + names, *blocks])
