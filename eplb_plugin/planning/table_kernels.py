"""Compiled passes over loads and placements that take no decision: peaks, weighted sums, and slots that stay.

As in `kernels`, the interpreter lock is released, the cache is on disk, and every sum has a fixed order.
"""

from __future__ import annotations

import numba
import numpy as np

__all__ = ["condense_loads", "count_shared", "keep_slots", "peak_loads"]

_compile = numba.njit(nogil=True, cache=True, fastmath=False, boundscheck=False)
_LANES = 16


@_compile
def peak_loads(weight, slot_expert, first_slot, first, last, peaks):
    """Write the peak rank load of layers `first..last-1` to float64 `peaks` [snapshots, layers].

    Args:
        weight: float64 [snapshots, layers, logical], tokens.
        slot_expert: int64 [layers, slots].
        first_slot: int64 [ranks + 1], the first slot of each rank, then the number of slots.
    """
    num_snapshots, _, num_logical = weight.shape
    num_slots = slot_expert.shape[1]
    count = np.empty(num_logical, np.float64)
    part = np.empty(num_logical, np.float64)
    share = np.empty(num_logical, np.float64)
    for layer in range(first, last):
        count[:] = 0.0
        for slot in range(num_slots):
            count[slot_expert[layer, slot]] += 1.0
        # A division takes several times as long as a product, and there are snapshots times as many products.
        for expert in range(num_logical):
            part[expert] = 1.0 / count[expert] if count[expert] > 0.0 else 0.0
        for snapshot in range(num_snapshots):
            for expert in range(num_logical):
                share[expert] = weight[snapshot, layer, expert] * part[expert]
            highest = 0.0
            for rank in range(first_slot.shape[0] - 1):
                total = 0.0
                for slot in range(first_slot[rank], first_slot[rank + 1]):
                    total += share[slot_expert[layer, slot]]
                highest = max(highest, total)
            peaks[snapshot, layer] = highest


@_compile
def condense_loads(load, weights, bins, moved, recency, persistence, decay, first, last, condensed):
    """Sum the snapshots of each bin, weighted, for layers `first..last-1`; move them if `moved`.

    Args:
        load: float64 [snapshots, layers, logical], tokens.
        weights: float64 [snapshots].
        bins: int64 [snapshots], where each snapshot belongs.
        moved: whether snapshots are moved to what is expected next, see `forecast.expected_load`.
        recency, persistence, decay: as there.
        condensed: float64 [bins, layers, logical], zeros; added to. What is moved below 0 is 0.
    """
    num_snapshots, _, num_logical = load.shape
    per_token = np.empty(num_snapshots, np.float64)
    whole = np.empty(num_snapshots, np.float64)
    moment = np.empty(num_snapshots, np.float64)
    aged = np.empty(num_snapshots, np.float64)
    shift = np.empty(num_logical, np.float64)
    change = np.empty(num_logical, np.float64)
    noise = np.empty(num_logical, np.float64)
    lanes = np.empty(_LANES, np.float64)
    for layer in range(first, last):
        for snapshot in range(num_snapshots):
            weight, place = weights[snapshot], bins[snapshot]
            for expert in range(num_logical):
                condensed[place, layer, expert] += weight * load[snapshot, layer, expert]
            if moved:
                tokens = _sum(load[snapshot, layer], lanes)
                # What is too little to divide by is no better than nothing.
                per_token[snapshot] = 1.0 / tokens if tokens > 1e-300 else 0.0
        if not moved:
            continue
        spread = _weigh(per_token, recency, moment) - _weigh(per_token, 1.0, whole)
        _weigh(per_token, decay, aged)
        shift[:] = 0.0
        change[:] = 0.0
        noise[:] = 0.0
        pairs = 0
        for snapshot in range(num_snapshots):
            here = per_token[snapshot]
            of_shift = whole[snapshot] - aged[snapshot]
            of_change = moment[snapshot] - whole[snapshot]
            for expert in range(num_logical):
                shift[expert] += of_shift * load[snapshot, layer, expert]
                change[expert] += of_change * load[snapshot, layer, expert]
            if snapshot > 0 and here > 0.0 and per_token[snapshot - 1] > 0.0:
                before = per_token[snapshot - 1]
                pairs += 1
                for expert in range(num_logical):
                    step = here * load[snapshot, layer, expert] - before * load[snapshot - 1, layer, expert]
                    noise[expert] += step * step
        size = 0.0
        for expert in range(num_logical):
            size += change[expert] * change[expert]
        by_chance = 0.5 * spread * _sum(noise, lanes) / max(pairs, 1)
        lasts = persistence * max(0.0, 1.0 - by_chance / size) if size > 0.0 else 0.0
        for expert in range(num_logical):
            shift[expert] += lasts * change[expert]
        for place in range(condensed.shape[0]):
            tokens = _sum(condensed[place, layer], lanes)
            for expert in range(num_logical):
                after = condensed[place, layer, expert] + shift[expert] * tokens
                condensed[place, layer, expert] = after if after > 0.0 else 0.0


