"""The best swap of a heavy rank with another rank, for the smooth peak."""

from __future__ import annotations

import numpy as np

from .cells import _arrives, _mark
from .compiling import _compile_apart
from .limits import _LEAST_GAIN_32, _NEVER, _ROUNDING
from .smooth_peak import _power, _project, _sum, _worth
from .smooth_scratch import _look_around


@_compile_apart
def _bound_swaps(
    mine, own_cost, heat, price, most, leaving, staying, relief, arriving, warm, inverse, cost, bound,
    highest,
):  # fmt: skip
    """Bound the worth of swaps of one cell of the heavy rank with each cell of its node from above.

    Powers are convex, so the mean power of a rank after a swap, over snapshots weighted by what they weigh
    in the power now, is no lower than the power of the weighted mean. That needs one power for each rank
    instead of one for each snapshot. -1 where a swap cannot be worth it.
    """
    scale = np.float32(1.0) / heat
    fee = np.float32(price)
    limit = np.float32(most)
    for at in range(bound.shape[0]):
        here = np.float32(1.0) - (mine - leaving[at]) * scale
        there = np.float32(1.0) + (arriving[at] - relief[at]) * inverse[at]
        # A cold rank says little by what it weighs now: its load as it counts on the heavy rank says more.
        again = (mine + staying[at]) * scale
        least_there, least_again = warm[at] * _power(there), heat * _power(again)
        after = least_there if least_there > least_again else least_again
        gain = heat * (_ROUNDING - _power(here)) + _ROUNDING * warm[at] - after
        moves = own_cost + cost[at]
        worth = gain - fee * moves
        worth = worth if worth > _LEAST_GAIN_32 else np.float32(-1.0)
        worth = worth if moves <= limit else np.float32(-1.0)
        bound[at] = worth
        highest[at] = worth if worth > highest[at] else highest[at]


@_compile_apart
def _best_swap(state, scratch, heavy, capacity, ranks_per_node, price, moves_left):
    """The best swap of a cell of `heavy` with another of its node: (worth, cell, other cell, moves); the
    cells are -1 when none is worth it.

    Swaps are judged exactly in the order of bounds on their worth, until no bound is above the best.
    """
    _look_around(state, scratch, heavy, capacity, ranks_per_node)
    expert, frees, share, slope, rank_of = state.expert, state.frees, state.share, state.slope, state.rank_of
    held_first, held_next, origin_first, origin_next = (
        state.first, state.next_, state.origin_first, state.origin_next,
    )  # fmt: skip
    load, power, unit, expert_load, portion, count = (
        state.load, state.power, state.unit, state.expert_load, state.portion, state.replicas,
    )  # fmt: skip
    tiled, weights, terms, cost, usual_cost, arriving = (
        scratch.tiled, scratch.weights, scratch.terms, scratch.cost, scratch.usual_cost, scratch.arriving,
    )  # fmt: skip
    bound, cell_bound, rank_bound = scratch.bound, scratch.cell_bound, scratch.rank_bound
    tiles = tiled.reshape(capacity, ranks_per_node)
    bound_tiles = cell_bound.reshape(capacity, ranks_per_node)
    first = heavy // ranks_per_node * ranks_per_node
    width = capacity * ranks_per_node
    begin = first * capacity
    own = heavy - first
    most = max(moves_left, 0)
    cell_bound[:] = np.float32(0.0)
    for place in range(capacity):
        mine = begin + place * ranks_per_node + own
        x = expert[mine]
        if x < 0:
            bound[place] = np.float32(-1.0)
            continue
        for snapshot in range(weights.shape[0]):
            weights[snapshot] = slope[snapshot] * share[snapshot, mine]
        _project(state.steep, weights, first, arriving[place])
        for other in range(capacity):
            for rank in range(ranks_per_node):
                tiles[other, rank] = arriving[place, rank]
        # Ranks that had the expert save a move; those that have it are left out.
        back = np.float32(-1.0)
        _mark(origin_first[x], origin_next, rank_of, first, ranks_per_node, usual_cost, back, cost)
        _mark(held_first[x], held_next, rank_of, first, ranks_per_node, usual_cost, _NEVER, cost)
        _bound_swaps(
            scratch.leaving[mine - begin], np.float32(1.0) - frees[mine], state.heat[heavy], price, most,
            scratch.leaving, scratch.staying, scratch.relief, tiled, scratch.warm, scratch.inverse, cost,
            bound[place], cell_bound,
        )  # fmt: skip
        none = np.float32(0.0)
        _mark(origin_first[x], origin_next, rank_of, first, ranks_per_node, usual_cost, none, cost)
        _mark(held_first[x], held_next, rank_of, first, ranks_per_node, usual_cost, none, cost)
    rank_bound[:] = np.float32(0.0)
    for other in range(capacity):
        for rank in range(ranks_per_node):
            value = bound_tiles[other, rank]
            rank_bound[rank] = value if value > rank_bound[rank] else rank_bound[rank]
    best = 0.0
    best_mine, best_other, best_cost = -1, -1, 0
    while True:
        rank = 0
        for other in range(ranks_per_node):
            if rank_bound[other] > rank_bound[rank]:
                rank = other
        if rank_bound[rank] <= best:
            break
        rank_bound[rank] = np.float32(0.0)
        for place in range(capacity):
            mine = begin + place * ranks_per_node + own
            for at in range(rank, width, ranks_per_node):
                if bound[place, at] <= best:
                    continue
                x, y = expert[mine], expert[begin + at]
                gain = _swap_gain(
                    load, power, unit, slope, expert_load, portion, count, heavy, first + rank, x, y, terms
                )
                moves = _arrives(origin_first, origin_next, rank_of, x, first + rank)
                moves += _arrives(origin_first, origin_next, rank_of, y, heavy)
                moves -= int(frees[mine]) + int(frees[begin + at])
                worth = _worth(gain, moves, price)
                if worth > best:
                    best = worth
                    best_mine, best_other, best_cost = mine, begin + at, moves
    return best, best_mine, best_other, best_cost


@_compile_apart
def _swap_gain(load, power, unit, slope, expert_load, portion, count, heavy, rank, x, y, terms):
    """By how much the norms fall, at least, when `heavy` gives `x` to `rank` and gets `y`."""
    given, taken = np.float32(portion[count[x]]), np.float32(portion[count[y]])
    for snapshot in range(terms.shape[0]):
        shift = expert_load[x, snapshot] * given - expert_load[y, snapshot] * taken
        after = _power((load[heavy, snapshot] - shift) * unit[snapshot])
        after += _power((load[rank, snapshot] + shift) * unit[snapshot])
        now = power[heavy, snapshot] + power[rank, snapshot]
        terms[snapshot] = slope[snapshot] * (now - after)
    return _sum(terms)
