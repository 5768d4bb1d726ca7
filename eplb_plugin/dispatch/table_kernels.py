"""Compiled: the slots of every expert, from the expert in every slot, without the interpreter lock."""

from __future__ import annotations

import numpy as np

from ..core.jit import cached_njit

__all__ = ["list_replicas"]


@cached_njit(nogil=True, fastmath=False, boundscheck=False)
def list_replicas(slot_expert, num_logical, first_near, end_near):
    """List the slots of each expert, expert by expert and in rising order, and where they are.

    Args:
        slot_expert: int64 [layers, slots], -1 for an empty slot.
        first_near, end_near: of an expert with any replica in these slots, only those are listed.

    Returns:
        slots: int64 [layers, slots + 1], -1 behind the listed ones.
        first: int64 [layers, logical], index of the first slot of each expert in `slots`.
        count: int64 [layers, logical], number of its slots.
    """
    num_layers, num_slots = slot_expert.shape
    slots = np.full((num_layers, num_slots + 1), -1, np.int64)
    first = np.zeros((num_layers, num_logical), np.int64)
    count = np.zeros((num_layers, num_logical), np.int64)
    is_near = np.empty(num_logical, np.bool_)
    end = np.empty(num_logical, np.int64)
    for layer in range(num_layers):
        is_near[:] = False
        for slot in range(first_near, end_near):
            if slot_expert[layer, slot] >= 0:
                is_near[slot_expert[layer, slot]] = True
        for slot in range(num_slots):
            expert = slot_expert[layer, slot]
            if expert >= 0 and (first_near <= slot < end_near or not is_near[expert]):
                count[layer, expert] += 1
        place = 0
        for expert in range(num_logical):
            first[layer, expert] = end[expert] = place
            place += count[layer, expert]
        for slot in range(num_slots):
            expert = slot_expert[layer, slot]
            if expert >= 0 and (first_near <= slot < end_near or not is_near[expert]):
                slots[layer, end[expert]] = slot
                end[expert] += 1
    return slots, first, count
