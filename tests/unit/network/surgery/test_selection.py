"""Selections are kept for the next step of the same trial, and for no longer than memory bears."""

import pickle

import numpy as np

from autoprune.network.surgery import selection
from autoprune.network.surgery.selection import KeptSelections
from autoprune.policy import Choice, Policy


def policy(ratio: float) -> Policy:
    return Policy({"a": Choice("l2", ratio)})


def test_a_selection_is_computed_again_only_where_it_was_made_from_other_objects() -> None:
    kept, asked = KeptSelections(), list[float]()

    def compute(which: Policy) -> dict[str, np.ndarray]:
        asked.append(which.choices["a"].ratio)
        return {"a": np.arange(4)}

    one, other = object(), object()
    first = kept.of(policy(0.5), (one,), compute)
    assert kept.of(policy(0.5), (one,), compute) is first
    assert kept.of(policy(0.5), (other,), compute) is not first
    assert asked == [0.5, 0.5]
    travelled = pickle.loads(pickle.dumps(kept))
    travelled.of(policy(0.5), (other,), compute)
    assert asked == [0.5, 0.5, 0.5]


def test_the_oldest_selections_go_where_they_are_large_and_the_latest_one_stays(monkeypatch) -> None:
    monkeypatch.setattr(selection, "_MOST_KEPT", 10)
    kept, asked = KeptSelections(), list[float]()

    def compute(which: Policy) -> dict[str, np.ndarray]:
        asked.append(which.choices["a"].ratio)
        return {"a": np.arange(20 if which.choices["a"].ratio == 0.9 else 4)}

    for ratio in (0.1, 0.2, 0.1, 0.3, 0.1, 0.2, 0.9, 0.9, 0.1):
        kept.of(policy(ratio), (), compute)
    assert asked == [0.1, 0.2, 0.3, 0.2, 0.9, 0.1]
