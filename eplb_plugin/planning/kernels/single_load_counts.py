"""Replica counts other than the greedy ones, for a single load.

Greedy counts give the lowest hottest replica, but not always the lowest peak.

- `isolating_counts`: no two of the hottest experts need to share a rank.
- `best_pair_counts`: a search for ranks of two slots. There, the best packing of given replicas is known: the
  heaviest with the lightest, the second heaviest with the second lightest, and so on. LPT packing gives it, and
  one pass over the experts its peak. So thousands of counts can be tried. Example: loads of 600, 560, 120, 120,
  20, 10, 10 and 10 on eight ranks. Greedy counts are 5, 4, 2, 1, 1, 1, 1 and 1, with a peak of 232. With 4, 4,
  2, 2, 1, 1, 1 and 1 the peak is 200.

The search is threshold accepting. Each trial moves one replica from one expert to another, both chosen by
pseudo-random numbers. It is kept if it raises the peak by less than a threshold that falls to zero.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiling import copy_into, jitable
from .lpt_packing import splitmix64
from .replica_counts import add_replicas

__all__ = ["PairedReplicas", "best_pair_counts", "heaviest_pair", "isolating_counts", "paired_replicas"]

_TRIALS = 4000  # of a search
_EFFORT = 1 << 19  # experts of all its trials together, so that a large node takes no longer
_REACH = 16  # experts up to which the threshold begins at the whole gap to the bound; with more, at less
_GUIDED = 0.5  # trials that give the replica to an expert which may lower the peak
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # the step of a counter, for SplitMix64


@jitable
def isolating_counts(total, order, hot, num_slots, num_ranks, ranks, to_lightest):
    """Replica counts with which the hottest experts need not share ranks: int64 [experts].

    Args:
        total: float64 [experts], load of each expert.
        order: int64 [experts], experts in falling order of load.
        hot: number of hottest experts. Together they get at most `ranks` replicas.
        num_slots, num_ranks: open slots and ranks of the node.
        to_lightest: whether other spare slots go to the lightest experts; otherwise greedily.
    """
    count = np.ones(total.shape[0], np.int64)
    key = -total
    none = np.zeros(total.shape[0], np.int64)
    others = total.shape[0] - hot
    spare = num_slots - total.shape[0]
    spare_hot = min(spare, ranks - hot)
    most = max(num_ranks, -(-(num_slots - hot - spare_hot) // others))
    heap = order.copy()
    add_replicas(total, none, 1.0, heap[:hot], hot, spare_hot, num_ranks, key, count)
    if to_lightest:
        for place in range(spare - spare_hot):
            count[order[order.shape[0] - 1 - place % others]] += 1
        return count
    add_replicas(total, none, 1.0, heap[hot:], others, spare - spare_hot, most, key, count)
    return count


class PairedReplicas(NamedTuple):
    """Replica counts of the experts on ranks of two slots, and the order in which replicas are paired."""

    num_ranks: int
    weight: np.ndarray  # float64 [experts], load of each expert
    count: np.ndarray  # int64 [experts], replicas of each; together twice the ranks, none more than the ranks
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
    count, share, order = pairs.count, pairs.share, pairs.order
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
def _set_count(pairs, expert, number):
    """Give an expert another number of replicas. The order is nearly right: few places change."""
    share, order, place = pairs.share, pairs.order, pairs.place
    pairs.count[expert] = number
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


@jitable
def best_pair_counts(weight, count, num_experts, num_ranks, bound, target, seed):
    """Search for replica counts with a low peak on ranks of two slots.

    Args:
        weight: float64 [experts], load of each expert. The slots that a rank lacks may be one more expert
            without load, the last one.
        count: int64 [experts], replicas of each to start from; written. Together twice the ranks, and none
            more than the ranks.
        num_experts: experts whose counts may change, at least two.
        bound: a lower bound on the peak for any counts.
        target: peak at which the search ends.
        seed: of the pseudo-random numbers.

    Returns:
        The peak.
    """
    pairs = paired_replicas(weight, count.copy(), num_ranks)
    peak, heavy, light = heaviest_pair(pairs, np.inf)
    best = peak
    order = pairs.order
    reach = min(1.0, _REACH / num_experts)
    trials = min(_TRIALS, _EFFORT // order.shape[0])
    counter = np.uint64(seed)
    for trial in range(trials):
        if best <= target:
            break
        counter += np.uint64(_GOLDEN_GAMMA)
        word = splitmix64(counter)
        giver = _below(num_experts, word)
        word = splitmix64(word)
        taker = _below(num_experts, word)
        guide = np.float64(word & np.uint64(0xFFFF)) * 2.0**-16
        if guide < _GUIDED:
            # One of the pair, or an expert whose replicas are lighter still.
            if guide < _GUIDED / 3:
                taker = order[heavy]
            elif guide < _GUIDED * 2 / 3:
                taker = order[light]
            else:
                taker = order[light + _below(order.shape[0] - light, word)]
        given, taken = pairs.count[giver], pairs.count[taker]
        if giver == taker or given == 1 or taken == num_ranks or taker >= num_experts:
            continue
        word = splitmix64(word)
        left = 1.0 - trial / trials
        threshold = reach * (best - bound) * left * left * np.float64(word >> np.uint64(11)) * 2.0**-53
        _set_count(pairs, giver, given - 1)
        _set_count(pairs, taker, taken + 1)
        after, after_heavy, after_light = heaviest_pair(pairs, peak + threshold)
        if after < peak + threshold:
            peak, heavy, light = after, after_heavy, after_light
            if peak < best:
                best = peak
                copy_into(count, pairs.count)
        else:
            _set_count(pairs, giver, given)
            _set_count(pairs, taker, taken)
    return best


@jitable
def _below(bound, word):
    """A pseudo-random number below `bound`, from the upper 32 bits of a word."""
    return np.int64(np.float64(word >> np.uint64(32)) * 2.0**-32 * bound)
