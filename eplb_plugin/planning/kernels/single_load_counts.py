"""Replica counts other than the greedy ones, for a single load.

Greedy counts give the lowest hottest replica, but not always the lowest peak.

- `isolating_counts`: no two of the hottest experts need to share a rank.
- `pair_counts`: for ranks of two slots. There, the peak of given counts takes one pass over the experts
  (`single_load_pairs`). So thousands of counts can be tried: in small cases all, in others those that a
  search visits. Example: loads of 600, 560, 120, 120, 20, 10, 10 and 10 on eight ranks. Greedy counts are 5,
  5, 1, 1, 1, 1, 1 and 1, with a peak of 232. With 4, 3, 1, 4, 1, 1, 1 and 1 it is 196.7.
"""

from __future__ import annotations

import numpy as np

from .compiling import copy_into, jitable
from .lower_bounds import rank_bound
from .lpt_packing import splitmix64
from .replica_counts import add_replicas, greedy_counts
from .single_load_pairs import heaviest_pair, paired_replicas, set_count

__all__ = ["isolating_counts", "pair_counts", "pair_counts_by_node"]

_WORTH_SEARCH = 4  # most ranks for each spare slot; with more ranks, other counts gain next to nothing
_MOST_COUNTS = 4000  # all of which are tried, instead of a search
_SEARCHES = 4  # from the same counts, with other pseudo-random numbers; one for large nodes
_TRIALS = 1000  # of a search
_EFFORT = 1 << 18  # experts of all trials together, so that a large node takes hardly longer
_REACH = 16  # experts up to which the threshold begins at the whole gap to the bound; with more, at less
_GUIDED = 0.5  # share of the trials whose replica goes to an expert that is likely to lower the peak
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the step of the counter of SplitMix64


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


@jitable
def pair_counts(weight, rank_slots, target, tolerance, seed):
    """Replica counts with a low peak on ranks of at most two slots.

    Each slot that a rank lacks holds one more expert without load, the last one, so that all ranks have two.

    Args:
        weight: float64 [experts], load of at least two experts.
        rank_slots: int64 [ranks], open slots of each rank, 0, 1 or 2.
        target: peak at which the search ends. It also ends within `tolerance` of the lower bound.
        seed: of the pseudo-random numbers.

    Returns:
        The peak. The load of each expert, float64 [experts], and its replicas, int64 [experts]. These are the
        given experts, and one more where ranks lack slots.
    """
    num_experts, num_slots = weight.shape[0], rank_slots.sum()
    num_ranks, num_closed = 0, 0
    for slots in rank_slots:
        num_ranks += slots > 0
        num_closed += slots == 1
    size = num_experts + (num_closed > 0)
    total = np.zeros(size, np.float64)
    copy_into(total[:num_experts], weight)
    none = np.zeros(num_experts, np.int64)
    count = np.full(size, num_closed, np.int64)
    greedy = greedy_counts(weight, none, none, 1.0, num_slots, num_ranks, num_ranks)
    copy_into(count[:num_experts], greedy)
    peak = heaviest_pair(paired_replicas(total, count, num_ranks), np.inf)[0]
    if peak > target and _WORTH_SEARCH * (num_slots - num_experts) >= num_ranks:
        bound = rank_bound(weight, rank_slots)
        target = max(target, bound + tolerance)
        if peak > target:
            peak = _isolate_hottest(weight, num_slots, num_ranks, total, peak, count)
            fewest = _fewest_replicas(weight, peak)
            if _num_counts(fewest, num_slots) > _MOST_COUNTS:
                peak = _search_counts(total, count, num_experts, num_ranks, bound, target, seed)
                fewest = _fewest_replicas(weight, peak)
            if _num_counts(fewest, num_slots) <= _MOST_COUNTS:
                peak = _try_all_counts(total, count, fewest, num_slots, num_ranks, peak)
    return peak, total, count


@jitable
def pair_counts_by_node(total, expert_node, rank_slots, ranks_per_node, tolerance, seed, count):
    """Write `pair_counts` of each node to `count`, int64 [logical], which holds the greedy counts.

    Nothing changes where a rank has other than two slots.

    Args:
        total: float64 [logical], load of each expert.
        expert_node: int64 [logical], node of each expert.
        ranks_per_node: ranks of each node.

    Returns:
        Whether any count changed. Other arguments are those of `pair_counts`.
    """
    changed = False
    if rank_slots.min() != 2 or rank_slots.max() != 2:
        return changed
    members = np.empty(total.shape[0], np.int64)
    weight = np.empty(total.shape[0], np.float64)
    for first in range(0, rank_slots.shape[0], ranks_per_node):
        size = 0
        for expert in range(total.shape[0]):
            if expert_node[expert] == first // ranks_per_node:
                members[size], weight[size] = expert, total[expert]
                size += 1
        if size > 1:
            slots = rank_slots[first : first + ranks_per_node]
            _, _, found = pair_counts(weight[:size], slots, 0.0, tolerance, seed)
            for at in range(size):
                changed |= count[members[at]] != found[at]
                count[members[at]] = found[at]
    return changed


@jitable
def _isolate_hottest(weight, num_slots, num_ranks, total, peak, count):
    """Isolate the 2, 3, 4, 6, 9, ... hottest experts, whichever gives the lowest peak. Returns the peak.

    `count`, int64 [experts or one more], stays as it is where no peak is below `peak`. Arguments are
    otherwise those of `pair_counts`, or computed there.
    """
    order = np.argsort(-weight, kind="mergesort")
    trial = count.copy()
    hot = 2
    while hot <= min(num_ranks, order.shape[0] - 1):
        isolated = isolating_counts(weight, order, hot, num_slots, num_ranks, num_ranks, False)
        copy_into(trial[: order.shape[0]], isolated)
        value = heaviest_pair(paired_replicas(total, trial, num_ranks), peak)[0]
        if value < peak:
            peak = value
            copy_into(count, trial)
        hot = hot * 3 // 2
    return peak


