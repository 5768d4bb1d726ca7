"""Compiled: the split of a batch over the replicas of its experts, by water filling.

The tokens of one replicated expert after the other come off its ranks, and are filled back in until its
lightest ranks are level. Sweeps over all experts approach the split of least peak, as Gauss-Seidel does. Two
things bring nine of them within 0.2 points of the balancedness of the linear program:

- **Parts of a token.** In whole tokens, sweeps stop where ranks are one token apart. So all but the last one
  split in sixteenths. The last one gives each expert its whole tokens.
- **Over-relaxation.** Half of each change is added on top of it, see D. Young, 1954, "Iterative methods for
  solving partial difference equations of elliptic type".

Where all that ends with a higher peak than the even split, the even split is taken. Of several replicas on a
rank, the first gets all tokens. Integers throughout, in one order: equal counts give equal splits everywhere.

From the split to the slots of tokens is here too. Numba's cache notices a change of this file alone: with the
split elsewhere, ranks with older caches would split in another way.
"""

from __future__ import annotations

import numpy as np

from ..core.jit import cached_njit

__all__ = ["FINE_SWEEPS", "MOST_FINE", "SHIFT", "choose_slots", "count_tokens", "split_batches"]

FINE_SWEEPS = 8
"""Passes over the replicated experts of a layer in parts of tokens, before the one in whole tokens."""

SHIFT = 4
"""Parts are 2^-4 of a token."""

MOST_FINE = 2**24
"""Most tokens of a batch that is split in parts: costs in parts fit 32 bits."""


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
    shift = SHIFT if counts.sum() <= MOST_FINE else 0
    highest = _split_evenly(counts, slots, first, count, rank_of_slot, expert_cost, shift, cost, quota)
    order = np.empty(cost.shape[0], np.int64)
    base = np.empty(cost.shape[0], np.int64)
    for _ in range(FINE_SWEEPS):
        if not _sweep(
            counts, slots, first, count, rank_of_slot, expert_cost, shift, False, cost, base, order, quota
        ):
            break
    _sweep(counts, slots, first, count, rank_of_slot, expert_cost, shift, True, cost, base, order, quota)
    if cost.max() > highest:
        _split_evenly(counts, slots, first, count, rank_of_slot, expert_cost, shift, cost, quota)
        _join_on_ranks(slots, first, count, rank_of_slot, expert_cost << shift, cost, quota)
    cost >>= shift
    quota >>= shift


@cached_njit(nogil=True, fastmath=False, boundscheck=False)
def _split_evenly(counts, slots, first, count, rank_of_slot, expert_cost, shift, cost, quota):
    """Give the replicas of each expert whole tokens, equally many or one more. Returns the peak rank cost.

    Args:
        shift: costs and quotas are in 2^-shift tokens.
    """
    cost[:] = 0
    for expert in range(counts.shape[0]):
        replicas = count[expert]
        whole, rest = divmod(np.int64(counts[expert]), np.int64(replicas))
        for replica in range(replicas):
            slot = slots[first[expert] + replica]
            quota[slot] = (whole + (replica < rest)) << shift
            cost[rank_of_slot[slot]] += _cost(quota[slot], expert_cost << shift)
    return cost.max()


@cached_njit(nogil=True, fastmath=False, boundscheck=False)
def _join_on_ranks(slots, first, count, rank_of_slot, expert_cost, cost, quota):
    """Give the tokens of an expert on one rank to its first replica there, as sweeps do."""
    for expert in range(count.shape[0]):
        keeper = slots[first[expert]]
        for slot in slots[first[expert] + 1 : first[expert] + count[expert]]:
            rank = rank_of_slot[slot]
            if rank != rank_of_slot[keeper]:
                keeper = slot
                continue
            cost[rank] -= _cost(quota[keeper], expert_cost) + _cost(quota[slot], expert_cost)
            quota[keeper] += quota[slot]
            quota[slot] = 0
            cost[rank] += _cost(quota[keeper], expert_cost)


@cached_njit(nogil=True, fastmath=False, boundscheck=False, inline="always")
def _cost(tokens, expert_cost):
    return max(tokens, expert_cost) if tokens > 0 else np.int64(0)


@cached_njit(nogil=True, fastmath=False, boundscheck=False)
def _sweep(counts, slots, first, count, rank_of_slot, expert_cost, shift, in_whole, cost, base, order, quota):
    """Fill in each replicated expert anew, see `_refill`. Returns whether anything changed."""
    changed = False
    for expert in range(counts.shape[0]):
        if count[expert] > 1 and counts[expert] > 0:
            mine = slots[first[expert] : first[expert] + count[expert]]
            changed |= _refill(
                counts[expert], mine, rank_of_slot, expert_cost, shift, in_whole, cost, base, order, quota
            )
    return changed


