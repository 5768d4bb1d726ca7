"""Lowering the true peak of a single load, which has no future to differ from."""

from __future__ import annotations

import numpy as np

from .compiling import _compile
from .limits import _TRIED_RANKS
from .peak_changes import _best_peak_change
from .peak_swaps import _best_peak_swap, _swap


@_compile
def _lower_peak(scaled, slot_expert, num_ranks, ranks_per_node, rounds, tolerance):
    """Lower the peak of a single load by swaps and changes of replicas, in place; returns the peak.

    A round relieves the heaviest rank that can be relieved.
    """
    num_logical = scaled.shape[1]
    num_slots = slot_expert.shape[0]
    capacity = num_slots // num_ranks
    count = np.zeros(num_logical, np.int64)
    held = np.zeros((num_logical, num_ranks), np.int16)
    for slot in range(num_slots):
        if slot_expert[slot] >= 0:
            count[slot_expert[slot]] += 1
            held[slot_expert[slot], slot // capacity] += 1
    share = np.empty((1, num_slots), np.float32)
    load = np.empty((1, num_ranks), np.float32)
    slot_load = np.empty((1, num_slots), np.float32)
    rest = np.empty(ranks_per_node * capacity, np.float32)
    lowest = np.empty(ranks_per_node * capacity, np.float32)
    _recompute(scaled, slot_expert, count, share, load, slot_load)
    failed = np.zeros(num_ranks, np.bool_)
    fresh = True
    for _ in range(rounds):
        peak = load[0].max()
        if peak <= 1.0 + tolerance:
            break
        improved = False
        for _ in range(_TRIED_RANKS):
            heavy = -1
            for rank in range(num_ranks):
                if not failed[rank] and (heavy < 0 or load[0, rank] > load[0, heavy]):
                    heavy = rank
            # Ranks that tie for the peak are relieved one after the other; others do not set it.
            if heavy < 0 or load[0, heavy] < peak * np.float32(1.0 - 1e-4):
                break
            mine, other = _best_peak_swap(
                share[0], slot_load[0], slot_expert, held, heavy, ranks_per_node, capacity, rest, lowest
            )
            if mine >= 0:
                _swap(share, load, slot_load, slot_expert, held, mine, other, capacity)
                failed[other // capacity] = False
                fresh = False
                improved = True
                break
            expert, slot = _best_peak_change(
                scaled[0], load[0], slot_expert, count, held, heavy, ranks_per_node, capacity
            )
            if slot >= 0:
                held[slot_expert[slot], slot // capacity] -= 1
                count[slot_expert[slot]] -= 1
                held[expert, slot // capacity] += 1
                count[expert] += 1
                slot_expert[slot] = expert
                _recompute(scaled, slot_expert, count, share, load, slot_load)
                failed[:] = False
                fresh = True
                improved = True
                break
            failed[heavy] = True
        if not improved:
            if fresh:
                break
            failed[:] = False
            fresh = True
    _recompute(scaled, slot_expert, count, share, load, slot_load)
    return np.float64(load[0].max())


@_compile
def _recompute(scaled, slot_expert, count, share, load, slot_load):
    num_snapshots, num_slots = share.shape
    num_ranks = load.shape[1]
    capacity = num_slots // num_ranks
    inverse = np.empty(num_slots, np.float32)
    for slot in range(num_slots):
        inverse[slot] = np.float32(1.0) / np.float32(count[max(slot_expert[slot], 0)])
    for snapshot in range(num_snapshots):
        for slot in range(num_slots):
            share[snapshot, slot] = np.float32(0.0)
            if slot_expert[slot] >= 0:
                share[snapshot, slot] = scaled[snapshot, slot_expert[slot]] * inverse[slot]
        for rank in range(num_ranks):
            total = np.float32(0.0)
            for slot in range(rank * capacity, (rank + 1) * capacity):
                total += share[snapshot, slot]
            load[snapshot, rank] = total
            for slot in range(rank * capacity, (rank + 1) * capacity):
                slot_load[snapshot, slot] = total
