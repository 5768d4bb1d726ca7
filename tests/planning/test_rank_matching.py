"""Ranks renumbered for the most experts that stay, beside the exact assignment."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from eplb_plugin.planning.kernels.rank_matching import match_by_overlap

# The kernel has no wrapper for Python: its plain Python is as fast to run as a wrapper would be to compile.
match = match_by_overlap.py_func


@st.composite
def cases(draw):
    """Two random placements with the same open slots: packed, current, open slots and ranks of each node."""
    nodes, width, capacity = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    open_slots = rng.integers(max(1, capacity - 1), capacity + 1, nodes * width)
    open_slots[rng.integers(nodes * width)] = capacity
    num_logical = int(rng.integers(1, 3 * capacity * width + 1))
    closed = np.arange(capacity) >= open_slots[:, None]
    packed, current = (
        np.where(closed, -1, rng.integers(0, num_logical, closed.shape)).astype(np.int64) for _ in range(2)
    )
    return packed, current, open_slots.astype(np.int64), width, num_logical


def overlaps(packed: np.ndarray, current: np.ndarray) -> np.ndarray:
    """Pairs of slots with the same expert, int64 [ranks, ranks]."""
    same = (packed[:, None, :, None] == current[None, :, None, :]) & (packed >= 0)[:, None, :, None]
    return same.sum((2, 3))


@settings(deadline=None, max_examples=60)
@given(cases())
def test_ranks_are_renumbered_within_nodes_for_at_least_half_of_the_best_overlap(case):
    packed, current, open_slots, width, num_logical = case
    found = match(packed.ravel(), current.ravel(), open_slots, width, num_logical).reshape(packed.shape)
    assert ((found >= 0).sum(1) == open_slots).all()
    worth = overlaps(packed, current)
    for first in range(0, len(packed), width):
        node = slice(first, first + width)
        assert sorted(map(tuple, found[node])) == sorted(map(tuple, packed[node]))
        allowed = np.where(open_slots[node, None] == open_slots[None, node], worth[node, node], -1e6)
        rows, columns = linear_sum_assignment(allowed, maximize=True)
        kept = np.trace(overlaps(found[node], current[node]))
        # Pairs in falling order of their worth reach half of the best sum, always.
        assert 2 * kept >= allowed[rows, columns].sum()


def test_a_renumbered_placement_gets_its_ranks_back():
    rng = np.random.default_rng(0)
    current = rng.permutation(64).reshape(16, 4)
    packed = np.concatenate([node[rng.permutation(8)] for node in np.split(current, 2)])
    packed = rng.permuted(packed, axis=1)
    found = match(packed.ravel(), current.ravel(), np.full(16, 4), 8, 64).reshape(16, 4)
    assert (np.sort(found, 1) == np.sort(current, 1)).all()
