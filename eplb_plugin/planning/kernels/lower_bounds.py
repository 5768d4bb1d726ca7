"""Lower bounds on the peak rank load: for any replica counts, and for given ones.

The bound for any counts (`rank_bound`) compares experts with slots. An expert on m ranks loads each of them
with at least its load / m. The other ranks carry at most as many of the heaviest other experts as they have
slots. All the rest is on those m ranks, and one of them has at least the mean. The least peak that m ranks
allow falls with m, and each rank beyond the first costs a slot. Below the bound, experts would need more
slots than exist.

An expert on all ranks, evenly, takes the same load and one slot from each of them. So the bound is either
the one for all ranks but one, or this share plus the bound of the other experts. More replicas than ranks are
not even: they put two on some rank.
"""

from __future__ import annotations

import numpy as np

from .compiling import SOURCES, entry_point, jitable
from .lpt_packing import sift_down

__all__ = ["bound_rows", "counts_bound", "rank_bound", "snapshots_bound"]

_HOTTEST = 64  # experts whose ranks are counted; all others take one slot each
_DEPTH = 3  # most experts taken to be on every rank


@jitable
def rank_bound(load, rank_slots):
    """A lower bound on the peak of any placement of `load`, float64 [experts], all experts of these ranks.

    `rank_slots`: int64 [ranks], slots of each rank; together no fewer than experts.
    """
    falling = -np.sort(-load)
    slots = np.sort(rank_slots)
    num_ranks = slots.shape[0]
    alone, share, otherwise = np.zeros(_DEPTH + 1), np.zeros(_DEPTH + 1), np.zeros(_DEPTH + 1)
    last = 0
    for depth in range(_DEPTH + 1):
        last = depth
        rest = falling[depth:]
        spare = slots.sum() - rest.shape[0]
        alone[depth], all_but_one = _slots_bound(rest, slots, spare)
        if depth == _DEPTH or rest.shape[0] <= 1 or num_ranks == 1 or spare + 1 < num_ranks:
            break
        if spare >= num_ranks:
            all_but_one = min(all_but_one, 2.0 * rest[0] / (spare + 1))
        if all_but_one <= alone[depth]:
            break
        otherwise[depth] = all_but_one
        share[depth] = rest[0] / num_ranks
        for rank in range(num_ranks):
            slots[rank] -= 1
    bound = alone[last]
    for depth in range(last - 1, -1, -1):
        bound = max(alone[depth], min(share[depth] + bound, otherwise[depth]))
    return bound


@jitable
def _slots_bound(falling, slots, spare):
    """The bound by counting slots, and the least peak with the hottest expert on all ranks but one.

    `falling` is float64 [experts], loads in falling order. `slots` is int64 [ranks], slots of each rank in
    rising order. `spare` is the number of slots beyond one per expert.
    """
    num_experts, num_ranks = falling.shape[0], slots.shape[0]
    heaviest = np.zeros(num_experts + 1)
    for expert in range(num_experts):
        heaviest[expert + 1] = heaviest[expert] + falling[expert]
    total = heaviest[num_experts]
    most = min(num_ranks, spare + 1)
    # With `spare` slots, at most `spare` + 1 experts decide.
    hot = min(_HOTTEST, num_experts, spare + 1)
    lowest = np.empty(hot * most)
    for expert in range(hot):
        allowed = np.inf
        left = num_experts + spare
        for m in range(1, most + 1):
            left -= slots[m - 1]
            elsewhere = min(left, num_experts - 1)
            others = heaviest[elsewhere]
            if expert < elsewhere:
                others = heaviest[elsewhere + 1] - falling[expert]
            allowed = min(allowed, max(falling[expert], total - others) / m)
            lowest[expert * most + m - 1] = allowed
    bound = max(total / num_ranks, lowest[most - 1])
    all_but_one = lowest[max(num_ranks - 2, 0)] if most == num_ranks else np.inf
    if spare < lowest.shape[0]:
        # Each entry above the bound costs another slot.
        place = lowest.shape[0] - 1 - spare
        bound = max(bound, np.partition(lowest, place)[place])
    return bound, all_but_one


@jitable
def counts_bound(weight, count, rank_slots):
    """A lower bound on the peak of any packing of given replicas.

    Two of the k heaviest replicas share a rank, or all k are on different ranks. In the second case the other
    slots of these k ranks hold at least the lightest replicas. The peak is then at least the mean of these
    ranks. It is also at least the load of the rank with the heaviest of the lightest replicas. `weight` is
    float64 [experts], `count` int64 [experts] the replicas of each.
    """
    least_slots = rank_slots.min()
    key = np.empty(weight.shape[0], np.float64)
    for expert in range(weight.shape[0]):
        key[expert] = -weight[expert] / count[expert]
    order = np.argsort(key, kind="mergesort")
    light, left = order.shape[0] - 1, count[order[-1]]
    heavy, used = 0, 0
    below = 0.0  # the lightest replicas that fill all slots of a rank but two
    total, bound, before = 0.0, 0.0, np.inf
    for k in range(1, rank_slots.shape[0] + 1):
        share, part = -key[order[heavy]], 0.0
        total += share
        used += 1
        if used == count[order[heavy]]:
            heavy, used = heavy + 1, 0
        for place in range(least_slots - 1):
            part = -key[order[light]]
            total += part
            below += part if k == 1 and place < least_slots - 2 else 0.0
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


@jitable
def snapshots_bound(load, count, capacity):
    """A lower bound on the sum of the snapshots' peaks, for any packing of given replicas.

    The heaviest replica of a snapshot shares its rank with at least the lightest replicas. `load` is float32
    [snapshots, logical], `count` int64 [logical] the replicas, `capacity` the fewest slots of a rank.
    """
    num_snapshots, num_logical = load.shape
    num_slots = count.sum()
    share = np.empty(num_slots, np.float32)
    heap = np.empty(num_slots, np.int64)
    bound = 0.0
    for snapshot in range(num_snapshots):
        at = 0
        heaviest = np.float32(0.0)
        for expert in range(num_logical):
            part = load[snapshot, expert] / np.float32(count[expert])
            heaviest = max(heaviest, part)
            for _ in range(count[expert]):
                share[at], heap[at] = part, at
                at += 1
        bound += np.float64(heaviest)
        for at in range(num_slots // 2 - 1, -1, -1):
            sift_down(heap, num_slots, at, share)
        for place in range(1, capacity):
            bound += np.float64(share[heap[0]])
            heap[0] = heap[num_slots - place]
            sift_down(heap, num_slots - place, 0, share)
    return bound


def _build(sources):
    @entry_point
    def bound_rows(load, rank_slots, bound):
        """Write `rank_bound` of each row of `load`, float64 [X, experts], to `bound`, float64 [X]."""
        _ = sources  # numba adds values of the closure to the key of the cache
        for row in range(load.shape[0]):
            bound[row] = rank_bound(load[row], rank_slots)

    return bound_rows


bound_rows = _build(SOURCES)
