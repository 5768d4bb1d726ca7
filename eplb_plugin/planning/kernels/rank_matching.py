"""Matching: which rank of a node takes which list of slots, for many experts that stay where they are."""

from __future__ import annotations

import numpy as np

from .compiling import jitted

__all__ = ["match_by_overlap"]


@jitted
def match_by_overlap(packed, current, rank_slots, ranks_per_node, num_logical):
    """Give the slots of each rank of `packed` to a rank of its node that holds many of their experts.

    The pairs of ranks with the most experts in common come first. Ranks that differ in slots are never
    exchanged. No rank load changes, only its rank.

    Args:
        packed: int64 [slots], a placement, -1 for closed slots.
        current: int64 [slots], the placement in force, -1 for closed and empty slots.
        rank_slots: int64 [ranks], open slots of each rank.
        num_logical: number of experts.

    Returns:
        int64 [slots], `packed` with its ranks renumbered.
    """
    num_ranks, num_slots = rank_slots.shape[0], packed.shape[0]
    capacity = num_slots // num_ranks
    first, next_ = np.full(num_logical, -1, np.int64), np.full(num_slots, -1, np.int64)
    for slot in range(num_slots):
        if current[slot] >= 0:
            next_[slot] = first[current[slot]]
            first[current[slot]] = slot
    overlap = np.zeros((num_ranks, num_ranks), np.int64)
    for slot in range(num_slots):
        if packed[slot] >= 0:
            at = first[packed[slot]]
            while at >= 0:
                overlap[slot // capacity, at // capacity] += 1
                at = next_[at]
    chosen = np.full(num_ranks, -1, np.int64)
    taken = np.zeros(num_ranks, np.bool_)
    for least in range(overlap.max(), -1, -1):
        for rank in range(num_ranks):
            begin = rank // ranks_per_node * ranks_per_node
            for other in range(begin, begin + ranks_per_node):
                if chosen[rank] >= 0:
                    break
                alike = not taken[other] and rank_slots[rank] == rank_slots[other]
                if alike and overlap[rank, other] >= least:
                    chosen[rank] = other
                    taken[other] = True
    matched = np.empty(num_slots, np.int64)
    for slot in range(num_slots):
        rank = slot // capacity
        matched[(chosen[rank] - rank) * capacity + slot] = packed[slot]
    return matched
