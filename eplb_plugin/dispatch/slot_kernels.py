"""Compiled: from the experts of a batch's tokens to their slots, so that quotas are kept exactly."""

from __future__ import annotations

import numpy as np

from ..core.jit import cached_njit
from .split_kernels import split_layer

__all__ = ["choose_slots", "count_tokens"]


@cached_njit(nogil=True, fastmath=False, boundscheck=False)
def count_tokens(expert_ids, counts):
    """Count the tokens of each expert.

    Args:
        expert_ids: integer [ids], -1 for none.
        counts: int64 [logical]; written.

    Returns:
        The first id that is no expert and not -1, else -1.
    """
    counts[:] = 0
    bad = np.int64(-1)
    for at in range(expert_ids.shape[0]):
        expert = np.int64(expert_ids[at])
        if 0 <= expert < counts.shape[0]:
            counts[expert] += 1
        elif expert != -1 and bad == -1:
            bad = expert
    return bad


@cached_njit(nogil=True, fastmath=False, boundscheck=False)
def choose_slots(
    expert_ids,
    counted,
    top_k,
    counts,
    rank,
    slots,
    first,
    count,
    rank_of_slot,
    num_ranks,
    expert_cost,
    chosen,
):
    """Split the batch over all ranks, and choose the slots of this rank's tokens.

    Of the tokens of an expert on a rank that holds it, as many stay there as its quota allows. The others, in
    the order of ranks and of tokens, fill what is left of the quotas in the order of slots.

    Args:
        expert_ids: integer [ids] of this rank, in the order of tokens, top_k ids each; -1 for none.
        counted: number of ids that are in `counts`; those behind are padding, spread evenly by their token.
        counts: int64 [sources, logical]: tokens on each rank, or one row for tokens that all ranks hold.
        rank: the row of this rank's tokens in `counts`.
        slots, first, count: replicas of the layer, see `split_layer`.
        chosen: integer [ids]; written: the slot of each id, or -1.
    """
    num_logical = counts.shape[1]
    cost = np.empty(num_ranks, np.int64)
    quota = np.empty(rank_of_slot.shape[0], np.int64)
    split_layer(counts.sum(0), slots, first, count, rank_of_slot, expert_cost, cost, quota)

    # What stays on its rank is taken off the quotas. `left[e]` tokens of this rank stay on `home[e]`;
    # then come `passed[e]` tokens of lower ranks, before the others of this rank.
    left = np.zeros(num_logical, np.int64)
    passed = np.zeros(num_logical, np.int64)
    home = np.full(num_logical, -1, np.int64)
    at = np.empty(num_logical, np.int64)  # the replica that is being filled
    for expert in range(num_logical):
        at[expert] = first[expert]
        if counts.shape[0] == 1:
            continue
        for source in range(rank):
            passed[expert] += counts[source, expert]
        for slot in slots[first[expert] : first[expert] + count[expert]]:
            holder = rank_of_slot[slot]
            stay = min(counts[holder, expert], quota[slot])
            if holder < rank:
                passed[expert] -= stay
            elif holder == rank and stay > 0:
                home[expert], left[expert] = slot, stay
            quota[slot] -= stay
        while passed[expert] > 0:
            taken = min(passed[expert], quota[slots[at[expert]]])
            quota[slots[at[expert]]] -= taken
            passed[expert] -= taken
            at[expert] += passed[expert] > 0

    for index in range(expert_ids.shape[0]):
        expert = expert_ids[index]
        if not 0 <= expert < num_logical:
            chosen[index] = -1
        elif index >= counted:
            chosen[index] = slots[first[expert] + index // top_k % count[expert]]
        elif left[expert] > 0:
            left[expert] -= 1
            chosen[index] = home[expert]
        else:
            while quota[slots[at[expert]]] == 0:
                at[expert] += 1
            quota[slots[at[expert]]] -= 1
            chosen[index] = slots[at[expert]]
