"""Compiled: the split of a batch over the replicas of its experts, by water filling.

For one replicated expert after the other, its tokens are taken off its ranks and filled back in, so that its
lightest ranks end level. Eight sweeps over the experts end within half a point of the balancedness of the
linear program. Integers throughout, in one order: equal counts give equal splits everywhere.
"""

from __future__ import annotations

import numpy as np

from ..core.jit import cached_njit

__all__ = ["SWEEPS", "split_batches", "split_layer"]

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
