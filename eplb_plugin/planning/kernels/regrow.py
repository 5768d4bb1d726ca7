"""Other replica counts for a placement in force, with few moves."""

from __future__ import annotations

import numpy as np

from .compiling import _compile
from .limits import _VACANT


@_compile
def _regrow(total, count, target, expert_node, slot_expert, num_ranks, ranks_per_node):
    """Change `slot_expert` from `count` to `target` replicas: surplus ones leave the heaviest ranks, missing
    ones go to vacant slots, of the lightest rank of the expert's node that has one and lacks the expert."""
    num_logical = total.shape[0]
    num_slots = slot_expert.shape[0]
    capacity = num_slots // num_ranks
    load = np.zeros(num_ranks, np.float64)
    # The slots of each expert, as linked lists in rising order.
    first = np.full(num_logical, -1, np.int64)
    next_ = np.full(num_slots, -1, np.int64)
    for slot in range(num_slots - 1, -1, -1):
        expert = slot_expert[slot]
        if expert < 0:
            continue
        rank = slot // capacity
        load[rank] += total[expert] / target[expert]
        next_[slot] = first[expert]
        first[expert] = slot
    free = np.empty(num_slots, np.int64)
    num_free = 0
    for slot in range(num_slots):
        if slot_expert[slot] == _VACANT:
            free[num_free] = slot
            num_free += 1
    for expert in range(num_logical):
        for _ in range(count[expert] - target[expert]):
            leaves = -1
            slot = first[expert]
            while slot >= 0:
                heavier = leaves < 0 or load[slot // capacity] > load[leaves // capacity]
                if slot_expert[slot] == expert and heavier:
                    leaves = slot
                slot = next_[slot]
            slot_expert[leaves] = _VACANT
            load[leaves // capacity] -= total[expert] / target[expert]
            at = num_free
            while at > 0 and free[at - 1] > leaves:
                free[at] = free[at - 1]
                at -= 1
            free[at] = leaves
            num_free += 1
    key = np.empty(num_logical, np.float64)
    for expert in range(num_logical):
        key[expert] = -total[expert] / target[expert]
    for expert in np.argsort(key, kind="mergesort"):
        for _ in range(target[expert] - count[expert]):
            chosen, fallback = -1, -1
            for at in range(num_free):
                slot = free[at]
                rank = slot // capacity
                if slot_expert[slot] >= 0 or rank // ranks_per_node != expert_node[expert]:
                    continue
                if not _holds(slot_expert, rank, capacity, expert):
                    if chosen < 0 or load[rank] < load[chosen // capacity]:
                        chosen = slot
                elif fallback < 0 or load[rank] < load[fallback // capacity]:
                    fallback = slot
            if chosen < 0:
                chosen = _make_room(
                    slot_expert, fallback, expert, total, target, load, capacity, ranks_per_node
                )
            slot_expert[chosen] = expert
            load[chosen // capacity] += total[expert] / target[expert]


@_compile
def _holds(slot_expert, rank, capacity, expert):
    held = False
    for slot in range(rank * capacity, (rank + 1) * capacity):
        held = held or slot_expert[slot] == expert
    return held


@_compile
def _make_room(slot_expert, vacant, expert, total, target, load, capacity, ranks_per_node):
    """A slot for an expert that the rank of the `vacant` slot has already: that of another one of the node,
    which moves there, with the lower peak of the two ranks; `vacant` itself where there is none."""
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
