"""What no packing of given replicas can beat: of a single load, and of several snapshots."""

from __future__ import annotations

import numpy as np

from .compiling import _compile
from .heaps import _sink


@_compile
def _counts_bound(weight, count, room):
    """No packing of these replicas has a lower peak.

    Of the k heaviest replicas two share a rank, or each is on a rank of its own. Then the other slots of
    these ranks hold at least the lightest replicas, and one of them holds one no lighter than the heaviest of
    those. So the peak is at least the mean of these ranks, and at least what that one adds up to.
    """
    least_room = room.min()
    key = np.empty(weight.shape[0], np.float64)
    for expert in range(weight.shape[0]):
        key[expert] = -weight[expert] / count[expert]
    order = np.argsort(key, kind="mergesort")
    light, left = order.shape[0] - 1, count[order[-1]]
    heavy, used = 0, 0
    below = 0.0  # the lightest replicas that fill a rank but for two slots
    total, bound, before = 0.0, 0.0, np.inf
    for k in range(1, room.shape[0] + 1):
        share, part = -key[order[heavy]], 0.0
        total += share
        used += 1
        if used == count[order[heavy]]:
            heavy, used = heavy + 1, 0
        for place in range(least_room - 1):
            part = -key[order[light]]
            total += part
            below += part if k == 1 and place < least_room - 2 else 0.0
            left -= 1
            if left == 0:
                light -= 1
                left = count[order[light]]
        apart = max(total / k, share + below + part)
        bound = max(bound, min(apart, before + share + below))
        before = share
        if heavy > light:
            break
    return bound


@_compile
def _packing_bound(scaled, count, capacity):
    """No packing with these replica counts has a lower sum of peaks: the heaviest replica of a snapshot
    shares its rank with at least the lightest ones."""
    num_snapshots, num_logical = scaled.shape
    num_slots = count.sum()
    share = np.empty(num_slots, np.float32)
    heap = np.empty(num_slots, np.int64)
    bound = 0.0
    for snapshot in range(num_snapshots):
        at = 0
        heaviest = np.float32(0.0)
        for expert in range(num_logical):
            part = scaled[snapshot, expert] / np.float32(count[expert])
            heaviest = max(heaviest, part)
            for _ in range(count[expert]):
                share[at], heap[at] = part, at
                at += 1
        bound += np.float64(heaviest)
        for at in range(num_slots // 2 - 1, -1, -1):
            _sink(heap, num_slots, at, share)
        for place in range(1, capacity):
            bound += np.float64(share[heap[0]])
            heap[0] = heap[num_slots - place]
            _sink(heap, num_slots - place, 0, share)
    return bound
