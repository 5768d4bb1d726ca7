"""The best replica change for an expert of a heavy rank, for the smooth peak.

A replica change gives the expert one more replica, in the slot of an expert that has several (surplus).
"""

from __future__ import annotations

import numpy as np

from .compiling import copy_into, jitted
from .snapshot_objective import NEVER, ROUNDING, net_gain, power_16, sum_terms
from .snapshot_state import is_first_on_rank, set_costs

__all__ = ["best_replica_change"]

_MOST_GROWTH = np.float32(1e6)


@jitted
def best_replica_change(state, scratch, heavy, price, least_gain, moves_left, gain_of_swap):
    """The replica change for an expert of `heavy` with the highest net gain above `gain_of_swap`.

    `best_swap` must have been called for this rank before: it fills `scratch`. Returns expert, slot and
    moves; the slot is -1 where no change is better.
    """
    ranks_per_node = state.ranks_per_node
    first = heavy // ranks_per_node * ranks_per_node
    begin = first * state.capacity
    num_surplus = _list_surplus(state, scratch, begin)
    if num_surplus == 0:
        return -1, -1, 0
    expert, saves, slope, rank_of = state.expert, state.saves, state.slope, state.rank_of
    held_first, held_next, copies, replicas = state.first, state.next_, state.copies, state.replicas
    load, power, unit, expert_load = state.load, state.power, state.unit, state.expert_load
    fraction = state.fraction
    growth, terms, surplus = scratch.growth, scratch.terms, scratch.surplus
    arriving, cost, rank_cost = scratch.surplus_arriving, scratch.surplus_cost, scratch.rank_bound
    bound = scratch.surplus_bound[:num_surplus]
    ones = scratch.slot_bound[:ranks_per_node]
    ones[:] = np.float32(1.0)
    none = np.float32(-1.0)
    most = max(moves_left, 0)
    best = gain_of_swap
    best_expert, best_slot, best_moves = -1, -1, 0
    for place in range(state.capacity):
        x = expert[begin + place * ranks_per_node + heavy - first]
        if x < 0:
            continue
        fewer = np.float32(fraction[replicas[x]] - fraction[replicas[x] + 1])
        growth[:] = np.float32(0.0)
        _add_growth_of_holders(
            load, power, unit, expert_load, held_first, held_next, rank_of, copies, x, -fewer, -1, growth
        )
        for snapshot in range(terms.shape[0]):
            terms[snapshot] = -growth[snapshot] * slope[snapshot]
        relief = sum_terms(terms)
        if net_gain(relief, -1, price, least_gain) <= best:
            continue
        copy_into(rank_cost, ones)
        set_costs(
            state.current_first[x], state.current_next, rank_of, first, ranks_per_node, ones, none, rank_cost
        )
        set_costs(held_first[x], held_next, rank_of, first, ranks_per_node, ones, NEVER, rank_cost)
        for number in range(num_surplus):
            slot = begin + surplus[number]
            arriving[number] = scratch.at_rank[place, rank_of[slot] - first]
            cost[number] = rank_cost[rank_of[slot] - first] - saves[slot]
        _bound_changes(
            np.float32(relief), price, least_gain, most,
            np.float32(fraction[replicas[x] + 1] / fraction[replicas[x]]), arriving, scratch.surplus_at_own,
            scratch.surplus_weight, scratch.surplus_inverse, scratch.surplus_growth, cost, bound,
        )  # fmt: skip
        for number in range(num_surplus):
            if bound[number] <= best:
                continue
            slot = begin + surplus[number]
            y, rank = expert[slot], rank_of[slot]
            more = np.float32(fraction[replicas[y] - 1] - fraction[replicas[y]])
            arrives = np.float32(fraction[replicas[x] + 1])
            leaves = np.float32(fraction[replicas[y]]) - np.float32(copies[slot] - 1) * more
            for snapshot in range(terms.shape[0]):
                after = load[rank, snapshot] + expert_load[x, snapshot] * arrives
                after -= expert_load[y, snapshot] * leaves
                terms[snapshot] = growth[snapshot] - power[rank, snapshot]
                terms[snapshot] += power_16(after * unit[snapshot])
            # A rank with replicas of both experts is counted for one of the two changes after the other.
            _add_growth_of_holders(
                load, power, unit, expert_load, held_first, held_next, rank_of, copies, y, more, rank, terms
            )
            for snapshot in range(terms.shape[0]):
                terms[snapshot] *= -slope[snapshot]
            net = net_gain(sum_terms(terms), int(cost[number]), price, least_gain)
            if net > best:
                best = net
                best_expert, best_slot, best_moves = x, slot, int(cost[number])
    return best_expert, best_slot, best_moves


