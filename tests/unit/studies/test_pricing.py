"""Many policies priced at once cost what they cost one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from autoprune.cost import COSTS, LATENCY, Form, Surface, Term
from autoprune.results import Problem
from autoprune.studies.pricing import costs_many


def test_every_cost_equals_the_cost_models_own(make_chain: Callable[..., Problem]) -> None:
    width = [Form(0, ((i, 1),)) for i in range(5)]
    surfaces = (
        Surface((), (), (700,)),
        Surface((width[0],), ((16,),), (5,)),
        Surface((width[0], Form(3, ((1, 2), (2, 1)))), ((2, 7, 16), (5, 30, 51)), (1, 5, 9, 2, 50, 90, 7, 77, 555)),
        Surface((width[2], width[3], width[4]), ((1, 16), (4, 16), (2, 9)), tuple(range(10, 90, 10))),
    )
    model = make_chain(5).cost_model
    shared = (Term(7, (width[0], width[1]), 3), Term(5, (width[2],), 2), *model.macs)
    model = replace(model, latency=surfaces, macs=shared)
    rng = np.random.default_rng(0)
    widths = rng.integers(1, 17, size=(200, 5))
    found = costs_many(model, widths)
    assert tuple(found) == (*COSTS, LATENCY)
    for row, kept in enumerate(widths):
        one = model.costs(dict(zip(model.groups, kept.tolist(), strict=True)))
        assert {name: int(values[row]) for name, values in found.items()} == one


def test_some_costs_or_no_policy_may_be_asked_for_and_nonsense_is_refused(make_chain: Callable[..., Problem]) -> None:
    model = make_chain(3).cost_model
    assert set(costs_many(model, np.ones((2, 3), np.int64), ["macs"])) == {"macs"}
    assert costs_many(model, np.ones((0, 3), np.int64))["params"].shape == (0,)
    with pytest.raises(ValueError, match=r"widths must be \(N, 3\), got \(2, 4\)"):
        costs_many(model, np.ones((2, 4), np.int64))
    with pytest.raises(KeyError, match="latency_ns"):
        costs_many(model, np.ones((2, 3), np.int64), [LATENCY])
