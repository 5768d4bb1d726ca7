"""The best additional replica for an expert of a heavy rank, for the peak of a single load."""

from __future__ import annotations

import numpy as np

from .compiling import _compile
from .limits import _LEAST_EXACT_GAIN
from .peak_state import _holds, _refresh_ranks

_SHORTLIST = 3  # slots that are looked at closely for each expert that might get a replica


@_compile
def _best_peak_change(node, capacity, heavy):
    """The change of a replica that lowers the peak of the node most, for an expert of `heavy`: (expert,
    slot), or -1 where none does."""
    weight, count, expert, share, load = node.weight, node.replicas, node.expert, node.share, node.load
    num_slots = expert.shape[0]
    peak = load[node.order[-1]]
    best = peak - _LEAST_EXACT_GAIN
    best_expert, best_slot = -1, -1
    # The heaviest rank that shares an expert with several replicas bounds what taking one away costs.
    burden = np.zeros(count.shape[0], np.float64)
    for slot in range(num_slots):
        held = expert[slot]
        if held >= 0 and count[held] > 1:
            burden[held] = max(burden[held], load[slot // capacity])
    surplus = np.empty(num_slots, np.int64)
    num_surplus = 0
    for slot in range(num_slots):
        held = expert[slot]
        if held >= 0 and count[held] > 1:
            after = burden[held] + weight[held] / (count[held] - 1) - share[slot]
            if after < best and load[slot // capacity] - share[slot] < best:
                surplus[num_surplus] = slot
                num_surplus += 1
    if num_surplus == 0:
        return best_expert, best_slot
    short_slot = np.empty(_SHORTLIST, np.int64)
    short_value = np.empty(_SHORTLIST, np.float64)
    after = np.empty(load.shape[0], np.float64)
    for mine in range(heavy * capacity, heavy * capacity + node.room[heavy]):
        x = expert[mine]
        short_slot[:] = -1
        short_value[:] = best
        arriving = weight[x] / (count[x] + 1)
        if load[heavy] - share[mine] + arriving >= best:
            continue
        for number in range(num_surplus):
            slot = surplus[number]
            rank, y = slot // capacity, expert[slot]
            more = weight[y] / (count[y] - 1) - share[slot]
            value = max(load[rank] - share[slot] + arriving, burden[y] + more)
            at = _SHORTLIST - 1
            if value >= short_value[at] or _holds(expert, capacity, rank, x):
                continue
            while at > 0 and value < short_value[at - 1]:
                short_value[at], short_slot[at] = short_value[at - 1], short_slot[at - 1]
                at -= 1
            short_value[at], short_slot[at] = value, slot
        for at in range(_SHORTLIST):
            slot = short_slot[at]
            if slot < 0 or short_value[at] >= best:
                break
            highest = _peak_after_change(node, capacity, x, slot, after)
            if highest < best:
                best = highest
                best_expert, best_slot = x, slot
    return best_expert, best_slot


@_compile
def _peak_after_change(node, capacity, arrives, slot, after):
    """The peak of the node when `slot` gets a replica of `arrives`; `after` is scratch, float64 [ranks]."""
    weight, count, expert = node.weight, node.replicas, node.expert
    leaves = expert[slot]
    fewer = weight[arrives] / count[arrives] - weight[arrives] / (count[arrives] + 1)
    more = weight[leaves] / (count[leaves] - 1) - weight[leaves] / count[leaves]
    for rank in range(after.shape[0]):
        after[rank] = node.load[rank]
    for other in range(expert.shape[0]):
        if expert[other] == arrives:
            after[other // capacity] -= fewer
        elif expert[other] == leaves and other != slot:
            after[other // capacity] += more
    after[slot // capacity] += weight[arrives] / (count[arrives] + 1) - weight[leaves] / count[leaves]
    highest = 0.0
    for rank in range(after.shape[0]):
        highest = max(highest, after[rank])
    return highest


@_compile
def _make_peak_change(node, capacity, arrives, slot):
    leaves = node.expert[slot]
    node.replicas[leaves] -= 1
    node.replicas[arrives] += 1
    node.expert[slot] = arrives
    for rank in range(node.load.shape[0]):
        if _holds(node.expert, capacity, rank, arrives) or _holds(node.expert, capacity, rank, leaves):
            _refresh_ranks(node, capacity, rank)
