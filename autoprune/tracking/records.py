"""What is written about a trial, as plain parameters, metrics and tags.

Decides every key that people see in MLflow and keeps keys and values within what MLflow accepts. Must not know mlflow:
it is arithmetic on results.
"""

from __future__ import annotations

import hashlib
import math
import posixpath
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from autoprune.cost import LATENCY
from autoprune.policy import Policy
from autoprune.results import TrialResult

SEARCH_TAG = "autoprune.search"
TRIAL_TAG = "autoprune.trial"
SCHEMA_TAG = "autoprune.schema"
KIND_TAG = "kind"
PARETO_TAG = "pareto"
COLOR_TAG = "mlflow.runColor"
FRONT_COLOR = "#c2185b"
PLAIN_COLOR = "#a9b4c2"
PICK_TAG = "pick"
NOTE_TAG = "mlflow.note.content"
NOTE_LIMIT = 5000
"""Characters of a description; an experiment's tag takes no more."""
_BEGIN, _END = "<!-- autoprune -->", "<!-- /autoprune -->"
MODEL_FOLDER = "model"
"""Where a run keeps its model."""
MODEL_FILES = (".safetensors", ".json", ".txt", ".md", ".yaml", ".onnx", ".pt2")
"""What a model's folder may hold: nothing that runs code when it is read."""

_SCHEMA = "1"
_KEY_LIMIT = 250
_PARAM_LIMIT = 6000
_TAG_LIMIT = 8000
FRACTIONS = {"macs": "macs_fraction", "params": "params_fraction", "size_bytes": "size_fraction"}
FRACTIONS |= {"activation_bytes": "activation_fraction", LATENCY: "latency_fraction"}

State = Literal["complete", "fail", "stopped"]


def trial_key(study: str, number: int) -> str:
    """Returns what tells one trial from all others: `<study>/<number>`."""
    return f"{study}/{number}"


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """Everything that is recorded about one trial.

    `study` and `number` are Optuna's (`digits-resnet20.tune`, 17). `dense` holds the costs of the unpruned network,
    which the fractions are relative to. `scopes` maps each group to its criterion scope; groups that it leaves out
    are scopes of their own. `result` is missing for a trial that failed, and `reason` says why. `started` and `ended`
    are seconds since the epoch; the record's own time where nobody knows. `name` is what the run is called; by default
    rung and number.
    """

    search: str
    study: str
    number: int
    rung: str
    policy: Policy
    result: TrialResult | None
    dense: Mapping[str, int]
    origin: str = ""
    state: State = "complete"
    reason: str = ""
    scopes: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    started: float | None = None
    ended: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.state == "complete" and self.result is None:
            raise ValueError(f"the complete trial {self.key} has no result")
        now = time.time()
        if self.ended is None:
            object.__setattr__(self, "ended", now)
        if self.started is None:
            spent = sum(self.result.seconds.values()) if self.result else 0.0
            object.__setattr__(self, "started", (self.ended or now) - spent)

    @property
    def key(self) -> str:
        """The tag by which the trial's run is found again."""
        return trial_key(self.study, self.number)

    @property
    def milliseconds(self) -> tuple[int, int]:
        """Start and end as MLflow wants them."""
        return int((self.started or 0.0) * 1000), int((self.ended or 0.0) * 1000)


def trial_params(record: TrialRecord) -> dict[str, str]:
    """Returns ratio and width of every group, the criterion of every scope and the activations that were chosen."""
    params: dict[str, str] = {}
    for group, choice in record.policy.choices.items():
        params[safe_key(f"ratio/{group}")] = f"{choice.ratio:.6g}"
        params[safe_key(f"criterion/{record.scopes.get(group, group)}")] = clip(choice.criterion, _PARAM_LIMIT)
    for place, kind in record.policy.activations.items():
        params[safe_key(f"activation/{place}")] = clip(kind, _PARAM_LIMIT)
    if record.result is not None:
        for group, width in record.result.widths.items():
            params[safe_key(f"width/{group}")] = str(width)
    return params


