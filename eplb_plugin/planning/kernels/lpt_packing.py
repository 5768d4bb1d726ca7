"""LPT packing: replicas to ranks, the longest processing time first, on binary heaps."""

from __future__ import annotations

import numpy as np

from .compiling import jitable

__all__ = ["pack_lpt", "sift_down", "splitmix64"]


@jitable
def pack_lpt(total, count, expert_node, ranks_per_node, rank_slots, candidate, seed, slot_expert):
    """Give each replica to the lightest rank of its node that has a free slot and lacks the expert.

    Experts come in falling order of load per replica. Candidates after the first multiply each of these loads
    by noise in [0.8, 1.2), as the vectorized ensemble packer does. Where every rank with a free slot holds
    the expert, the lightest of them gets a second replica.

    Args:
        total: float64 [logical], load of each expert.
        count: int64 [logical], replicas of each expert.
        expert_node: int64 [logical], node of each expert.
        rank_slots: int64 [ranks], open slots of each rank.
        candidate, seed: of the noise.
        slot_expert: int64 [slots], written; -1 for closed slots.
    """
    num_logical = total.shape[0]
    num_ranks = rank_slots.shape[0]
    capacity = slot_expert.shape[0] // num_ranks
    slot_expert[:] = -1
    key = np.empty(num_logical, np.float64)
    for expert in range(num_logical):
        key[expert] = -total[expert] / count[expert]
        if candidate > 0:
            word = splitmix64(np.uint64(seed) * np.uint64(4096) + np.uint64(candidate))
            word = splitmix64(word + np.uint64(expert))
            key[expert] *= 0.8 + 0.4 * (np.float64(word >> np.uint64(11)) * 2.0**-53)
    order = np.argsort(key, kind="mergesort")
    load = np.zeros(num_ranks, np.float64)
    used = np.zeros(num_ranks, np.int64)
    # One heap a node, of its ranks with a free slot. Ranks that just got the expert are held back.
    heap = np.empty(num_ranks, np.int64)
    size = np.zeros(num_ranks // ranks_per_node, np.int64)
    for rank in range(num_ranks):
        node = rank // ranks_per_node
        if rank_slots[rank] > 0:
            heap[node * ranks_per_node + size[node]] = rank
            size[node] += 1
    held_back = np.empty(ranks_per_node, np.int64)
    for expert in order:
        share = total[expert] / count[expert]
        node = expert_node[expert]
        open_ranks = heap[node * ranks_per_node : (node + 1) * ranks_per_node]
        num_held_back = 0
        for _ in range(count[expert]):
            if size[node] > 0:
                chosen = open_ranks[0]
                size[node] -= 1
                open_ranks[0] = open_ranks[size[node]]
                sift_down(open_ranks, size[node], 0, load)
                held_back[num_held_back] = chosen
                num_held_back += 1
            else:
                chosen = -1
                for at in range(num_held_back):
                    rank = held_back[at]
                    if used[rank] < rank_slots[rank]:
                        lighter = chosen < 0 or load[rank] < load[chosen]
                        if lighter or (load[rank] == load[chosen] and rank < chosen):
                            chosen = rank
            slot_expert[chosen * capacity + used[chosen]] = expert
            used[chosen] += 1
            load[chosen] += share
        for at in range(num_held_back):
            if used[held_back[at]] < rank_slots[held_back[at]]:
                open_ranks[size[node]] = held_back[at]
                size[node] += 1
                _sift_up(open_ranks, size[node] - 1, load)


@jitable
def splitmix64(x):
    """The finaliser of SplitMix64, a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@jitable
def sift_down(heap, size, at, key):
    """Restore the order of a binary heap below `at`: the lowest key on top, of equal keys the lowest item.

    `heap` is int64, items in its first `size` places; `key` is by item.
    """
    item = heap[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        low, high = heap[child], heap[min(child + 1, size - 1)]
        if key[high] < key[low] or (key[high] == key[low] and high < low):
            child, low = child + 1, high
        if key[item] < key[low] or (key[item] == key[low] and item < low):
            break
        heap[at] = low
        at = child
    heap[at] = item


@jitable
def _sift_up(heap, at, key):
    """Restore the order of a binary heap above `at`."""
    item = heap[at]
    while at > 0:
        above = heap[(at - 1) // 2]
        if key[above] < key[item] or (key[above] == key[item] and above < item):
            break
        heap[at] = above
        at = (at - 1) // 2
    heap[at] = item
