"""Compiled: how many source ranks each replica serves, and which ones.

All callees are in this file: numba's cache notices changes of the file of the cached function alone.
"""

from __future__ import annotations

import numpy as np

from ..core.jit import cached_njit

__all__ = ["assign_sources", "level_sources"]

_SLACK = 1  # a replica serves at most one rank fewer or more than floor or ceil of its fair part
_LEAST = 1e-9  # of the peak: smaller gains are rounding
_MOST_EXCHANGES = 4000  # of a layer


@cached_njit(nogil=True, fastmath=False, boundscheck=False, error_model="numpy")
def level_sources(ids, load, num_ranks, swap_width, held, price, tolerance, swapped):
    """Choose how many of the ranks each slot serves, so that the rank loads come out level.

    Each rank sends all its tokens of an expert to one slot, so a slot gets whole multiples of load / ranks.
    Of several slots of an expert on a rank, the first one serves for all.

    Args:
        ids: int64 [layers, slots], the expert of each slot; layers with swaps are changed.
        load: float64 [layers, logical], tokens.
        swap_width: ranks within which slots may be swapped, such as those of a node; 0: no swaps.
        held: int64 [layers, slots], what the slots hold now: swaps away from it are moves.
        price: least reduction of the peak for a move, in tokens for each token of the mean slot load.
        tolerance: only layers with a peak that far above that of the even split are swapped in, as a
            fraction of it.
        swapped: bool [layers], set where slots were swapped.

    Returns:
        int64 [layers, slots], source ranks of each slot. Over the slots of an expert: `num_ranks`.
    """
    num_layers, num_slots = ids.shape
    num_logical = load.shape[1]
    per_rank = num_slots // num_ranks
    sources = np.zeros((num_layers, num_slots), np.int64)
    weight = np.empty(num_slots, np.int64)
    at = np.empty((num_logical, num_ranks), np.int64)  # first slot of an expert on a rank, or -1
    was = np.empty((num_logical, num_ranks), np.bool_)  # whether a rank holds an expert now
    count = np.empty(num_logical, np.int64)
    level = np.empty(num_ranks)
    for layer in range(num_layers):
        at[:] = -1
        was[:] = False
        count[:] = 0
        weight[:] = 0
        for slot in range(num_slots):
            expert, rank = ids[layer, slot], slot // per_rank
            if at[expert, rank] < 0:
                at[expert, rank] = slot
            weight[at[expert, rank]] += 1
            count[expert] += 1
            was[held[layer, slot], rank] = True
        level[:] = 0.0
        even_peak = 0.0
        total = 0.0
        for rank in range(num_ranks):
            for slot in range(rank * per_rank, (rank + 1) * per_rank):
                level[rank] += load[layer, ids[layer, slot]] / count[ids[layer, slot]]
            even_peak = max(even_peak, level[rank])
            total += level[rank]
        level[:] = 0.0
        for slot in range(num_slots):
            if weight[slot]:
                expert = ids[layer, slot]
                sources[layer, slot] = num_ranks * weight[slot] // count[expert]
                level[slot // per_rank] += sources[layer, slot] * load[layer, expert] / num_ranks
        _hand_out_rest(load[layer], num_ranks, per_rank, at, count, sources[layer], level)
        goal = even_peak * (1.0 + tolerance)
        step = price * total / num_slots
        for _ in range(_MOST_EXCHANGES):
            peak = int(np.argmax(level))
            if _shift(
                peak, ids[layer], load[layer], num_ranks, per_rank, at, weight, count, sources[layer], level
            ):
                continue
            if swap_width == 0 or level[peak] <= goal:
                break
            if not _swap(
                peak,
                ids[layer],
                load[layer],
                num_ranks,
                per_rank,
                swap_width,
                at,
                was,
                weight,
                sources[layer],
                level,
                step,
            ):
                break
            swapped[layer] = True
    return sources


@cached_njit(nogil=True, fastmath=False, boundscheck=False, error_model="numpy")
def _hand_out_rest(load, num_ranks, per_rank, at, count, sources, level):
    """Give each expert's ranks beyond the floors to its replicas on the lowest levels, the hottest first."""
    for place in np.argsort(-load, kind="mergesort"):
        expert = place
        rest = num_ranks
        for rank in range(num_ranks):
            if at[expert, rank] >= 0:
                rest -= sources[at[expert, rank]]
        taken = np.zeros(num_ranks, np.bool_)
        for _ in range(rest):
            best = -1
            for rank in range(num_ranks):
                if at[expert, rank] >= 0 and not taken[rank] and (best < 0 or level[rank] < level[best]):
                    best = rank
            taken[best] = True
            sources[at[expert, best]] += 1
            level[best] += load[expert] / num_ranks


@cached_njit(nogil=True, fastmath=False, boundscheck=False, error_model="numpy")
def _may_lose(slot, ids, num_ranks, weight, count, sources):
    return sources[slot] > max(1, num_ranks * weight[slot] // count[ids[slot]] - _SLACK)


@cached_njit(nogil=True, fastmath=False, boundscheck=False, error_model="numpy")
def _may_gain(slot, ids, num_ranks, weight, count, sources):
    return sources[slot] < -(-num_ranks * weight[slot] // count[ids[slot]]) + _SLACK


@cached_njit(nogil=True, fastmath=False, boundscheck=False, error_model="numpy")
def _shift(peak, ids, load, num_ranks, per_rank, at, weight, count, sources, level):
    """Take a source rank off the peak, alone or against one of another expert's; whether that was possible.

    Expert e goes from the peak to rank b. Where that makes b too high, another expert goes on from b: back to
    the peak or to a third rank.
    """
    lowest = level[peak] * (1.0 - _LEAST)
    chosen = (-1, -1, -1, -1)  # slots: from, to, from, to
    for slot in range(peak * per_rank, (peak + 1) * per_rank):
        expert = ids[slot]
        if at[expert, peak] != slot or count[expert] == 1 or load[expert] <= 0.0:
            continue
        if not _may_lose(slot, ids, num_ranks, weight, count, sources):
            continue
        unit = load[expert] / num_ranks
        for b in range(num_ranks):
            to = at[expert, b]
            if b == peak or to < 0 or not _may_gain(to, ids, num_ranks, weight, count, sources):
                continue
            reached = max(level[peak] - unit, level[b] + unit)
            if reached < lowest:
                lowest, chosen = reached, (slot, to, -1, -1)
            for second in range(b * per_rank, (b + 1) * per_rank):
                other = ids[second]
                if other == expert or at[other, b] != second or count[other] == 1:
                    continue
                if not _may_lose(second, ids, num_ranks, weight, count, sources):
                    continue
                part = load[other] / num_ranks
                for c in range(num_ranks):
                    end = at[other, c]
                    if c == b or end < 0 or not _may_gain(end, ids, num_ranks, weight, count, sources):
                        continue
                    if c == peak:
                        reached = max(level[peak] - unit + part, level[b] + unit - part)
                    else:
                        reached = max(level[peak] - unit, level[b] + unit - part, level[c] + part)
                    if reached < lowest:
                        lowest, chosen = reached, (slot, to, second, end)
    if chosen[0] < 0:
        return False
    for start, end in ((chosen[0], chosen[1]), (chosen[2], chosen[3])):
        if start >= 0:
            unit = load[ids[start]] / num_ranks
            sources[start] -= 1
            sources[end] += 1
            level[start // per_rank] -= unit
            level[end // per_rank] += unit
    return True


@cached_njit(nogil=True, fastmath=False, boundscheck=False, error_model="numpy")
def _swap(peak, ids, load, num_ranks, per_rank, width, at, was, weight, sources, level, step):
    """Swap a slot of the peak with one of another rank, sources and all; whether that paid for its moves."""
    best = level[peak] * _LEAST
    chosen = (-1, -1)
    first_rank = peak // width * width
    for slot in range(peak * per_rank, (peak + 1) * per_rank):
        expert = ids[slot]
        if weight[slot] != 1:
            continue
        mine = sources[slot] * load[expert] / num_ranks
        for b in range(first_rank, min(first_rank + width, num_ranks)):
            if b == peak or at[expert, b] >= 0:
                continue
            for second in range(b * per_rank, (b + 1) * per_rank):
                other = ids[second]
                if weight[second] != 1 or at[other, peak] >= 0:
                    continue
                part = sources[second] * load[other] / num_ranks
                reached = max(level[peak] - mine + part, level[b] + mine - part)
                moves = (
                    int(not was[expert, b])
                    + int(not was[other, peak])
                    - int(not was[expert, peak])
                    - int(not was[other, b])
                )
                gain = level[peak] - reached - step * max(moves, 0)
                if gain > best:
                    best, chosen = gain, (slot, second)
    if chosen[0] < 0:
        return False
    first, second = chosen
    a, b = ids[first], ids[second]
    other_rank = second // per_rank
    change = (sources[first] * load[a] - sources[second] * load[b]) / num_ranks
    level[peak] -= change
    level[other_rank] += change
    at[a, peak], at[b, other_rank] = -1, -1
    at[a, other_rank], at[b, peak] = second, first
    ids[first], ids[second] = b, a
    sources[first], sources[second] = sources[second], sources[first]
    return True


@cached_njit(nogil=True, fastmath=False, boundscheck=False, error_model="numpy")
def assign_sources(ids, sources, num_ranks, ranks_per_node, rank, num_logical):
    """The slot that `rank` sends each expert's tokens to: its own, else one of its node, else the rest.

    Args:
        ids: int64 [layers, slots].
        sources: int64 [layers, slots], from `level_sources`.

    Returns:
        int64 [layers, logical].
    """
    num_layers, num_slots = ids.shape
    per_rank = num_slots // num_ranks
    table = np.full((num_layers, num_logical), -1, np.int64)
    slots = np.empty((num_logical, num_ranks), np.int64)
    found = np.empty(num_logical, np.int64)
    left = np.empty(num_slots, np.int64)
    served = np.empty(num_ranks, np.bool_)
    for layer in range(num_layers):
        found[:] = 0
        for slot in range(num_slots):
            left[slot] = sources[layer, slot]
            if left[slot]:
                expert = ids[layer, slot]
                slots[expert, found[expert]] = slot
                found[expert] += 1
        for expert in range(num_logical):
            served[:] = False
            for reach in (1, ranks_per_node, num_ranks):  # own rank, own node, all
                # Replicas take turns: ranks that come first would else leave none near for those behind.
                for place in range(found[expert]):
                    slot = slots[expert, place]
                    home = slot // per_rank // reach * reach
                    for source in range(home, home + reach):
                        if left[slot] and not served[source]:
                            served[source] = True
                            left[slot] -= 1
                            if source == rank:
                                table[layer, expert] = slot
    return table
