"""How many replicas each expert gets."""

from __future__ import annotations

import numpy as np

from .compiling import _compile
from .heaps import _sink


@_compile
def _replicate(total, expert_node, in_force, bonus, num_slots, num_ranks, ranks_per_node):
    """Replicas of each expert, int64 [logical]: greedy on load per replica, within each node's slots.

    An expert with fewer replicas than `in_force` counts as `bonus` times as heavy.
    """
    num_logical = total.shape[0]
    num_nodes = num_ranks // ranks_per_node
    node_slots = num_slots // num_nodes
    count = np.ones(num_logical, np.int64)
    key = np.empty(num_logical, np.float64)  # minus the load per replica
    for expert in range(num_logical):
        key[expert] = -total[expert] * (bonus if in_force[expert] > 1 else 1.0)
    heap = np.empty(num_logical, np.int64)
    for node in range(num_nodes):
        size = 0
        for expert in range(num_logical):
            if expert_node[expert] == node:
                heap[size] = expert
                size += 1
        if size == 0:
            continue
        spare = node_slots - size
        bound = max(ranks_per_node, -(-node_slots // size))
        _give_slots(total, in_force, bonus, heap, size, spare, bound, key, count)
    return count


@_compile
def _give_slots(total, in_force, bonus, heap, size, spare, bound, key, count):
    """Give `spare` slots to experts of one node, the one with the most load per replica first.

    Args:
        total, in_force, bonus: as in `_replicate`.
        heap: int64, the experts in its first `size` places, one replica each; left in another order.
        bound: most replicas of an expert.
        key: float64 [logical], minus the load per replica; written.
        count: int64 [logical], replicas; written.
    """
    for at in range(size // 2 - 1, -1, -1):
        _sink(heap, size, at, key)
    for _ in range(spare if bound > 1 else 0):
        expert = heap[0]
        count[expert] += 1
        key[expert] = -total[expert] / count[expert]
        if count[expert] < in_force[expert]:
            key[expert] *= bonus
        if count[expert] == bound:
            size -= 1
            heap[0] = heap[size]
        _sink(heap, size, 0, key)