def trial_metrics(record: TrialRecord) -> dict[str, float]:
    """Returns scores, costs, costs as a fraction of dense, and seconds; what is infinite becomes NaN.

    MLflow would store an infinity as 1.8e308 and draw it.
    """
    result = record.result
    if result is None:
        return {}
    values: dict[str, float] = dict(result.metrics)
    if "val_accuracy" in values:
        values["val_error"] = result.val_error
    for name, cost in result.costs.items():
        if name != LATENCY:  # the metric `latency_predicted_ms` tells it
            values[name] = float(cost)
        if record.dense.get(name):
            values[FRACTIONS.get(name, f"{name}_fraction")] = cost / record.dense[name]
    values |= {f"seconds/{name}": spent for name, spent in result.seconds.items()}
    return {safe_key(name): finite(value) for name, value in values.items()}


def trial_curves(record: TrialRecord) -> dict[str, list[float]]:
    """Returns one series per epoch curve under `epoch/`, so that no curve hides a score of the same name."""
    if record.result is None:
        return {}
    return {safe_key(f"epoch/{name}"): [finite(v) for v in series] for name, series in record.result.curves.items()}


def trial_tags(record: TrialRecord) -> dict[str, str]:
    """Returns the tags that tie a trial to its search and tell what it is."""
    tags = {
        SEARCH_TAG: record.search,
        TRIAL_TAG: record.key,
        SCHEMA_TAG: _SCHEMA,
        KIND_TAG: "trial",
        PARETO_TAG: "false",
        COLOR_TAG: PLAIN_COLOR,
        "rung": record.rung,
        "origin": record.origin,
        "state": record.state,
        "policy": record.policy.id,
    }
    if record.reason:
        tags["reason"] = record.reason
    result = record.result
    if result is not None:
        tags |= {"identity": result.identity, "seed": str(result.seed), "device": result.device}
        tags["epochs"] = f"{result.fidelity.epochs:g}"
    return clean_tags({**record.tags, **tags})


def search_tags(search: str, tags: Mapping[str, str]) -> dict[str, str]:
    """Returns the tags of a search's own run."""
    return clean_tags({**tags, SEARCH_TAG: search, SCHEMA_TAG: _SCHEMA, KIND_TAG: "search"})


def clean_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Returns `tags` with keys and values that MLflow accepts."""
    return {safe_key(key): clip(str(value), _TAG_LIMIT) for key, value in tags.items()}


def clean_params(params: Mapping[str, object]) -> dict[str, str]:
    """Returns `params` as text, with keys and values that MLflow accepts."""
    return {safe_key(key): clip(str(value), _PARAM_LIMIT) for key, value in params.items()}


def clip(text: str, limit: int) -> str:
    """Returns `text`, cut to `limit` characters with a mark where something is missing."""
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def merged_note(old: str, ours: str) -> str:
    """Returns the description `old` with our part replaced by `ours`; what a person wrote before or after it stays.

    A description without our marks that is not empty is a person's own: ours is put below it.
    """
    before, begun, rest = old.partition(_BEGIN)
    _, ended, after = rest.partition(_END)
    if not begun or not ended:
        before, after = (f"{old.rstrip()}\n\n" if old.strip() else ""), ""
    room = NOTE_LIMIT - len(before) - len(after) - len(_BEGIN) - len(_END) - 4
    return f"{before}{_BEGIN}\n\n{clip(ours, max(room, 4))}\n{_END}{after}"


def finite(value: float) -> float:
    """Returns `value`, or NaN where it is infinite."""
    return float(value) if math.isfinite(value) else math.nan


def safe_key(name: str) -> str:
    """Returns `name` where MLflow accepts it as a key, else its nearest form with a short digest of `name`.

    MLflow takes ASCII letters, digits and `_-. :/`, at most 250 characters, and no path that another name would
    resolve to (`a//b`, `../a`). The digest keeps `a[0]` and `a(0)` apart.
    """
    key = re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name)
    key = posixpath.normpath("/".join(part for part in key.split("/") if part.strip(". "))) if key.strip("./ ") else "_"
    if key == name and len(key) <= _KEY_LIMIT:
        return key
    mark = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{key[: _KEY_LIMIT - 7]}-{mark}"
