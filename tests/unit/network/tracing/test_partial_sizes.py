"""How many indices stay, as forms over the widths of groups."""

import math

import numpy as np
import pytest

from autoprune.network.graph.costs import _size
from autoprune.network.graph.groups import PruningGroup

GROUPS = (
    PruningGroup("heads", 2, 0, (), (), "stage1"),
    PruningGroup("dims", 3, 2, (), (), "stage1"),
)


def value(terms, widths):
    return sum(
        term.factor * math.prod(form.const + sum(n * widths[g] for g, n in form.terms) for form in term.forms)
        for term in terms
    )


def test_whole_groups_and_fixed_indices_are_counted_by_their_widths():
    terms = _size(np.array([2, 3, 4, 2, 3, 4, -1]), GROUPS)
    assert value(terms, (2, 3)) == 7
    assert value(terms, (2, 1)) == 3


def test_heads_times_dimensions_are_a_product():
    pairs = np.array([[h, 2 + d] for h in range(2) for d in range(3)])
    terms = _size(pairs, GROUPS)
    assert value(terms, (2, 3)) == 6
    assert value(terms, (1, 2)) == 2


@pytest.mark.parametrize(
    "units",
    [
        np.array([2, 3]),  # a part of the dimensions
        np.array([2, 3, 4, 2]),  # all of them, and a part once more
        np.array([[0, 2], [0, 3], [1, 2], [-1, -1]]),  # a part of heads times dimensions
    ],
)
def test_indices_that_hold_a_part_of_a_group_count_as_staying_so_that_the_dense_cost_is_exact(units):
    assert value(_size(units, GROUPS), (2, 3)) == len(units)