@_compile
def _weigh(per_token, rate, weights):
    """Write what a token of each snapshot weighs in the mean share of an expert, if each snapshot that is not
    empty weighs `rate` of the next one; returns the variance of the mean where each snapshot's is 1."""
    in_all, squares, one = 0.0, 0.0, 1.0
    for snapshot in range(per_token.shape[0] - 1, -1, -1):
        weights[snapshot] = 0.0
        if per_token[snapshot] > 0.0:
            in_all += one
            squares += one * one
            weights[snapshot] = one * per_token[snapshot]
        one *= rate
    if in_all == 0.0:
        return 0.0
    for snapshot in range(per_token.shape[0]):
        weights[snapshot] /= in_all
    return squares / (in_all * in_all)


@_compile
def _sum(row, lanes):
    """The sum of float64 `row`, in the fixed order of the partial sums in `lanes`, which is fast."""
    lanes[:] = 0.0
    whole = row.shape[0] - row.shape[0] % _LANES
    for begin in range(0, whole, _LANES):
        for lane in range(_LANES):
            lanes[lane] += row[begin + lane]
    for at in range(whole, row.shape[0]):
        lanes[at - whole] += row[at]
    total = 0.0
    for lane in range(_LANES):
        total += lanes[lane]
    return total


@_compile
def count_shared(slot_expert, first_slot, num_logical, shared):
    """Write to int64 `shared` [layers] how many slots repeat an expert of their rank; `slot_expert` and
    `first_slot` are those of `peak_loads`."""
    seen = np.full(num_logical, -1, np.int64)
    shared[:] = 0
    for layer in range(slot_expert.shape[0]):
        for rank in range(first_slot.shape[0] - 1):
            name = layer * first_slot.shape[0] + rank
            for slot in range(first_slot[rank], first_slot[rank + 1]):
                if seen[slot_expert[layer, slot]] == name:
                    shared[layer] += 1
                seen[slot_expert[layer, slot]] = name


@_compile
def keep_slots(new, current, first_slot, num_logical, kept, moves, shared):
    """Order the slots of each rank so that experts which it holds already keep theirs.

    Args:
        new, current: int64 [layers, slots], -1 in `current` for an empty slot.
        first_slot: int64 [ranks + 1], the first slot of each rank, then the number of slots.
        kept: int64 [layers, slots], written: on each rank the experts of `new`.
        moves: int64 [layers], written: experts that a rank gets and did not hold.
        shared: int64 [2, layers], written: slots of `new` and of `current` that repeat an expert of the rank.
    """
    num_layers = new.shape[0]
    wanted = np.zeros(num_logical, np.int64)
    holds = np.zeros(num_logical, np.bool_)
    moves[:] = 0
    shared[:] = 0
    for layer in range(num_layers):
        for rank in range(first_slot.shape[0] - 1):
            begin, end = first_slot[rank], first_slot[rank + 1]
            for slot in range(begin, end):
                expert = new[layer, slot]
                if wanted[expert] > 0:
                    shared[0, layer] += 1
                wanted[expert] += 1
            for slot in range(begin, end):
                expert = current[layer, slot]
                kept[layer, slot] = -1
                if expert < 0:
                    continue
                if holds[expert]:
                    shared[1, layer] += 1
                holds[expert] = True
                if wanted[expert] > 0:
                    wanted[expert] -= 1
                    kept[layer, slot] = expert
            # What arrives fills the free slots in order.
            free = begin
            for slot in range(begin, end):
                expert = new[layer, slot]
                if wanted[expert] > 0:
                    wanted[expert] -= 1
                    while kept[layer, free] >= 0:
                        free += 1
                    kept[layer, free] = expert
                    if not holds[expert]:
                        moves[layer] += 1
                        holds[expert] = True
            for slot in range(begin, end):
                if current[layer, slot] >= 0:
                    holds[current[layer, slot]] = False
                holds[new[layer, slot]] = False
