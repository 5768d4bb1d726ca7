"""What the search around one heavy rank knows of the cells of its node."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiling import _compile_apart
from .limits import _COLD, _NEVER
from .smooth_peak import _project


class _Scratch(NamedTuple):
    """Memory for the search around one rank. Cells and ranks are those of its node, from 0."""

    leaving: np.ndarray  # float32 [cells]
    staying: np.ndarray  # float32 [cells]
    relief: np.ndarray  # float32 [cells]
    arriving: np.ndarray  # float32 [capacity, ranks]
    tiled: np.ndarray  # float32 [cells]
    warm: np.ndarray  # float32 [cells]
    inverse: np.ndarray  # float32 [cells]
    cost: np.ndarray  # float32 [cells]
    usual_cost: np.ndarray  # float32 [cells]
    bound: np.ndarray  # float32 [capacity, cells]
    cell_bound: np.ndarray  # float32 [cells]
    rank_bound: np.ndarray  # float32 [ranks]
    flag: np.ndarray  # float32 [logical]
    weights: np.ndarray  # float32 [snapshots]
    terms: np.ndarray  # float32 [snapshots]
    growth: np.ndarray  # float32 [snapshots]
    surplus: np.ndarray  # int64 [cells]
    burden: np.ndarray  # float32 [cells]
    extra: np.ndarray  # float32 [cells]
    total: np.ndarray  # float64 [logical]
    packed: np.ndarray  # float32 [7, cells]


@_compile_apart
def _new_scratch(num_snapshots, num_logical, capacity, ranks_per_node):
    width = capacity * ranks_per_node
    return _Scratch(
        np.empty(width, np.float32),
        np.empty(width, np.float32),
        np.empty(width, np.float32),
        np.empty((capacity, ranks_per_node), np.float32),
        np.empty(width, np.float32),
        np.empty(width, np.float32),
        np.empty(width, np.float32),
        np.empty(width, np.float32),
        np.empty(width, np.float32),
        np.empty((capacity, width), np.float32),
        np.empty(width, np.float32),
        np.empty(ranks_per_node, np.float32),
        np.ones(num_logical, np.float32),
        np.empty(num_snapshots, np.float32),
        np.empty(num_snapshots, np.float32),
        np.empty(num_snapshots, np.float32),
        np.empty(width, np.int64),
        np.empty(width, np.float32),
        np.empty(width, np.float32),
        np.zeros(num_logical, np.float64),
        np.empty((7, width), np.float32),
    )


@_compile_apart
def _look_around(state, scratch, heavy, capacity, ranks_per_node):
    """Fill what the search around a heavy rank needs to know of the cells of its node."""
    expert, origin, frees, heat, slope, steep = (
        state.expert, state.origin, state.frees, state.heat, state.slope, state.steep,
    )  # fmt: skip
    warm, inverse, flag, cost, usual_cost, weights = (
        scratch.warm, scratch.inverse, scratch.flag, scratch.cost, scratch.usual_cost, scratch.weights,
    )  # fmt: skip
    leaving, staying = scratch.leaving, scratch.staying
    first = heavy // ranks_per_node * ranks_per_node
    width = capacity * ranks_per_node
    begin = first * capacity
    own = heavy - first
    for snapshot in range(weights.shape[0]):
        weights[snapshot] = slope[snapshot] * steep[snapshot, heavy]
    _project(state.share, weights, begin, leaving)
    _project(state.pull, slope, begin, scratch.relief)
    for rank in range(ranks_per_node):
        here = heat[first + rank]
        # Too cold for a meaningful quotient: then nothing is known but that powers are not negative.
        quotient = np.float32(1.0) / here if here > _COLD else np.float32(0.0)
        load = np.float32(0.0)
        for at in range(rank, width, ranks_per_node):
            warm[at] = here
            inverse[at] = quotient
            load += leaving[at]
        for at in range(rank, width, ranks_per_node):
            staying[at] = load - leaving[at]
    for at in range(begin + own, begin + width, ranks_per_node):
        if origin[at] >= 0:
            flag[origin[at]] = np.float32(0.0)
    for at in range(begin + own, begin + width, ranks_per_node):
        if expert[at] >= 0:
            flag[expert[at]] = _NEVER
    for at in range(width):
        held = expert[begin + at]
        usual_cost[at] = flag[held] - frees[begin + at] if held >= 0 else _NEVER
        cost[at] = usual_cost[at]
    for at in range(begin + own, begin + width, ranks_per_node):
        if origin[at] >= 0:
            flag[origin[at]] = np.float32(1.0)
        if expert[at] >= 0:
            flag[expert[at]] = np.float32(1.0)
