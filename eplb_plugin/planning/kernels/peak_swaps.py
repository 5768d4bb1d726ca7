"""The best swap of the heaviest rank with another rank, for the peak of a single load."""

from __future__ import annotations

import numpy as np

from .compiling import _compile
from .limits import _LEAST_EXACT_GAIN


@_compile
def _keep_lowest_peaks(given, mine, share, rest, lowest):
    """Lower `lowest` to the higher of two ranks after swaps of one slot of the heavy rank with each slot."""
    for at in range(lowest.shape[0]):
        here, there = mine - given + share[at], rest[at] + given
        after = here if here > there else there
        lowest[at] = after if after < lowest[at] else lowest[at]


@_compile
def _best_peak_swap(share, slot_load, slot_expert, held, heavy, ranks_per_node, capacity, rest, lowest):
    """The swap that leaves `heavy` and its partner the lowest: (slot, other slot), or -1 where none helps.

    `rest` and `lowest` are scratch, float32 [slots of a node].
    """
    first = heavy // ranks_per_node * ranks_per_node
    low = first * capacity
    mine = slot_load[heavy * capacity]
    best = mine - np.float32(_LEAST_EXACT_GAIN)
    for at in range(rest.shape[0]):
        closed = slot_expert[low + at] < 0 or (low + at) // capacity == heavy
        rest[at] = np.float32(np.inf) if closed else slot_load[low + at] - share[low + at]
    lowest[:] = best
    partners = share[low : low + rest.shape[0]]
    for place in range(heavy * capacity, (heavy + 1) * capacity):
        if slot_expert[place] >= 0:
            _keep_lowest_peaks(share[place], mine, partners, rest, lowest)
    best_mine, best_other = -1, -1
    for at in range(rest.shape[0]):
        if lowest[at] >= best or held[slot_expert[low + at], heavy] > 0:
            continue
        rank = (low + at) // capacity
        for place in range(heavy * capacity, (heavy + 1) * capacity):
            x = slot_expert[place]
            if x < 0 or held[x, rank] > 0:
                continue
            after = max(mine - share[place] + share[low + at], rest[at] + share[place])
            if after < best:
                best = after
                best_mine, best_other = place, low + at
    return best_mine, best_other


@_compile
def _swap(share, load, slot_load, slot_expert, held, mine, other, capacity):
    x, y = slot_expert[mine], slot_expert[other]
    a, b = mine // capacity, other // capacity
    held[x, a] -= 1
    held[y, b] -= 1
    held[x, b] += 1
    held[y, a] += 1
    slot_expert[mine], slot_expert[other] = y, x
    for snapshot in range(load.shape[0]):
        shift = share[snapshot, mine] - share[snapshot, other]
        share[snapshot, mine], share[snapshot, other] = share[snapshot, other], share[snapshot, mine]
        load[snapshot, a] -= shift
        load[snapshot, b] += shift
        for slot in range(a * capacity, (a + 1) * capacity):
            slot_load[snapshot, slot] = load[snapshot, a]
        for slot in range(b * capacity, (b + 1) * capacity):
            slot_load[snapshot, slot] = load[snapshot, b]
