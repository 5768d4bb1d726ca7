"""What ranks that share their experts among them cannot beat, whatever the replica counts are.

An expert on m ranks loads each of them with at least what it has by m. The other ranks have so many slots,
which carry no more than as many of the heaviest of the other experts; all the rest is on those m, and one
of them has at least the mean. What m ranks allow at best falls with m (the running minimum of it), and
ranks beyond the first cost a slot each: below the bound, experts would need more slots than there are.

An expert that is on all ranks, evenly, leaves each of them with that much less and a slot fewer. So the
bound is either that of all but one rank for it, or its share and the bound of the others. More replicas
than ranks, which are not even, put two on some rank.
"""

from __future__ import annotations

import numpy as np

from .compiling import SOURCES, _compile, compile_entrance

__all__ = ["bound_rows"]

_HOTTEST = 64  # experts whose ranks are counted; the others take a slot each
_DEPTH = 3  # experts that are taken off since they are on every rank


@_compile
def _rank_bound(load, room):
    """No placement has a lower peak.

    Args:
        load: float64 [experts], all that the ranks hold.
        room: int64 [ranks], their slots; no fewer than experts.
    """
    falling = -np.sort(-load)
    slots = np.sort(room)
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


@_compile
def _slots_bound(falling, slots, spare):
    """The bound by counting slots, and what the hottest expert allows on all ranks but one.

    Args:
        falling: float64 [experts].
        slots: int64 [ranks], rising.
        spare: slots that are not an expert's first.
    """
    num_experts, num_ranks = falling.shape[0], slots.shape[0]
    heaviest = np.zeros(num_experts + 1)
    for expert in range(num_experts):
        heaviest[expert + 1] = heaviest[expert] + falling[expert]
    total = heaviest[num_experts]
    most = min(num_ranks, spare + 1)
    # No more experts than there are spare slots, and one, can decide.
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
        # Whoever is above the bound needs another slot.
        place = lowest.shape[0] - 1 - spare
        bound = max(bound, np.partition(lowest, place)[place])
    return bound, all_but_one


def _entrance(sources):
    @compile_entrance
    def bound_rows(load, room, bound):
        """Write the bound of each row of `load`, float64 [X, experts], to float64 `bound` [X]."""
        _ = sources  # what is closed over belongs to the key of the cache
        for row in range(load.shape[0]):
            bound[row] = _rank_bound(load[row], room)

    return bound_rows


bound_rows = _entrance(SOURCES)