@jitted
def _list_surplus(state, scratch, begin):
    """List the slots whose expert has several replicas, with the terms of the bound of a change of each, in
    `scratch.surplus` and `scratch.surplus_*`. Returns their number."""
    expert, replicas, copies, fraction = state.expert, state.replicas, state.copies, state.fraction
    surplus, own_growth, expert_growth = scratch.surplus, scratch.own_growth, scratch.expert_growth
    at_own, inverse, weight = scratch.at_own, scratch.inverse, scratch.weight
    surplus_at_own, surplus_weight = scratch.surplus_at_own, scratch.surplus_weight
    surplus_inverse, surplus_growth = scratch.surplus_inverse, scratch.surplus_growth
    number = 0
    for at in range(at_own.shape[0]):
        y = expert[begin + at]
        if y < 0 or replicas[y] < 2:
            continue
        factor = np.float32(fraction[replicas[y] - 1] / fraction[replicas[y]] - 1.0)
        grown = power_16(np.float32(1.0) + at_own[at] * inverse[at] * factor)
        own_growth[at] = weight[at] * (min(grown, _MOST_GROWTH) - ROUNDING)
        expert_growth[y] += np.float64(own_growth[at])
        surplus[number] = at
        surplus_at_own[number], surplus_weight[number] = at_own[at], weight[at]
        surplus_inverse[number] = inverse[at]
        number += 1
    for place in range(number):
        at = surplus[place]
        y = expert[begin + at]
        elsewhere = np.float32(expert_growth[y] - np.float64(own_growth[at]))
        surplus_growth[place] = elsewhere if copies[begin + at] == 1 else np.float32(0.0)
    for place in range(number):
        expert_growth[expert[begin + surplus[place]]] = 0.0
    return number


@jitted
def _bound_changes(
    relief, price, least_gain, most, part, arriving, at_own, weight, inverse, growth, cost, bound
):
    """Bound the net gain of one more replica of an expert from above, in each surplus slot.

    The bound is that of `_bound_swaps`, and -1 where a change cannot be worth a round. `relief` is the fall
    of the norms by less load on the ranks that hold the expert. `part` is the load of each replica afterwards
    / now. `growth`, float32 [slots], is the least growth of the other ranks that hold the expert of a slot.
    """
    fee = np.float32(price)
    least = np.float32(least_gain)
    limit = np.float32(most)
    for at in range(bound.shape[0]):
        there = np.float32(1.0) + (arriving[at] * part - at_own[at]) * inverse[at]
        gain = relief + weight[at] * (ROUNDING - power_16(there)) - growth[at]
        net = gain - fee * cost[at]
        net = net if net > least else np.float32(-1.0)
        bound[at] = net if cost[at] <= limit else np.float32(-1.0)


@jitted
def _add_growth_of_holders(
    load, power, unit, expert_load, first, next_, rank_of, copies, expert, factor, left_out, growth
):
    """Apply `_add_growth` to each rank that holds an expert, but for `left_out`; `factor` is of a replica."""
    slot = first[expert]
    while slot >= 0:
        rank = rank_of[slot]
        # Several replicas on a rank count as one.
        if rank != left_out and (copies[slot] == 1 or is_first_on_rank(first, next_, rank_of, expert, slot)):
            _add_growth(
                load, power, unit, expert_load, expert, factor * np.float32(copies[slot]), rank, growth
            )
        slot = next_[slot]


@jitted
def _add_growth(load, power, unit, expert_load, expert, factor, rank, growth):
    """Add the growth of a rank's power with `factor` times an expert's load to `growth`, [snapshots]."""
    for snapshot in range(growth.shape[0]):
        after = load[rank, snapshot] + expert_load[expert, snapshot] * factor
        growth[snapshot] += power_16(after * unit[snapshot]) - power[rank, snapshot]
