"""The best additional replica for an expert of the heaviest rank, for the peak of a single load."""

from __future__ import annotations

import numpy as np

from .compiling import _compile
from .limits import _LEAST_EXACT_GAIN

_SHORTLIST = 3  # slots that are looked at closely for each expert that might get a replica


@_compile
def _best_peak_change(weight, load, slot_expert, count, held, heavy, ranks_per_node, capacity):
    """The change of a replica that lowers the peak most, for an expert of `heavy`: (expert, slot), or -1."""
    num_logical, num_ranks = held.shape
    first = heavy // ranks_per_node * ranks_per_node
    low, high = first * capacity, (first + ranks_per_node) * capacity
    # The heaviest rank that shares an expert with several replicas bounds what taking one away costs.
    heaviest_holder = np.zeros(num_logical, np.float32)
    surplus = np.empty(high - low, np.int64)
    num_surplus = 0
    for slot in range(low, high):
        expert = slot_expert[slot]
        if expert >= 0 and count[expert] > 1:
            heaviest_holder[expert] = max(heaviest_holder[expert], load[slot // capacity])
            surplus[num_surplus] = slot
            num_surplus += 1
    best = load.max() - np.float32(_LEAST_EXACT_GAIN)
    best_expert, best_slot = -1, -1
    if num_surplus == 0:
        return best_expert, best_slot
    staying = np.empty(num_surplus, np.float64)
    burden = np.empty(num_surplus, np.float64)
    for at in range(num_surplus):
        y = slot_expert[surplus[at]]
        staying[at] = load[surplus[at] // capacity] - weight[y] / count[y]
        burden[at] = heaviest_holder[y] + weight[y] / (count[y] - 1) - weight[y] / count[y]
    short_slot = np.empty(_SHORTLIST, np.int64)
    short_value = np.empty(_SHORTLIST, np.float64)
    for place in range(heavy * capacity, (heavy + 1) * capacity):
        x = slot_expert[place]
        if x < 0:
            continue
        short_slot[:] = -1
        short_value[:] = load[heavy]
        arriving = weight[x] / (count[x] + 1)
        for number in range(num_surplus):
            value = max(staying[number] + arriving, burden[number])
            at = _SHORTLIST - 1
            if value >= short_value[at]:
                continue
            slot = surplus[number]
            if slot_expert[slot] == x or held[x, slot // capacity] > 0:
                continue
            while at > 0 and value < short_value[at - 1]:
                short_value[at], short_slot[at] = short_value[at - 1], short_slot[at - 1]
                at -= 1
            short_value[at], short_slot[at] = value, slot
        fewer = np.float32(1.0 / count[x] - 1.0 / (count[x] + 1))
        for at in range(_SHORTLIST):
            slot = short_slot[at]
            if slot < 0:
                break
            y = slot_expert[slot]
            rank = slot // capacity
            more = np.float32(1.0 / (count[y] - 1) - 1.0 / count[y])
            highest = np.float32(0.0)
            for r in range(num_ranks):
                after = load[r] - weight[x] * fewer * np.float32(held[x, r])
                after += weight[y] * more * np.float32(held[y, r] - (1 if r == rank else 0))
                if r == rank:
                    after += weight[x] * np.float32(1.0 / (count[x] + 1)) - weight[y] * np.float32(
                        1.0 / count[y]
                    )
                highest = max(highest, after)
            if highest < best:
                best = highest
                best_expert, best_slot = x, slot
    return best_expert, best_slot
