"""The best additional replica for an expert of a heavy rank, for the smooth peak."""

from __future__ import annotations

import numpy as np

from .cells import _leads, _mark
from .compiling import _compile_apart
from .copying import _copy
from .limits import _LEAST_GAIN_32, _NEVER, _ROUNDING
from .smooth_peak import _power, _sum, _worth


@_compile_apart
def _add_growth(load, power, unit, expert_load, expert, factor, rank, growth):
    """Add to `growth` [snapshots] by how much a rank's power grows with `factor` times an expert."""
    for snapshot in range(growth.shape[0]):
        after = load[rank, snapshot] + expert_load[expert, snapshot] * factor
        growth[snapshot] += _power(after * unit[snapshot]) - power[rank, snapshot]


@_compile_apart
def _add_holders(
    load, power, unit, expert_load, first, next_, rank_of, twins, expert, factor, left_out, growth
):
    """`_add_growth` on each rank that holds an expert, but for `left_out`; `factor` is for each replica."""
    cell = first[expert]
    while cell >= 0:
        rank = rank_of[cell]
        # Several replicas on a rank count as one.
        if rank != left_out and (twins[cell] == 1 or _leads(first, next_, rank_of, expert, cell)):
            _add_growth(
                load, power, unit, expert_load, expert, factor * np.float32(twins[cell]), rank, growth
            )
        cell = next_[cell]


@_compile_apart
def _bound_changes(relief, price, most, part, arriving, leaving, warm, inverse, burden, cost, bound):
    """Bound the worth of one more replica of an expert, in each surplus cell, from above; see
    `_bound_swaps`."""
    fee = np.float32(price)
    limit = np.float32(most)
    for at in range(bound.shape[0]):
        there = np.float32(1.0) + (arriving[at] * part - leaving[at]) * inverse[at]
        gain = relief + warm[at] * (_ROUNDING - _power(there)) - burden[at]
        worth = gain - fee * cost[at]
        worth = worth if worth > _LEAST_GAIN_32 else np.float32(-1.0)
        bound[at] = worth if cost[at] <= limit else np.float32(-1.0)


@_compile_apart
def _list_surplus(state, scratch, begin):
    """List the cells whose expert has several replicas, with what a change of each is bounded by, in
    `scratch.surplus` and `scratch.packed`; returns how many there are."""
    expert, count, twins, portion = state.expert, state.replicas, state.twins, state.portion
    surplus, extra, total, packed = scratch.surplus, scratch.extra, scratch.total, scratch.packed
    relief, inverse, warm = scratch.relief, scratch.inverse, scratch.warm
    number = 0
    for at in range(relief.shape[0]):
        y = expert[begin + at]
        if y < 0 or count[y] < 2:
            continue
        # What the loss of a replica elsewhere costs on this rank, at least.
        growth = np.float32(portion[count[y] - 1] / portion[count[y]] - 1.0)
        hotter = _power(np.float32(1.0) + relief[at] * inverse[at] * growth)
        extra[at] = warm[at] * (min(hotter, np.float32(1e6)) - _ROUNDING)
        total[y] += np.float64(extra[at])
        surplus[number] = at
        packed[1, number], packed[2, number], packed[3, number] = relief[at], warm[at], inverse[at]
        number += 1
    for place in range(number):
        at = surplus[place]
        y = expert[begin + at]
        alone = twins[begin + at] == 1
        packed[4, place] = np.float32(total[y] - np.float64(extra[at])) if alone else np.float32(0.0)
    for place in range(number):
        total[expert[begin + surplus[place]]] = 0.0
    return number


@_compile_apart
def _best_change(state, scratch, heavy, capacity, ranks_per_node, price, moves_left, worth_of_swap):
    """The best way to give an expert of `heavy` one more replica, in a cell of an expert that has several.

    Returns (expert, cell, moves); cell -1 when nothing is worth more than `worth_of_swap`. Ranks that hold
    replicas of both experts, other than the cell's own, are judged for one change after the other. To be
    called after `_best_swap` for the same rank.
    """
    first = heavy // ranks_per_node * ranks_per_node
    begin = first * capacity
    num_surplus = _list_surplus(state, scratch, begin)
    if num_surplus == 0:
        return -1, -1, 0
    expert, frees, slope, rank_of, count = (
        state.expert,
        state.frees,
        state.slope,
        state.rank_of,
        state.replicas,
    )
    held_first, held_next, twins = state.first, state.next_, state.twins
    load, power, unit, expert_load = state.load, state.power, state.unit, state.expert_load
    portion = state.portion
    growth, terms, surplus = scratch.growth, scratch.terms, scratch.surplus
    arriving, by_rank, cost = scratch.packed[0], scratch.rank_bound, scratch.packed[5]
    bound = scratch.packed[6, :num_surplus]
    ones = scratch.cell_bound[:ranks_per_node]
    ones[:] = np.float32(1.0)
    none = np.float32(-1.0)
    most = max(moves_left, 0)
    best = worth_of_swap
    best_expert, best_cell, best_cost = -1, -1, 0
    for place in range(capacity):
        x = expert[begin + place * ranks_per_node + heavy - first]
        if x < 0:
            continue
        fewer = np.float32(portion[count[x]] - portion[count[x] + 1])
        growth[:] = np.float32(0.0)
        _add_holders(
            load, power, unit, expert_load, held_first, held_next, rank_of, twins, x, -fewer, -1, growth
        )
        for snapshot in range(terms.shape[0]):
            terms[snapshot] = -growth[snapshot] * slope[snapshot]
        relief = _sum(terms)
        if _worth(relief, -1, price) <= best:
            continue
        _copy(ones, by_rank)  # moves that it takes to bring the expert to a rank
        _mark(state.origin_first[x], state.origin_next, rank_of, first, ranks_per_node, ones, none, by_rank)
        _mark(held_first[x], held_next, rank_of, first, ranks_per_node, ones, _NEVER, by_rank)
        for number in range(num_surplus):
            cell = begin + surplus[number]
            arriving[number] = scratch.arriving[place, rank_of[cell] - first]
            cost[number] = by_rank[rank_of[cell] - first] - frees[cell]
        _bound_changes(
            np.float32(relief), price, most, np.float32(portion[count[x] + 1] / portion[count[x]]), arriving,
            scratch.packed[1], scratch.packed[2], scratch.packed[3], scratch.packed[4], cost, bound,
        )  # fmt: skip
        for number in range(num_surplus):
            if bound[number] <= best:
                continue
            cell = begin + surplus[number]
            y, rank = expert[cell], rank_of[cell]
            more = np.float32(portion[count[y] - 1] - portion[count[y]])
            arrives = np.float32(portion[count[x] + 1])
            leaves = np.float32(portion[count[y]]) - np.float32(twins[cell] - 1) * more
            for snapshot in range(terms.shape[0]):
                after = load[rank, snapshot] + expert_load[x, snapshot] * arrives
                after -= expert_load[y, snapshot] * leaves
                terms[snapshot] = growth[snapshot] - power[rank, snapshot]
                terms[snapshot] += _power(after * unit[snapshot])
            _add_holders(
                load, power, unit, expert_load, held_first, held_next, rank_of, twins, y, more, rank, terms
            )
            for snapshot in range(terms.shape[0]):
                terms[snapshot] *= -slope[snapshot]
            worth = _worth(_sum(terms), int(cost[number]), price)
            if worth > best:
                best = worth
                best_expert, best_cell, best_cost = x, cell, int(cost[number])
    return best_expert, best_cell, best_cost
