"""Channel labels: joins, freezes and their solution."""

import numpy as np
import pytest

from autoprune.network.graph.labels import LabelStore, Value


def test_fresh_labels_are_never_given_twice():
    store = LabelStore()
    first, second = store.fresh(3), store.fresh(2)
    assert sorted([*first, *second]) == list(range(5))
    assert store.count == 5


def test_joins_are_transitive_and_leave_other_labels_apart():
    store = LabelStore()
    a, b, c, d = (store.fresh(2) for _ in range(4))
    store.join(a, b)
    store.join(b, c[::-1])
    component = store.solve().component
    assert component[a[0]] == component[b[0]] == component[c[1]]
    assert component[a[1]] == component[b[1]] == component[c[0]]
    assert len({component[a[0]], component[a[1]], *component[d]}) == 4


def test_the_number_of_components_counts_unjoined_labels():
    store = LabelStore()
    store.join(store.fresh(4), store.fresh(4))
    store.fresh(3)
    assert store.solve().number == 7


def test_a_frozen_label_freezes_everything_that_it_is_joined_with_and_the_first_reason_is_kept():
    store = LabelStore()
    a, b, c = store.fresh(2), store.fresh(2), store.fresh(2)
    store.join(a, b)
    store.freeze(b[:1], "first")
    store.freeze(a, "second")
    solution = store.solve()
    assert solution.frozen == {solution.component[a[0]]: "first", solution.component[a[1]]: "second"}
    assert solution.component[c[0]] not in solution.frozen


def test_approximate_labels_are_told_apart_from_frozen_ones():
    store = LabelStore()
    a = store.fresh(2)
    store.approximate(a, "averaged")
    solution = store.solve()
    assert solution.frozen == {}
    assert set(solution.approximate.values()) == {"averaged"}


def test_nothing_at_all_is_solved_too():
    solution = LabelStore().solve()
    assert solution.number == 0
    assert solution.component.shape == (0,)


def test_freezing_no_labels_does_nothing():
    store = LabelStore()
    store.freeze(None, "nothing")
    store.freeze(np.empty(0, np.int64), "nothing")
    assert store.solve().frozen == {}


def test_labels_of_different_number_cannot_be_joined():
    store = LabelStore()
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        store.join(store.fresh(2), store.fresh(3))


def test_a_value_refuses_labels_that_do_not_fit_its_shape():
    with pytest.raises(ValueError, match="size 4 has 3 labels"):
        Value((2, 4), (None, np.arange(3)))
    with pytest.raises(ValueError, match="2 dimensions"):
        Value((2, 4), (None,))


def test_other_labels_make_an_unnamed_value():
    value = Value((2, 2), (None, np.arange(2)), "weight")
    assert value.with_dims((None, None)) == Value((2, 2), (None, None))
