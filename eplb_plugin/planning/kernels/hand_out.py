"""Replicas to ranks: a first packing, and a bound on what any packing of these replicas can reach."""

from __future__ import annotations

import numpy as np

from .compiling import _compile
from .heaps import _rise, _sink


@_compile
def _mix(x):
    """A bijection of 64-bit words that spreads every bit (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@_compile
def _hand_out(total, count, expert_node, ranks_per_node, room, candidate, seed, slot_expert):
    """Longest processing time with capacity: each replica to the lightest rank of its node that has room
    and lacks the expert. Candidates after the first take the replicas in a noisy order."""
    num_logical = total.shape[0]
    num_ranks = room.shape[0]
    capacity = slot_expert.shape[0] // num_ranks
    slot_expert[:] = -1
    key = np.empty(num_logical, np.float64)
    for expert in range(num_logical):
        key[expert] = -total[expert] / count[expert]
        if candidate > 0:
            word = _mix(np.uint64(seed) * np.uint64(4096) + np.uint64(candidate))
            word = _mix(word + np.uint64(expert))
            # In [0.8, 1.2), as the document that the ensemble comes from has it.
            key[expert] *= 0.8 + 0.4 * (np.float64(word >> np.uint64(11)) * 2.0**-53)
    order = np.argsort(key, kind="mergesort")
    load = np.zeros(num_ranks, np.float64)
    used = np.zeros(num_ranks, np.int64)
    # The ranks of each node that have room, as heaps; those that got a replica of the expert wait aside.
    heap = np.empty(num_ranks, np.int64)
    size = np.zeros(num_ranks // ranks_per_node, np.int64)
    for rank in range(num_ranks):
        node = rank // ranks_per_node
        if room[rank] > 0:
            heap[node * ranks_per_node + size[node]] = rank
            size[node] += 1
    aside = np.empty(ranks_per_node, np.int64)
    for expert in order:
        share = total[expert] / count[expert]
        node = expert_node[expert]
        open_ranks = heap[node * ranks_per_node : (node + 1) * ranks_per_node]
        waiting = 0
        for _ in range(count[expert]):
            if size[node] > 0:
                chosen = open_ranks[0]
                size[node] -= 1
                open_ranks[0] = open_ranks[size[node]]
                _sink(open_ranks, size[node], 0, load)
                aside[waiting] = chosen
                waiting += 1
            else:
                # Every rank with room has the expert: it shares the lightest of them.
                chosen = -1
                for at in range(waiting):
                    rank = aside[at]
                    if used[rank] < room[rank]:
                        lighter = chosen < 0 or load[rank] < load[chosen]
                        if lighter or (load[rank] == load[chosen] and rank < chosen):
                            chosen = rank
            slot_expert[chosen * capacity + used[chosen]] = expert
            used[chosen] += 1
            load[chosen] += share
        for at in range(waiting):
            if used[aside[at]] < room[aside[at]]:
                open_ranks[size[node]] = aside[at]
                size[node] += 1
                _rise(open_ranks, size[node] - 1, load)
