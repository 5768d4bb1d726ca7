"""A search that lowers the true peak of a single load, by swaps and replica changes within a node."""

from __future__ import annotations

import numpy as np

from .compiling import jitable
from .single_load_state import holds, make_replica_change, make_swap, refresh_node

__all__ = ["LEAST_EXACT_GAIN", "best_replica_change", "best_swap", "lower_peak", "peak_after_change"]

LEAST_EXACT_GAIN = 1e-5  # as a fraction of the mean rank load; smaller gains are not worth a round
_SLACK = 1e-4  # gain of a better swap that is not searched for, as a fraction of the mean rank load
_TRIED_RANKS = 3  # heavy ranks that a round tries before the search ends
_EQUAL = 1e-4  # ranks within this fraction of the peak count as the heaviest, too
_SHORTLIST = 3  # slots that are computed exactly for each expert that might get a replica


@jitable
def lower_peak(node, rounds, target):
    """Lower the peak of the packing in `node.expert`, until it is at most `target` or nothing helps.

    A round relieves the heaviest rank. There are `rounds`, and one more for every four ranks. A quarter of
    `rounds` try replica changes too, which take longer than swaps. Skip rule: a rank without improving
    exchange is skipped until it changes. Returns the peak.
    """
    refresh_node(node)
    load, order = node.load, node.order
    failed = np.zeros(load.shape[0], np.bool_)
    stale = False  # whether a swap was made after some rank failed
    changes_left = rounds // 4
    for _ in range(rounds + load.shape[0] // 4):
        peak = load[order[-1]]
        if peak <= target:
            break
        improved = False
        at = order.shape[0]
        for _ in range(_TRIED_RANKS):
            at -= 1
            while at >= 0 and failed[order[at]]:
                at -= 1
            if at < 0 or load[order[at]] < peak * (1.0 - _EQUAL):
                break
            heavy = order[at]
            slot, other = best_swap(node, heavy)
            if slot >= 0:
                partner = other // node.capacity
                make_swap(node, slot, other)
                failed[partner] = False
                stale = True
                improved = True
                break
            expert, slot = -1, -1
            if changes_left > 0:
                expert, slot = best_replica_change(node, heavy)
                changes_left -= 1
            if slot >= 0:
                make_replica_change(node, expert, slot)
                failed[:] = False
                stale = False
                improved = True
                break
            failed[heavy] = True
        if not improved:
            if not stale:
                break
            failed[:] = False
            stale = False
    return load[order[-1]]


@jitable
def best_swap(node, heavy):
    """The swap with the lowest peak of `heavy` and its partner, within `_SLACK`.

    A swap shifts a load of d. It leaves the higher of the two ranks at half their sum, plus the distance of d
    from half their difference. So no partner can do better than half the sum, which rises from the lightest
    rank on. The search ends at the first partner that cannot beat the best.

    Returns:
        Slot of `heavy`, other slot; -1 where no swap helps.
    """
    share, load, rank_slots, capacity = node.share, node.load, node.rank_slots, node.capacity
    best = load[heavy] - LEAST_EXACT_GAIN
    best_mine, best_other = -1, -1
    for rank in node.order:
        middle = (load[heavy] + load[rank]) / 2.0
        if middle >= best or (best_mine >= 0 and middle + _SLACK >= best):
            break
        # A slot is too light if even the partner's lightest fills its place, too heavy if it overloads the
        # partner.
        least = load[heavy] - best + share[rank * capacity + rank_slots[rank] - 1]
        most = best - load[rank] + share[rank * capacity]
        fits = False
        for mine in range(heavy * capacity, heavy * capacity + rank_slots[heavy]):
            fits |= least < share[mine] < most
        if not fits:
            continue
        gap, mine, other = _closest_pair(node, heavy, rank, (load[heavy] - load[rank]) / 2.0, best - middle)
        if mine >= 0:
            best, best_mine, best_other = middle + gap, mine, other
    return best_mine, best_other


@jitable
def _closest_pair(node, heavy, rank, half, limit):
    """The slots of two ranks whose loads differ by `half` most nearly, closer than `limit`.

    The slots of both ranks fall in load, so one pass over both suffices. Returns the distance, the slot of
    `heavy` and that of `rank`; -1 where there are none.
    """
    expert, share, replicas, capacity = node.expert, node.share, node.replicas, node.capacity
    best_mine, best_other = -1, -1
    first, end = rank * capacity, rank * capacity + node.rank_slots[rank]
    split = first  # the first slot that is light enough to shift `half` or more
    for mine in range(heavy * capacity, heavy * capacity + node.rank_slots[heavy]):
        wanted = share[mine] - half
        while split < end and share[split] > wanted:
            split += 1
        known, lacks = False, True  # whether `rank` lacks the expert; computed on first need
        for step in (-1, 1):
            other = split - 1 if step < 0 else split
            while first <= other < end:
                gap = abs(share[other] - wanted)
                if gap >= limit:
                    break
                if not known:
                    known = True
                    lacks = replicas[expert[mine]] == 1 or not holds(node, rank, expert[mine])
                if not lacks:
                    break
                if replicas[expert[other]] == 1 or not holds(node, heavy, expert[other]):
                    limit = gap
                    best_mine, best_other = mine, other
                    break
                other += step
    return limit, best_mine, best_other


@jitable
def best_replica_change(node, heavy):
    """One more replica for an expert of `heavy`, with the lowest peak of the node: the expert and its slot.

    It takes the slot of an expert that has several replicas (surplus). A bound of the peak selects a few
    slots for each expert, whose peak is then computed. The slot is -1 where no change helps.
    """
    weight, replicas, expert, capacity = node.weight, node.replicas, node.expert, node.capacity
    share, load = node.share, node.load
    peak = load[node.order[-1]]
    best = peak - LEAST_EXACT_GAIN
    best_expert, best_slot = -1, -1
    surplus = np.empty(expert.shape[0], np.int64)
    heaviest = np.zeros(replicas.shape[0], np.float64)
    num_surplus = _list_surplus(node, best, heaviest, surplus)
    if num_surplus == 0:
        return best_expert, best_slot
    short_slot = np.empty(_SHORTLIST, np.int64)
    short_value = np.empty(_SHORTLIST, np.float64)
    after = np.empty(load.shape[0], np.float64)
    for mine in range(heavy * capacity, heavy * capacity + node.rank_slots[heavy]):
        x = expert[mine]
        short_slot[:] = -1
        short_value[:] = best
        arriving = weight[x] / (replicas[x] + 1)
        if load[heavy] - share[mine] + arriving >= best:
            continue
        for number in range(num_surplus):
            slot = surplus[number]
            rank, y = slot // capacity, expert[slot]
            more = weight[y] / (replicas[y] - 1) - share[slot]
            value = max(load[rank] - share[slot] + arriving, heaviest[y] + more)
            at = _SHORTLIST - 1
            if value >= short_value[at] or holds(node, rank, x):
                continue
            while at > 0 and value < short_value[at - 1]:
                short_value[at], short_slot[at] = short_value[at - 1], short_slot[at - 1]
                at -= 1
            short_value[at], short_slot[at] = value, slot
        for at in range(_SHORTLIST):
            slot = short_slot[at]
            if slot < 0 or short_value[at] >= best:
                break
            highest = peak_after_change(node, x, slot, after)
            if highest < best:
                best = highest
                best_expert, best_slot = x, slot
    return best_expert, best_slot


@jitable
def _list_surplus(node, best, heaviest, surplus):
    """List the slots that an expert with several replicas may leave with a peak below `best`.

    Writes them to `surplus`, int64 [slots], and returns their number. Writes to `heaviest`, float64 [experts]
    of zeros, the heaviest rank that holds an expert with several replicas.
    """
    weight, replicas, expert, capacity = node.weight, node.replicas, node.expert, node.capacity
    share, load = node.share, node.load
    for slot in range(expert.shape[0]):
        held = expert[slot]
        if held >= 0 and replicas[held] > 1:
            heaviest[held] = max(heaviest[held], load[slot // capacity])
    number = 0
    for slot in range(expert.shape[0]):
        held = expert[slot]
        if held >= 0 and replicas[held] > 1:
            after = heaviest[held] + weight[held] / (replicas[held] - 1) - share[slot]
            if after < best and load[slot // capacity] - share[slot] < best:
                surplus[number] = slot
                number += 1
    return number


@jitable
def peak_after_change(node, arrives, slot, after):
    """The peak of the node when `slot` gets a replica of `arrives`; `after` is scratch, float64 [ranks]."""
    weight, replicas, expert, capacity = node.weight, node.replicas, node.expert, node.capacity
    leaves = expert[slot]
    fewer = weight[arrives] / replicas[arrives] - weight[arrives] / (replicas[arrives] + 1)
    more = weight[leaves] / (replicas[leaves] - 1) - weight[leaves] / replicas[leaves]
    for rank in range(after.shape[0]):
        after[rank] = node.load[rank]
    for other in range(expert.shape[0]):
        if expert[other] == arrives:
            after[other // capacity] -= fewer
        elif expert[other] == leaves and other != slot:
            after[other // capacity] += more
    after[slot // capacity] += weight[arrives] / (replicas[arrives] + 1) - weight[leaves] / replicas[leaves]
    highest = 0.0
    for rank in range(after.shape[0]):
        highest = max(highest, after[rank])
    return highest
