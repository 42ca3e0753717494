"""What a search leaves with its studies: what explanations and reports need beside the trials, and its settings.

Decides what is kept (settings, groups, cost model, error curves, versions, sizes of the data) and how it is packed:
error curves at no more widths than a picture can show, with five digits.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoprune.coordinator.stored.setup import Setup
from autoprune.cost import CostModel, Form, Surface, Term
from autoprune.errors import StudyError
from autoprune.objective import ACCURACY, UNNAMED, Objective
from autoprune.policy import Group
from autoprune.prices import ErrorCurve
from autoprune.results import Problem

SCHEMA = 2
_POINTS = 129
"""Widths of a stored error curve, at most: a wide group's curve is smooth between them."""
_DIGITS = 5


@dataclass(frozen=True)
class Background:
    """What is known of a search beside its trials.

    `setup` holds the settings that the search was last run with. `samples` holds the number of samples of each split,
    `classes` their number of classes (0: none), `environment` versions and the like as readable pairs, `began` the
    time: both of the search's first call. `accuracy` tells whether what the search maximises is a fraction of samples,
    `objective` what it is called.
    """

    setup: Setup
    groups: tuple[Group, ...]
    model: CostModel
    curves: Mapping[str, Mapping[str, ErrorCurve]]
    samples: Mapping[str, int]
    classes: int
    accuracy: bool
    origin: str
    data: str
    device: str
    environment: Mapping[str, str] = field(default_factory=dict)
    began: datetime.datetime | None = None
    objective: Objective = ACCURACY


def pack(background: Background, *, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns `background` as plain JSON values.

    Dense costs and criterion scopes of the setup are left out: the cost model and the groups tell them.

    Args:
        background: What is packed.
        before: What the search's first call left, which keeps its time and versions.
    """
    model, setup = background.model, background.setup
    packed = {
        "schema": SCHEMA,
        "setup": {"space": dict(setup.space), "at_hand": setup.at_hand, "facts": dict(setup.facts)},
        "groups": [[g.name, g.size, list(g.widths), g.scope] for g in background.groups],
        "model": {
            "groups": list(model.groups),
            "sizes": list(model.sizes),
            "macs": _packed(model.macs),
            "params": _packed(model.params),
            "size_bytes": _packed(model.size_bytes),
            "live": [_packed(terms) for terms in model.live],
            "latency": [[_forms(s.forms), [list(knots) for knots in s.knots], list(s.values)] for s in model.latency],
        },
        "curves": {
            group: {name: [list(c.widths), list(c.errors)] for name, c in by.items()}
            for group, by in background.curves.items()
        },
        "samples": dict(background.samples),
        "classes": background.classes,
        "accuracy": background.accuracy,
        "objective": background.objective.to_json(),
        "origin": background.origin,
        "data": background.data,
        "device": background.device,
        "environment": dict(background.environment),
        "began": None if background.began is None else background.began.isoformat(timespec="seconds"),
    }
    if before is not None:
        packed |= {"environment": before["environment"], "began": before["began"]}
    return packed


def unpack(data: Mapping[str, Any]) -> Background:
    """Reads what `pack` returned.

    Raises:
        StudyError: The schema is unknown.
    """
    if data.get("schema") != SCHEMA:
        raise StudyError(
            f"the search's background has the schema {data.get('schema')!r}; this version reads schema {SCHEMA}: run"
            " the same search again, which repeats nothing and stores it anew"
        )
    model = _model(data["model"])
    unknown = ACCURACY if data["accuracy"] else Objective(UNNAMED, percent=False)  # an earlier version stored none
    groups = tuple(Group(name, size, tuple(widths), scope) for name, size, widths, scope in data["groups"])
    return Background(
        setup=Setup(**data["setup"], dense=model.dense(), scopes={group.name: group.scope for group in groups}),
        groups=groups,
        model=model,
        curves={
            group: {name: ErrorCurve(tuple(widths), tuple(errors)) for name, (widths, errors) in by.items()}
            for group, by in data["curves"].items()
        },
        samples=data["samples"],
        classes=data["classes"],
        accuracy=data["accuracy"],
        origin=data["origin"],
        data=data["data"],
        device=data["device"],
        environment=data["environment"],
        began=None if data["began"] is None else datetime.datetime.fromisoformat(data["began"]),
        objective=Objective.from_json(data["objective"]) if "objective" in data else unknown,
    )


Table = Sequence[float] | Mapping[int, float]
"""Error by width: at each width from 0 to the group's size, or at those that the group may take."""


def curves_of(problem: Problem, tables: Mapping[str, Mapping[str, Table]]) -> dict[str, dict[str, ErrorCurve]]:
    """Returns the error curves of the groups that the search may prune, at their feasible widths and at full width.

    Args:
        problem: Groups and criteria.
        tables: Group → criterion → error by width.
    """
    found: dict[str, dict[str, ErrorCurve]] = {}
    for group in problem.groups:
        widths = sorted({*_thinned(group.widths), group.size})
        found[group.name] = {
            criterion: _curve(table, widths)
            for criterion, table in tables.get(group.name, {}).items()
            if criterion in problem.criteria
        }
    return found


def _curve(table: Table, widths: Sequence[int]) -> ErrorCurve:
    known = [w for w in widths if w in table] if isinstance(table, Mapping) else list(widths)
    return ErrorCurve(tuple(known), tuple(float(f"{table[w]:.{_DIGITS}g}") for w in known))


def _thinned(widths: Sequence[int]) -> list[int]:
    """Returns `widths`, or evenly spaced ones of them with both ends where there are more than a picture can show."""
    if len(widths) <= _POINTS:
        return list(widths)
    return [widths[round(i * (len(widths) - 1) / (_POINTS - 1))] for i in range(_POINTS)]


def _model(packed: Mapping[str, Any]) -> CostModel:
    return CostModel(
        groups=tuple(packed["groups"]),
        sizes=tuple(packed["sizes"]),
        macs=_terms(packed["macs"]),
        params=_terms(packed["params"]),
        size_bytes=_terms(packed["size_bytes"]),
        live=tuple(_terms(terms) for terms in packed["live"]),
        latency=tuple(
            Surface(_read_forms(forms), tuple(tuple(axis) for axis in knots), tuple(values))
            for forms, knots, values in packed["latency"]
        ),
    )


def _packed(terms: Sequence[Term]) -> list[Any]:
    return [[term.factor, _forms(term.forms), term.divisor] for term in terms]


def _terms(packed: Sequence[Any]) -> tuple[Term, ...]:
    return tuple(Term(factor, _read_forms(forms), divisor) for factor, forms, divisor in packed)


def _forms(forms: Sequence[Form]) -> list[Any]:
    return [[form.const, [list(pair) for pair in form.terms]] for form in forms]


def _read_forms(packed: Sequence[Any]) -> tuple[Form, ...]:
    return tuple(Form(const, tuple((group, times) for group, times in pairs)) for const, pairs in packed)
