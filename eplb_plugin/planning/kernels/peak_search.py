"""Lowering the true peak of a single load, which has no future to differ from."""

from __future__ import annotations

import numpy as np

from .compiling import _compile
from .limits import _TRIED_RANKS
from .peak_changes import _best_peak_change, _make_peak_change
from .peak_state import _enter_node, _refresh_ranks
from .peak_swaps import _best_peak_swap


@_compile
def _lower_node(node, capacity, rounds, target):
    """Lower the peak of what `node.expert` holds by swaps and changes of replicas, until it is at most
    `target` or nothing helps; returns it.

    A round relieves the heaviest rank that can be relieved. There are `rounds`, and one more for every four
    ranks where ranks have more than two slots; with two, many exchanges gain little. A quarter of `rounds`
    look at changes of replicas too, which takes longer than swaps.
    """
    _enter_node(node, capacity)
    load, order = node.load, node.order
    failed = np.zeros(load.shape[0], np.bool_)
    fresh = True  # whether ranks failed against the placement as it is now
    looks = rounds // 4
    for _ in range(rounds + (load.shape[0] // 4 if capacity > 2 else 0)):
        peak = load[order[-1]]
        if peak <= target:
            break
        improved = False
        at = order.shape[0]
        for _ in range(_TRIED_RANKS):
            at -= 1
            while at >= 0 and failed[order[at]]:
                at -= 1
            # Ranks that tie for the peak are relieved one after the other; others do not set it.
            if at < 0 or load[order[at]] < peak * (1.0 - 1e-4):
                break
            heavy = order[at]
            mine, other = _best_peak_swap(node, capacity, heavy)
            if mine >= 0:
                node.expert[mine], node.expert[other] = node.expert[other], node.expert[mine]
                partner = other // capacity
                _refresh_ranks(node, capacity, heavy)
                _refresh_ranks(node, capacity, partner)
                failed[partner] = False
                fresh = False
                improved = True
                break
            expert, slot = -1, -1
            if looks > 0:
                expert, slot = _best_peak_change(node, capacity, heavy)
                looks -= 1
            if slot >= 0:
                _make_peak_change(node, capacity, expert, slot)
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
    return load[order[-1]]
