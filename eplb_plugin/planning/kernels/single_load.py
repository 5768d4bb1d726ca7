"""The plan of one layer for a single load, from scratch: node by node, since nothing leaves its node."""

from __future__ import annotations

import numpy as np

from .compiling import _compile, _compile_in_place
from .copying import _copy
from .counts import _replicate
from .hand_out import _hand_out
from .packing_bounds import _counts_bound
from .peak_search import _lower_node
from .peak_state import _enter_node, _new_node
from .rank_bounds import _rank_bound
from .recount import _recount
from .set_apart import _set_apart


@_compile_in_place
def _plan_single(
    load, expert_node, num_ranks, ranks_per_node, room, rounds, candidates, patience, tolerance, seed, best
):
    """Plan one layer for `load`, float32 [logical], into `best`.

    The heaviest node comes first: the others need not be better than it.
    """
    num_logical = load.shape[0]
    num_nodes = num_ranks // ranks_per_node
    capacity = best.shape[0] // num_ranks
    node_load = np.zeros(num_nodes, np.float64)
    for expert in range(num_logical):
        node_load[expert_node[expert]] += np.float64(load[expert])
    members = np.empty(num_logical, np.int64)
    done = np.zeros(num_nodes, np.bool_)
    reached = 1.0 + tolerance
    for _ in range(num_nodes):
        node = -1
        for other in range(num_nodes):
            if not done[other] and (node < 0 or node_load[other] > node_load[node]):
                node = other
        done[node] = True
        size = 0
        for expert in range(num_logical):
            if expert_node[expert] == node:
                members[size] = expert
                size += 1
        first = node * ranks_per_node
        packed = best[first * capacity : (first + ranks_per_node) * capacity]
        peak = _plan_node(
            load[members[:size]], capacity, room[first : first + ranks_per_node], rounds,
            max(reached, node_load[node] / ranks_per_node + tolerance), candidates, patience, tolerance,
            seed, packed,
        )  # fmt: skip
        reached = max(reached, peak)
        for slot in range(packed.shape[0]):
            if packed[slot] >= 0:
                packed[slot] = members[packed[slot]]


@_compile
def _plan_node(load, capacity, room, rounds, target, candidates, patience, tolerance, seed, best):
    """Plan the ranks of a node, experts numbered within it, into `best`, until the peak is at most `target`
    or nothing more is found; returns the peak."""
    num_experts, num_ranks = load.shape[0], room.shape[0]
    one_node = np.zeros(num_experts, np.int64)
    weight = load.astype(np.float64)
    node = _new_node(weight, room, capacity)
    count = _replicate(weight, one_node, one_node, 1.0, room.sum(), num_ranks, num_ranks)
    peak = np.inf
    enough = target
    failures = 0
    for candidate in range(candidates):
        _hand_out(weight, count, one_node, num_ranks, room, candidate, seed, node.expert)
        value = _lower_node(node, capacity, rounds, target)
        failures = 0 if value < peak - tolerance else failures + 1
        if candidate == 0 or value < peak:
            peak = value
            _copy(node.expert, best)
        if candidate == 0 and peak > target:
            if capacity > 2:
                target = max(target, _rank_bound(weight, room) + tolerance)
            enough = max(target, _counts_bound(weight, count, room) + tolerance)
        if peak <= enough or failures >= patience:
            break
    # With two slots a rank, other counts gain next to nothing for the time that they take.
    if peak > target + tolerance and capacity > 2:
        peak = _set_apart(node, capacity, one_node, rounds, target, tolerance, peak, best)
    if peak > target + tolerance and capacity > 2:
        _copy(best, node.expert)
        _enter_node(node, capacity)
        peak = _recount(node, capacity, one_node, target, peak, best)
    return peak
