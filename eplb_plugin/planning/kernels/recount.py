"""Other replica counts for a node whose peak no single exchange lowers.

Greedy counts give the lowest hottest replica. The lowest peak may take others: where two hot experts have to
share a rank, say, one more replica of the second is worth more than the seventh of the first. To get there
takes a change of counts and a new packing at once.
"""

from __future__ import annotations

import numpy as np

from .compiling import _compile
from .copying import _copy
from .hand_out import _hand_out
from .limits import _LEAST_EXACT_GAIN
from .peak_search import _lower_node

_GAINERS = 3  # experts of the heaviest rank that might get a replica
_DONORS = 4  # experts that might lose one
_ROUNDS = 40  # of improvement for each packing: enough to tell which counts are better
_EFFORT = 1536  # slots to pack anew in all, so that a node of any size takes as long


@_compile
def _recount(node, capacity, one_node, target, peak, best):
    """Lower the peak of a node by taking a replica from one expert, giving it to one of the heaviest rank,
    and packing anew, as long as that helps and does not exceed `_EFFORT`.

    Args:
        node: as it was left by `_lower_node`.
        one_node: int64 [experts], zeros.
        peak: of `node`.
        best: int64 [slots], what `node` holds; written where something better is found.

    Returns:
        The peak of `best`.
    """
    weight = node.weight
    count = node.replicas.copy()
    trial = count.copy()
    gainers = np.empty(_GAINERS, np.int64)
    donors = np.empty(_DONORS, np.int64)
    num_gainers = _heaviest_of_peak(node, capacity, gainers)
    gainer, donor = 0, 0
    num_donors = 0
    for _ in range(_EFFORT // best.shape[0]):
        while gainer < num_gainers and donor == num_donors:
            if num_donors > 0:
                gainer += 1
            donor, num_donors = 0, 0
            if gainer < num_gainers:
                num_donors = _cheapest_donors(weight, count, gainers[gainer], donors)
                if num_donors == 0:
                    gainer += 1
        if gainer >= num_gainers:
            break
        _copy(count, trial)
        trial[gainers[gainer]] += 1
        trial[donors[donor]] -= 1
        donor += 1
        _hand_out(weight, trial, one_node, node.room.shape[0], node.room, 0, 0, node.expert)
        if _repeats(node.expert, capacity):
            continue
        value = _lower_node(node, capacity, _ROUNDS, target)
        if value < peak - _LEAST_EXACT_GAIN:
            peak = value
            _copy(node.expert, best)
            if peak <= target:
                break
            _copy(node.replicas, count)
            num_gainers = _heaviest_of_peak(node, capacity, gainers)
            gainer, donor, num_donors = 0, 0, 0
    return peak


@_compile
def _heaviest_of_peak(node, capacity, gainers):
    """List the experts of the heaviest rank with the largest shares, but for those that have a replica for
    each rank; returns how many there are."""
    heavy = node.order[-1]
    number = 0
    for slot in range(heavy * capacity, heavy * capacity + node.room[heavy]):
        if node.replicas[node.expert[slot]] < node.room.shape[0] and number < gainers.shape[0]:
            gainers[number] = node.expert[slot]
            number += 1
    return number


@_compile
def _repeats(expert, capacity):
    """Whether a rank holds an expert twice."""
    for slot in range(expert.shape[0]):
        for other in range(slot // capacity * capacity, slot):
            if expert[slot] >= 0 and expert[other] == expert[slot]:
                return True
    return False


@_compile
def _cheapest_donors(weight, count, gainer, donors):
    """List the experts whose replicas weigh least when they have one less; returns how many there are."""
    number = 0
    for expert in range(count.shape[0]):
        if count[expert] < 2 or expert == gainer:
            continue
        part = weight[expert] / (count[expert] - 1)
        at = number
        while at > 0 and weight[donors[at - 1]] / (count[donors[at - 1]] - 1) > part:
            if at < donors.shape[0]:
                donors[at] = donors[at - 1]
            at -= 1
        if at < donors.shape[0]:
            donors[at] = expert
            number = min(number + 1, donors.shape[0])
    return number
