"""Two slots a rank: the peak of given replica counts for a single load.

The best packing pairs the heaviest replica with the lightest, the second heaviest with the second lightest,
and so on. LPT packing makes these pairs. Replicas of an expert are equally heavy, so all pairs of the same
two experts are counted at once, without any packing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiling import jitable

__all__ = ["PairedReplicas", "heaviest_pair", "paired_replicas", "set_count"]


class PairedReplicas(NamedTuple):
    """Replica counts of the experts on ranks of two slots, and the order in which replicas are paired."""

    num_ranks: int
    weight: np.ndarray  # float64 [experts], load of each expert
    replicas: (
        np.ndarray
    )  # int64 [experts], replicas of each; together twice the ranks, none more than the ranks
    share: np.ndarray  # float64 [experts], load of a replica
    order: np.ndarray  # int64 [experts], experts by falling share, equal ones in any order
    place: np.ndarray  # int64 [experts], place of each expert in `order`


@jitable
def paired_replicas(weight, count, num_ranks):
    """Pair the replicas of `count`, which the result shares."""
    share = weight / count
    order = np.argsort(-share, kind="mergesort")
    place = np.empty(order.shape[0], np.int64)
    for at in range(order.shape[0]):
        place[order[at]] = at
    return PairedReplicas(num_ranks, weight, count, share, order, place)


@jitable
def heaviest_pair(pairs, limit):
    """The peak of the best packing, and where the heaviest pair comes from.

    An expert in the middle of the order may meet itself. Its replicas then go to the middle ones of all other
    replicas, half of these heavier and half lighter. No packing with replicas on different ranks is better.

    Returns:
        The peak; the first peak that is no lower than `limit` ends the pass. The places in `order` of the
        heavier and the lighter expert of that pair.
    """
    count, share, order = pairs.replicas, pairs.share, pairs.order
    heavy, light = 0, order.shape[0] - 1
    heavy_left, light_left = count[order[heavy]], count[order[light]]
    peak, peak_heavy, peak_light = 0.0, heavy, light
    while heavy < light:
        both = share[order[heavy]] + share[order[light]]
        if both > peak:
            peak, peak_heavy, peak_light = both, heavy, light
            if peak >= limit:
                return peak, peak_heavy, peak_light
        paired = min(heavy_left, light_left)
        heavy_left -= paired
        light_left -= paired
        if heavy_left == 0:
            heavy += 1
            # Both ends of the order may have met: the rest is one expert's.
            heavy_left = light_left if heavy == light else count[order[heavy]]
        if light_left == 0:
            light -= 1
            light_left = heavy_left if heavy == light else count[order[light]]
    if heavy == light and heavy_left > 1:
        middle = order[heavy]
        # The heaviest ranks that need no replica of the expert in the middle.
        without = pairs.num_ranks - count[middle]
        partner = 0
        while without >= count[order[partner]]:
            without -= count[order[partner]]
            partner += 1
        both = share[middle] + share[order[partner]]
        if both > peak:
            peak, peak_heavy, peak_light = both, partner, heavy
    return peak, peak_heavy, peak_light


@jitable
def set_count(pairs, expert, number):
    """Give an expert another number of replicas. The order is nearly right: few places change."""
    share, order, place = pairs.share, pairs.order, pairs.place
    pairs.replicas[expert] = number
    part = pairs.weight[expert] / number
    share[expert] = part
    at = place[expert]
    while at > 0 and share[order[at - 1]] < part:
        order[at] = order[at - 1]
        place[order[at]] = at
        at -= 1
    while at + 1 < order.shape[0] and share[order[at + 1]] > part:
        order[at] = order[at + 1]
        place[order[at]] = at
        at += 1
    order[at] = expert
    place[expert] = at
