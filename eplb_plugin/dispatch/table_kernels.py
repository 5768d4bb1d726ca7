"""Compiled: the slots of every expert, from the expert in every slot, without the interpreter lock."""

from __future__ import annotations

import numpy as np

from ..core.jit import cached_njit

__all__ = ["list_replicas"]


@cached_njit(nogil=True, fastmath=False, boundscheck=False)
def list_replicas(slot_expert, first_local, end_local, slots, count):
    """Write the slots of each expert in rising order, and how many they are.

    Args:
        slot_expert: int64 [layers, slots], -1 for an empty slot.
        first_local, end_local: of an expert with any of these slots, only these are listed.
        slots: int64 [layers, logical, replicas], filled with -1.
        count: int64 [layers, logical], zeros.
    """
    num_layers, num_slots = slot_expert.shape
    is_local = np.empty(count.shape[1], np.bool_)
    for layer in range(num_layers):
        is_local[:] = False
        for slot in range(first_local, end_local):
            if slot_expert[layer, slot] >= 0:
                is_local[slot_expert[layer, slot]] = True
        for slot in range(num_slots):
            expert = slot_expert[layer, slot]
            if expert >= 0 and (first_local <= slot < end_local or not is_local[expert]):
                slots[layer, expert, count[layer, expert]] = slot
                count[layer, expert] += 1
