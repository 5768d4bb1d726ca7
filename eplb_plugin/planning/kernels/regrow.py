"""Other replica counts for a placement in force, with few moves."""

from __future__ import annotations

import numpy as np

from .compiling import _compile


@_compile
def _regrow(total, count, target, slot_expert, num_ranks, ranks_per_node):
    """Change `slot_expert` from `count` to `target` replicas: surplus ones leave the heaviest ranks, missing
    ones go to the lightest rank of their node that has room and lacks the expert."""
    num_logical = total.shape[0]
    num_slots = slot_expert.shape[0]
    capacity = num_slots // num_ranks
    load = np.zeros(num_ranks, np.float64)
    node_of = np.zeros(num_logical, np.int64)
    # The slots of each expert, as linked lists in rising order.
    first = np.full(num_logical, -1, np.int64)
    next_ = np.full(num_slots, -1, np.int64)
    for slot in range(num_slots - 1, -1, -1):
        expert = slot_expert[slot]
        if expert < 0:
            continue
        rank = slot // capacity
        load[rank] += total[expert] / target[expert]
        node_of[expert] = rank // ranks_per_node
        next_[slot] = first[expert]
        first[expert] = slot
    free = np.empty(num_slots, np.int64)
    num_free = 0
    for expert in range(num_logical):
        for _ in range(count[expert] - target[expert]):
            leaves = -1
            slot = first[expert]
            while slot >= 0:
                heavier = leaves < 0 or load[slot // capacity] > load[leaves // capacity]
                if slot_expert[slot] == expert and heavier:
                    leaves = slot
                slot = next_[slot]
            slot_expert[leaves] = -1
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
                if slot_expert[slot] >= 0 or rank // ranks_per_node != node_of[expert]:
                    continue
                lacks = True
                for other in range(rank * capacity, (rank + 1) * capacity):
                    if slot_expert[other] == expert:
                        lacks = False
                if lacks:
                    if chosen < 0 or load[rank] < load[chosen // capacity]:
                        chosen = slot
                elif fallback < 0 or load[rank] < load[fallback // capacity]:
                    fallback = slot
            if chosen < 0:
                chosen = fallback
            slot_expert[chosen] = expert
            load[chosen // capacity] += total[expert] / target[expert]
