"""Replica counts with which the hottest experts of a node need not share ranks.

Greedy counts give the lowest hottest replica, and often more hot replicas than ranks: experts of 100 and 50
get seven and three on eight ranks, say, so that two ranks hold both, with a load of 31. With five and three
replicas, of 20 and 17, every rank has one.
"""

from __future__ import annotations

import numpy as np

from .compiling import _compile
from .copying import _copy
from .counts import _give_slots
from .hand_out import _hand_out
from .packing_bounds import _counts_bound
from .peak_search import _lower_node

_MOST_HOT = 16  # experts; with more of them none is much hotter than the next
_FEWER = 3  # ranks are tried to be without any of them: none, one, two


@_compile
def _set_apart(node, capacity, one_node, rounds, target, tolerance, peak, best):
    """Lower the peak of a node by counts that set its 1, 2, 3, ... hottest experts apart, each packed anew,
    until it is within `tolerance` of `target`.

    They get one replica for each rank together, or leave a rank or two without any. Other spare slots go to
    whoever has most load per replica, or to the lightest experts: splitting those takes nobody's place.

    Args:
        node: written.
        one_node: int64 [experts], zeros.
        peak: of `best`.
        best: int64 [slots]; written where something better is found.

    Returns:
        The peak of `best`.
    """
    num_ranks, num_slots = node.room.shape[0], node.room.sum()
    order = np.argsort(-node.weight, kind="mergesort")
    for way in range(2 * _FEWER):
        ranks, to_lightest = num_ranks - way // 2, way % 2 == 1
        for hot in range(2 if way == 0 else 1, min(_MOST_HOT, ranks, order.shape[0] - 1) + 1):
            count = _counts_apart(node.weight, order, hot, num_slots, num_ranks, ranks, to_lightest)
            if _counts_bound(node.weight, count, node.room) >= peak - tolerance:
                continue
            _hand_out(node.weight, count, one_node, num_ranks, node.room, 0, 0, node.expert)
            value = _lower_node(node, capacity, rounds, target)
            if value < peak:
                peak = value
                _copy(node.expert, best)
            if peak <= target + tolerance:
                return peak
    return peak


@_compile
def _counts_apart(total, order, hot, num_slots, num_ranks, ranks, to_lightest):
    """Replicas of each expert, int64 [experts]: of the `hot` first of `order`, the heaviest, at most one on
    each of so many `ranks` together; greedy on load per replica apart from that. Other spare slots go
    `to_lightest`, or greedily to all other experts."""
    count = np.ones(total.shape[0], np.int64)
    key = -total
    none = np.zeros(total.shape[0], np.int64)
    cold = total.shape[0] - hot
    spare = num_slots - total.shape[0]
    spare_hot = min(spare, ranks - hot)
    bound = max(num_ranks, -(-(num_slots - hot - spare_hot) // cold))
    heap = order.copy()
    _give_slots(total, none, 1.0, heap[:hot], hot, spare_hot, num_ranks, key, count)
    if to_lightest:
        for place in range(spare - spare_hot):
            count[order[order.shape[0] - 1 - place % cold]] += 1
        return count
    _give_slots(total, none, 1.0, heap[hot:], cold, spare - spare_hot, bound, key, count)
    return count
