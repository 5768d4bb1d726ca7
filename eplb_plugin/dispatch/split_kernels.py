"""Compiled: the split of a batch over the replicas of its experts, by water filling.

The tokens of one replicated expert after the other come off its ranks, and are filled back in until its
lightest ranks are level. Eight sweeps over the experts end within half a point of the balancedness of the
linear program. Integers throughout, in one order: equal counts give equal splits everywhere.

From the split to the slots of tokens is here too. Numba's cache notices a change of this file alone: with the
split elsewhere, ranks with older caches would split in another way.
"""

from __future__ import annotations

import numpy as np

from ..core.jit import cached_njit

__all__ = ["SWEEPS", "choose_slots", "count_tokens", "split_batches"]

SWEEPS = 8
"""Most passes over the replicated experts of a layer."""


@cached_njit(nogil=True, fastmath=False, boundscheck=False)
def split_batches(counts, slots, first, count, rank_of_slot, num_ranks, expert_cost, tokens):
    """Split each step of each layer.

    Args:
        counts: int64 [steps, layers, logical], tokens.
        slots, first, count: the replicas of each layer, see `list_replicas`.
        rank_of_slot: int64 [slots].
        expert_cost: least cost of a replica in use, in tokens.
        tokens: int64 [steps, layers, slots], zeros; written: tokens of each slot.
    """
    num_steps, num_layers, _ = counts.shape
    cost = np.empty(num_ranks, np.int64)
    for layer in range(num_layers):
        row, starts, replicas = slots[layer], first[layer], count[layer]
        for step in range(num_steps):
            given = tokens[step, layer]
            split_layer(counts[step, layer], row, starts, replicas, rank_of_slot, expert_cost, cost, given)


@cached_njit(nogil=True, fastmath=False, boundscheck=False)
def split_layer(counts, slots, first, count, rank_of_slot, expert_cost, cost, quota):
    """Split one batch of one layer: the even split, then sweeps over its replicated experts by their ids.

    Args:
        counts: integer [logical], tokens.
        slots, first, count: integer; the slots of expert `e` are `slots[first[e] : first[e] + count[e]]`,
            rising.
        cost: int64 [ranks]; written: the cost of each rank.
        quota: int64 [slots]; written: tokens of each slot. Empty slots are left alone.
    """
    cost[:] = 0
    for expert in range(counts.shape[0]):
        replicas = count[expert]
        whole, rest = divmod(np.int64(counts[expert]), np.int64(replicas))
        for replica in range(replicas):
            slot = slots[first[expert] + replica]
            quota[slot] = whole + (replica < rest)
            cost[rank_of_slot[slot]] += _cost(quota[slot], expert_cost)
    order = np.empty(cost.shape[0], np.int64)
    base = np.empty(cost.shape[0], np.int64)
    for _ in range(SWEEPS):
        changed = False
        for expert in range(counts.shape[0]):
            if count[expert] > 1 and counts[expert] > 0:
                mine = slots[first[expert] : first[expert] + count[expert]]
                changed |= _refill(counts[expert], mine, rank_of_slot, expert_cost, cost, base, order, quota)
        if not changed:
            break


@cached_njit(nogil=True, fastmath=False, boundscheck=False, inline="always")
def _cost(tokens, expert_cost):
    return max(tokens, expert_cost) if tokens > 0 else np.int64(0)


@cached_njit(nogil=True, fastmath=False, boundscheck=False)
def _refill(tokens, slots, rank_of_slot, expert_cost, cost, base, order, quota):
    """Take the tokens of one expert off its ranks, and fill them back in at the lowest level.

    The level is the least cost of the fullest rank, over all numbers of ranks in use. The fewest ranks that
    hold the tokens below it are used, the lightest ones, of equal ones those of lower slots. The present
    split is one of the choices, so the peak rank cost never rises.

    Args:
        tokens: of the expert, above 0.
        slots: its slots, rising. A second one on the same rank gets nothing: it would cost the same time.
        cost: int64 [ranks], changed.
        base, order: int64 [ranks], scratch: costs of its ranks, rising, and its slot on each of them.
        quota: int64 [all slots], changed.

    Returns:
        Whether the quota changed.
    """
    for slot in slots:
        cost[rank_of_slot[slot]] -= _cost(quota[slot], expert_cost)
    changed = False
    # 1. The expert's ranks by rising cost, by insertion: there are few.
    usable, last = 0, -1
    for slot in slots:
        rank = rank_of_slot[slot]
        if rank == last:
            changed |= quota[slot] > 0
            quota[slot] = 0
            continue
        at, last = usable, rank
        while at > 0 and base[at - 1] > cost[rank]:
            base[at], order[at] = base[at - 1], order[at - 1]
            at -= 1
        base[at], order[at] = cost[rank], slot
        usable += 1
    # 2. The level.
    level, total = np.int64(0), np.int64(tokens)
    for at in range(usable):
        total += base[at]
        reached = max(base[at] + expert_cost, (total + at) // (at + 1))
        if at == 0 or reached < level:
            level = reached
    # 3. The fewest ranks that hold the tokens below it.
    used, total = 1, np.int64(tokens) + base[0]
    while used * level < total:
        total += base[used]
        used += 1
    # 4. Even them out.
    whole, rest = divmod(total, np.int64(used))
    for at in range(usable):
        slot = order[at]
        given = whole - base[at] + (at < rest) if at < used else np.int64(0)
        changed |= quota[slot] != given
        quota[slot] = given
        cost[rank_of_slot[slot]] += _cost(given, expert_cost)
    return changed


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