@cached_njit(nogil=True, fastmath=False, boundscheck=False)
def _refill(tokens, slots, rank_of_slot, expert_cost, shift, in_whole, cost, base, order, quota):
    """Take the tokens of one expert off its ranks, and fill them back in at the lowest level.

    The level is the least cost of the fullest rank, over all numbers of ranks in use. The fewest ranks that
    hold the tokens below it are used, the lightest ones, of equal ones those of lower slots.

    The base of a rank is its cost without the expert. Over-relaxation adds half of its cost with the expert:
    above such bases, each rank gets what levels it and half of the change on top.

    Args:
        tokens: of the expert, above 0.
        slots: its slots, rising. A second one on the same rank gets nothing: it would cost the same time.
        shift: costs and quotas are in 2^-shift tokens.
        in_whole: whether to give whole tokens, without relaxation, for bases rounded to whole tokens.
        cost: int64 [ranks], changed.
        base, order: int64 [ranks], scratch: bases of its ranks, rising, and its slot on each of them.
        quota: int64 [all slots], changed.

    Returns:
        Whether the quota changed.
    """
    fine_cost, half = expert_cost << shift, (1 << shift) >> 1
    unit = shift if in_whole else 0  # 2^unit parts are given at once
    parts, least = np.int64(tokens) << (shift - unit), expert_cost << (shift - unit)
    changed, usable, at_slot = False, 0, 0
    # 1. The expert's ranks by rising base, by insertion: there are few.
    while at_slot < len(slots):
        slot = slots[at_slot]
        rank, own = rank_of_slot[slot], _cost(quota[slot], fine_cost)
        at_slot += 1
        while at_slot < len(slots) and rank_of_slot[slots[at_slot]] == rank:
            own += _cost(quota[slots[at_slot]], fine_cost)
            changed |= quota[slots[at_slot]] > 0
            quota[slots[at_slot]] = 0
            at_slot += 1
        with_expert = cost[rank]
        cost[rank] -= own
        here = (cost[rank] + half) >> shift if in_whole else cost[rank] + (with_expert >> 1)
        at = usable
        while at > 0 and base[at - 1] > here:
            base[at], order[at] = base[at - 1], order[at - 1]
            at -= 1
        base[at], order[at] = here, slot
        usable += 1
    # 2. The level.
    level, total = np.int64(0), parts
    for at in range(usable):
        total += base[at]
        reached = max(base[at] + least, (total + at) // (at + 1))
        if at == 0 or reached < level:
            level = reached
    # 3. The fewest ranks that hold the tokens below it.
    used, total = 1, parts + base[0]
    while used * level < total:
        total += base[used]
        used += 1
    # 4. Even them out.
    whole, rest = divmod(total, np.int64(used))
    for at in range(usable):
        slot = order[at]
        given = (whole - base[at] + (at < rest)) << unit if at < used else np.int64(0)
        changed |= quota[slot] != given
        quota[slot] = given
        cost[rank_of_slot[slot]] += _cost(given, fine_cost)
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
    own,
    counts,
    rank,
    slots,
    first,
    count,
    rank_of_slot,
    num_ranks,
    expert_cost,
    chosen,
    received,
):
    """Split the batch over all ranks, and choose the slots of this rank's tokens.

    Of the tokens of an expert on a rank that holds it, as many stay there as its quota allows. The others, in
    the order of ranks and of tokens, fill what is left of the quotas in the order of slots.

    Args:
        expert_ids: integer [ids] of this rank, in the order of tokens, top_k ids each; -1 for none.
        counted: number of ids that are in `counts`; those behind are padding, spread evenly by their token.
        own: int64 [logical], the tokens of those ids.
        counts: int64 [sources, logical]: tokens on each rank, or one row for tokens that all ranks hold.
        rank: the row of this rank in `counts`.
        slots, first, count: replicas of the layer, see `split_layer`.
        chosen: integer [ids]; written: the slot of each id, or -1.
        received: int64 [sources, slots of this rank], zeros; written: tokens from each source, or no rows.

    Returns:
        False for counts below 0, or others than `own` in the row of this rank: then nothing is written.
    """
    num_logical = counts.shape[1]
    for expert in range(num_logical):
        if counts[rank, expert] != own[expert] or counts[:, expert].min() < 0:
            return False
    begin = np.searchsorted(rank_of_slot, rank)
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
        mine = slots[first[expert] : first[expert] + count[expert]]
        if received.shape[0] > 0:
            _count_received(counts[:, expert], mine, rank_of_slot, quota, rank, begin, received)
        for source in range(rank):
            passed[expert] += counts[source, expert]
        for slot in mine:
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
    return True


@cached_njit(nogil=True, fastmath=False, boundscheck=False)
def _count_received(counts, slots, rank_of_slot, quota, rank, begin, received):
    """Count one expert's tokens that `rank` gets from each source, in the order of `choose_slots`.

    Args:
        counts: int64 [sources], its tokens on each rank.
        slots: its slots, rising.
        quota: int64 [all slots], tokens of each slot.
        begin: first slot of the rank.
        received: int64 [sources, slots of the rank], added to.
    """
    is_here = False
    for slot in slots:
        is_here |= rank_of_slot[slot] == rank
    if not is_here:
        return
    left, free = counts.copy(), np.empty(slots.shape[0], np.int64)
    for place in range(slots.shape[0]):
        slot = slots[place]
        holder = rank_of_slot[slot]
        stay = min(left[holder], quota[slot])
        left[holder] -= stay
        free[place] = quota[slot] - stay
        if holder == rank:
            received[rank, slot - begin] += stay
    place = 0
    for source in range(left.shape[0]):
        while left[source] > 0:
            taken = min(left[source], free[place])
            if rank_of_slot[slots[place]] == rank:
                received[source, slots[place] - begin] += taken
            left[source] -= taken
            free[place] -= taken
            place += free[place] == 0 and left[source] > 0
