"""Replica counts: how many replicas each expert gets, and a placement in force changed to new counts.

`greedy_counts` is where plans from scratch and from a placement in force begin. Single loads also try other
counts, see `single_load_plan`.
"""

from __future__ import annotations

import numpy as np

from .compiling import jitable
from .lpt_packing import sift_down

__all__ = ["VACANT", "add_replicas", "apply_counts", "greedy_counts"]

VACANT = -2  # a slot to be filled; -1 is a closed slot


@jitable
def greedy_counts(total, expert_node, in_force, bonus, num_slots, num_ranks, ranks_per_node):
    """Give every slot beyond one per expert to the expert of its node with the most load per replica.

    No expert gets more replicas than its node has ranks, unless slots would be left over. Returns the
    replicas of each expert, int64 [logical].

    Args:
        total: float64 [logical], load of each expert.
        expert_node: int64 [logical], node of each expert.
        in_force: int64 [logical], replicas in the placement in force, or zeros.
        bonus: factor on the load of an expert that has fewer replicas than `in_force`.
        num_slots: open slots of all ranks.
    """
    num_logical = total.shape[0]
    num_nodes = num_ranks // ranks_per_node
    node_slots = num_slots // num_nodes
    count = np.ones(num_logical, np.int64)
    key = np.empty(num_logical, np.float64)
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
        most = max(ranks_per_node, -(-node_slots // size))
        add_replicas(total, in_force, bonus, heap, size, spare, most, key, count)
    return count


@jitable
def add_replicas(total, in_force, bonus, heap, size, spare, most, key, count):
    """Add `spare` replicas, each to the expert with the most load per replica; see also `greedy_counts`.

    Args:
        heap: int64, the experts in its first `size` places, one replica each; reordered.
        most: bound on the replicas of an expert.
        key: float64 [logical], minus the load per replica; written.
        count: int64 [logical], replicas; written.
    """
    for at in range(size // 2 - 1, -1, -1):
        sift_down(heap, size, at, key)
    for _ in range(spare if most > 1 else 0):
        expert = heap[0]
        count[expert] += 1
        key[expert] = -total[expert] / count[expert]
        if count[expert] < in_force[expert]:
            key[expert] *= bonus
        if count[expert] == most:
            size -= 1
            heap[0] = heap[size]
        sift_down(heap, size, 0, key)


@jitable
def apply_counts(total, count, target, expert_node, slot_expert, num_ranks, ranks_per_node):
    """Change a placement to other replica counts, with few moves.

    Surplus replicas leave the heaviest ranks. Missing replicas go to vacant slots, each to the lightest rank
    of the expert's node that has one and lacks the expert.

    Args:
        total: float64 [logical], load of each expert.
        count, target: int64 [logical], replicas now and afterwards.
        expert_node: int64 [logical], node of each expert.
        slot_expert: int64 [slots], `VACANT` for slots to be filled; written.
    """
    num_slots = slot_expert.shape[0]
    capacity = num_slots // num_ranks
    load = np.zeros(num_ranks, np.float64)
    for slot in range(num_slots - 1, -1, -1):
        expert = slot_expert[slot]
        if expert >= 0:
            load[slot // capacity] += total[expert] / target[expert]
    vacant = np.empty(num_slots, np.int64)
    num_vacant = _remove_surplus(total, count, target, slot_expert, capacity, load, vacant)
    key = np.empty(total.shape[0], np.float64)
    for expert in range(total.shape[0]):
        key[expert] = -total[expert] / target[expert]
    for expert in np.argsort(key, kind="mergesort"):
        for _ in range(target[expert] - count[expert]):
            chosen, second_replica = -1, -1
            for at in range(num_vacant):
                slot = vacant[at]
                rank = slot // capacity
                if slot_expert[slot] >= 0 or rank // ranks_per_node != expert_node[expert]:
                    continue
                if not _holds(slot_expert, rank, capacity, expert):
                    if chosen < 0 or load[rank] < load[chosen // capacity]:
                        chosen = slot
                elif second_replica < 0 or load[rank] < load[second_replica // capacity]:
                    second_replica = slot
            if chosen < 0:
                chosen = _relocate_other(
                    slot_expert, second_replica, expert, total, target, load, capacity, ranks_per_node
                )
            slot_expert[chosen] = expert
            load[chosen // capacity] += total[expert] / target[expert]


@jitable
def _remove_surplus(total, count, target, slot_expert, capacity, load, vacant):
    """Vacate the slots of surplus replicas, those on the heaviest ranks first.

    Writes all vacant slots in rising order to `vacant`, int64 [slots], and returns their number. Updates
    `load`, float64 [ranks].
    """
    num_logical, num_slots = total.shape[0], slot_expert.shape[0]
    # The slots of each expert, as linked lists in rising order.
    first = np.full(num_logical, -1, np.int64)
    next_ = np.full(num_slots, -1, np.int64)
    for slot in range(num_slots - 1, -1, -1):
        if slot_expert[slot] >= 0:
            next_[slot] = first[slot_expert[slot]]
            first[slot_expert[slot]] = slot
    num_vacant = 0
    for slot in range(num_slots):
        if slot_expert[slot] == VACANT:
            vacant[num_vacant] = slot
            num_vacant += 1
    for expert in range(num_logical):
        for _ in range(count[expert] - target[expert]):
            leaves = -1
            slot = first[expert]
            while slot >= 0:
                heavier = leaves < 0 or load[slot // capacity] > load[leaves // capacity]
                if slot_expert[slot] == expert and heavier:
                    leaves = slot
                slot = next_[slot]
            slot_expert[leaves] = VACANT
            load[leaves // capacity] -= total[expert] / target[expert]
            at = num_vacant
            while at > 0 and vacant[at - 1] > leaves:
                vacant[at] = vacant[at - 1]
                at -= 1
            vacant[at] = leaves
            num_vacant += 1
    return num_vacant


@jitable
def _holds(slot_expert, rank, capacity, expert):
    held = False
    for slot in range(rank * capacity, (rank + 1) * capacity):
        held = held or slot_expert[slot] == expert
    return held


@jitable
def _relocate_other(slot_expert, vacant, expert, total, target, load, capacity, ranks_per_node):
    """Move another expert of the node into `vacant`, whose rank holds `expert` already.

    Of all such experts, the one with the lower peak of the two ranks afterwards. Returns the slot that
    becomes free; `vacant` itself where no other expert may move.
    """
    here = vacant // capacity
    node_slots = capacity * ranks_per_node
    first = vacant // node_slots * node_slots
    share = total[expert] / target[expert]
    best, lowest = vacant, np.inf
    for slot in range(first, first + node_slots):
        other, there = slot_expert[slot], slot // capacity
        if other < 0 or _holds(slot_expert, here, capacity, other):
            continue
        moved = total[other] / target[other]
        peak = max(load[here] + moved, load[there] + share - moved)
        if peak < lowest and not _holds(slot_expert, there, capacity, expert):
            best, lowest = slot, peak
    if best != vacant:
        moved = total[slot_expert[best]] / target[slot_expert[best]]
        slot_expert[vacant] = slot_expert[best]
        load[here] += moved
        load[best // capacity] -= moved
    return best
