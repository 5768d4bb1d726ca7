"""Passes over placements that take no decision: peak rank loads, repeated experts, slots that stay.

All of it is in this file, so that numba's own key of the cache suffices.
"""

from __future__ import annotations

import numpy as np

from .compiling import entry_point

__all__ = ["keep_slots", "peak_loads"]

_LANES = 4  # snapshots at once: their loads of an expert are neighbours in memory


@entry_point
def peak_loads(weight, slot_expert, first_slot, first, last, peaks):
    """Write the peak rank load of each snapshot, for layers `first..last-1`.

    Args:
        weight, peaks: float64 [snapshots, layers, logical], tokens, and [snapshots, layers], written.
        slot_expert: int64 [layers, slots].
        first_slot: int64 [ranks + 1], the first slot of each rank, then the number of slots.
    """
    num_snapshots, _, num_logical = weight.shape
    num_slots = slot_expert.shape[1]
    count = np.empty(num_logical, np.float64)
    part = np.empty(num_logical, np.float64)
    share = np.empty((num_logical, _LANES), np.float64)
    highest = np.empty(_LANES, np.float64)
    for layer in range(first, last):
        count[:] = 0.0
        for slot in range(num_slots):
            count[slot_expert[layer, slot]] += 1.0
        # One division an expert, rather than one a snapshot: a product takes a fraction of its time.
        for expert in range(num_logical):
            part[expert] = 1.0 / count[expert] if count[expert] > 0.0 else 0.0
        for begin in range(0, num_snapshots, _LANES):
            for lane in range(_LANES):
                snapshot = min(begin + lane, num_snapshots - 1)
                for expert in range(num_logical):
                    share[expert, lane] = weight[snapshot, layer, expert] * part[expert]
            highest[:] = 0.0
            for rank in range(first_slot.shape[0] - 1):
                one, two, three, four = 0.0, 0.0, 0.0, 0.0
                for slot in range(first_slot[rank], first_slot[rank + 1]):
                    held = slot_expert[layer, slot]
                    one += share[held, 0]
                    two += share[held, 1]
                    three += share[held, 2]
                    four += share[held, 3]
                highest[0] = max(highest[0], one)
                highest[1] = max(highest[1], two)
                highest[2] = max(highest[2], three)
                highest[3] = max(highest[3], four)
            for lane in range(min(_LANES, num_snapshots - begin)):
                peaks[begin + lane, layer] = highest[lane]


@entry_point
def keep_slots(new, current, first_slot, num_logical, kept, moves, shared):
    """Reorder the slots of each rank so that experts which stay keep their slots.

    Args:
        new, current: int64 [layers, slots], -1 in `current` for an empty slot.
        first_slot: as for `peak_loads`.
        kept, moves: int64 [layers, slots] and [layers], written: `new` reordered, and its moves.
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
            # Experts that arrive fill the free slots in order.
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