@jitable
def _fewest_replicas(weight, peak):
    """The fewest replicas of each expert for any peak below `peak`: int64 [experts]."""
    fewest = np.empty(weight.shape[0], np.int64)
    for expert in range(weight.shape[0]):
        number = 1 + np.int64(weight[expert] / peak)
        # The quotient may be rounded either way.
        while number > 1 and weight[expert] / (number - 1) < peak:
            number -= 1
        while weight[expert] / number >= peak:
            number += 1
        fewest[expert] = number
    return fewest


@jitable
def _num_counts(fewest, num_slots):
    """How many replica counts have at least `fewest` each; just some number above `_MOST_COUNTS` for many."""
    spare = num_slots - fewest.sum()
    if spare < 0:
        return 0
    number = 1
    for expert in range(1, fewest.shape[0]):
        # Exact: the product of so many factors is a binomial coefficient.
        number = number * (spare + expert) // expert
        if number > _MOST_COUNTS:
            break
    return number


@jitable
def _try_all_counts(total, count, fewest, num_slots, num_ranks, peak):
    """Write the replica counts with the lowest peak to `count`, if it is below `peak`. Returns the peak.

    All counts of at least `fewest` each are tried. The last expert has the rest of the slots, and the others
    count up as the digits of a number.
    """
    last, spare = fewest.shape[0] - 1, num_slots - fewest.sum()
    trial = count.copy()
    copy_into(trial[: last + 1], fewest)
    if spare < 0 or fewest.max() > num_ranks:
        return peak
    trial[last] += spare
    pairs = paired_replicas(total, trial, num_ranks)
    while True:
        if trial[last] <= num_ranks:
            after = heaviest_pair(pairs, peak)[0]
            if after < peak:
                peak = after
                copy_into(count, trial)
        digit = 0
        while digit < last and (spare == 0 or trial[digit] == num_ranks):
            spare += trial[digit] - fewest[digit]
            set_count(pairs, digit, fewest[digit])
            digit += 1
        if digit == last:
            return peak
        spare -= 1
        set_count(pairs, digit, trial[digit] + 1)
        set_count(pairs, last, fewest[last] + spare)


@jitable
def _search_counts(total, count, num_experts, num_ranks, bound, target, seed):
    """Lower the peak by threshold accepting. Returns the peak.

    Each trial takes a replica from one expert for another. It is kept if it raises the peak by less than a
    threshold, which falls to zero. Both experts and a factor on the threshold are pseudo-random.

    Args:
        total: float64 [experts], load of each expert.
        count: int64 [experts], replicas of each; written.
        num_experts: the first experts, whose counts may change.
        bound: a lower bound on the peak for any counts.
        target: peak at which the search ends.
    """
    start = count.copy()
    best = heaviest_pair(paired_replicas(total, start, num_ranks), np.inf)[0]
    reach = min(1.0, _REACH / num_experts)
    trials = min(_TRIALS, _EFFORT // num_experts)
    counter = np.uint64(seed)
    for _ in range(max(1, min(_SEARCHES, _EFFORT // (trials * num_experts)))):
        pairs = paired_replicas(total, start.copy(), num_ranks)
        peak, heavy, light = heaviest_pair(pairs, np.inf)
        for trial in range(trials):
            if best <= target:
                return best
            counter += np.uint64(_GOLDEN_GAMMA)
            word = splitmix64(counter)
            giver = _below(num_experts, word)
            word = splitmix64(word)
            taker = _choose_taker(pairs, num_experts, heavy, light, word)
            given, taken = pairs.replicas[giver], pairs.replicas[taker]
            if giver == taker or given == 1 or taken == num_ranks or taker >= num_experts:
                continue
            left = 1.0 - trial / trials
            factor = np.float64(splitmix64(word) >> np.uint64(11)) * 2.0**-53
            limit = peak + reach * (best - bound) * left * left * factor
            set_count(pairs, giver, given - 1)
            set_count(pairs, taker, taken + 1)
            after, after_heavy, after_light = heaviest_pair(pairs, limit)
            if after < limit:
                peak, heavy, light = after, after_heavy, after_light
                if peak < best:
                    best = peak
                    copy_into(count, pairs.replicas)
            else:
                set_count(pairs, giver, given)
                set_count(pairs, taker, taken)
    return best


@jitable
def _choose_taker(pairs, num_experts, heavy, light, word):
    """The expert that a trial gives a replica to.

    Often it is one of the heaviest pair, or one whose replicas are lighter still. Each of these may leave the
    heavy replica with a lighter one.
    """
    guide = np.float64(word & np.uint64(0xFFFF)) * 2.0**-16
    if guide >= _GUIDED:
        return _below(num_experts, word)
    if guide >= _GUIDED * 2 / 3:
        return pairs.order[light + _below(pairs.order.shape[0] - light, word)]
    return pairs.order[heavy if guide < _GUIDED / 3 else light]


@jitable
def _below(bound, word):
    """A pseudo-random number below `bound`, from the upper 32 bits of a word."""
    return np.int64(np.float64(word >> np.uint64(32)) * 2.0**-32 * bound)
