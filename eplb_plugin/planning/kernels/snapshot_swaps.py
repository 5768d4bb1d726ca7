"""The best swap of a heavy rank with another rank of its node, for the smooth peak.

To first order, a change of a rank's load changes the smooth peak by that change times the rank's derivative
in each snapshot. `Scratch` holds loads weighted this way: by the derivative of the heavy rank, or of another
one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiling import jitted
from .snapshot_objective import NEVER, ROUNDING, net_gain, power_16, sum_terms, weighted_sum
from .snapshot_state import moves_to, set_costs

__all__ = ["Scratch", "best_swap", "new_scratch"]

_LEAST_WEIGHT = np.float32(1e-30)


class Scratch(NamedTuple):
    """Memory for the search around one heavy rank. Slots, in interleaved order, and ranks are of its node."""

    at_heavy: np.ndarray  # float32 [slots], load of a slot, weighted as on the heavy rank
    rest_at_heavy: np.ndarray  # float32 [slots], the same for the other slots of its rank, summed
    at_own: np.ndarray  # float32 [slots], load of a slot, weighted as on its own rank
    # float32 [capacity, ranks], load of each slot of the heavy rank, weighted as on each rank
    at_rank: np.ndarray
    at_rank_of_slot: np.ndarray  # float32 [slots], a row of `at_rank`, repeated for each slot
    weight: np.ndarray  # float32 [slots], weight of the slot's rank in the smooth peak
    # float32 [slots], 1 / weight, or 0 where the weight is too low for a meaningful quotient
    inverse: np.ndarray
    # float32 [slots], moves of a swap with a slot of the heavy rank, but for those of the expert that leaves
    # it: for the slot in question, and for an expert that is new on all ranks
    cost: np.ndarray
    usual_cost: np.ndarray
    bound: np.ndarray  # float32 [capacity, slots], upper bounds on the net gain of each swap
    # float32 [slots] and [ranks], the highest of them
    slot_bound: np.ndarray
    rank_bound: np.ndarray
    # float32 [logical], moves to bring an expert to the heavy rank; 1 between searches
    expert_cost: np.ndarray
    # float32 [snapshots]
    weights: np.ndarray
    terms: np.ndarray
    growth: np.ndarray
    surplus: np.ndarray  # int64 [slots], the slots whose expert has several replicas
    # float32 [slots], by place in `surplus`; see `snapshot_replicas`
    surplus_arriving: np.ndarray
    surplus_at_own: np.ndarray
    surplus_weight: np.ndarray
    surplus_inverse: np.ndarray
    surplus_growth: np.ndarray
    surplus_cost: np.ndarray
    surplus_bound: np.ndarray
    # float32 [slots], least growth of a rank by the loss of a replica of its expert elsewhere
    own_growth: np.ndarray
    # float64 [logical], the same, summed over the replicas of an expert; 0 between searches
    expert_growth: np.ndarray


@jitted
def new_scratch(num_snapshots, num_logical, capacity, ranks_per_node):
    width = capacity * ranks_per_node
    return Scratch(
        at_heavy=np.empty(width, np.float32), rest_at_heavy=np.empty(width, np.float32),
        at_own=np.empty(width, np.float32), at_rank=np.empty((capacity, ranks_per_node), np.float32),
        at_rank_of_slot=np.empty(width, np.float32), weight=np.empty(width, np.float32),
        inverse=np.empty(width, np.float32), cost=np.empty(width, np.float32),
        usual_cost=np.empty(width, np.float32), bound=np.empty((capacity, width), np.float32),
        slot_bound=np.empty(width, np.float32), rank_bound=np.empty(ranks_per_node, np.float32),
        expert_cost=np.ones(num_logical, np.float32), weights=np.empty(num_snapshots, np.float32),
        terms=np.empty(num_snapshots, np.float32), growth=np.empty(num_snapshots, np.float32),
        surplus=np.empty(width, np.int64), surplus_arriving=np.empty(width, np.float32),
        surplus_at_own=np.empty(width, np.float32), surplus_weight=np.empty(width, np.float32),
        surplus_inverse=np.empty(width, np.float32), surplus_growth=np.empty(width, np.float32),
        surplus_cost=np.empty(width, np.float32), surplus_bound=np.empty(width, np.float32),
        own_growth=np.empty(width, np.float32), expert_growth=np.zeros(num_logical, np.float64),
    )  # fmt: skip


@jitted
def best_swap(state, scratch, heavy, price, least_gain, moves_left):
    """The swap of a slot of `heavy` with the highest net gain: that gain, slot of `heavy`, other slot, moves.

    Swaps are computed exactly in falling order of upper bounds, until no bound is above the best net gain.
    The slots are -1 where no swap is worth a round.
    """
    _weigh_slots(state, scratch, heavy)
    capacity, ranks_per_node = state.capacity, state.ranks_per_node
    expert, saves, share, slope, rank_of = state.expert, state.saves, state.share, state.slope, state.rank_of
    held_first, held_next = state.first, state.next_
    current_first, current_next = state.current_first, state.current_next
    load, power, unit = state.load, state.power, state.unit
    expert_load, fraction, replicas = state.expert_load, state.fraction, state.replicas
    at_rank, at_rank_of_slot, cost = scratch.at_rank, scratch.at_rank_of_slot, scratch.cost
    usual_cost, weights, terms = scratch.usual_cost, scratch.weights, scratch.terms
    bound, slot_bound, rank_bound = scratch.bound, scratch.slot_bound, scratch.rank_bound
    by_rank = at_rank_of_slot.reshape(capacity, ranks_per_node)
    bound_by_rank = slot_bound.reshape(capacity, ranks_per_node)
    first = heavy // ranks_per_node * ranks_per_node
    width = capacity * ranks_per_node
    begin = first * capacity
    own = heavy - first
    most = max(moves_left, 0)
    slot_bound[:] = np.float32(0.0)
    for place in range(capacity):
        mine = begin + place * ranks_per_node + own
        x = expert[mine]
        if x < 0:
            bound[place] = np.float32(-1.0)
            continue
        for snapshot in range(weights.shape[0]):
            weights[snapshot] = slope[snapshot] * share[snapshot, mine]
        weighted_sum(state.derivative, weights, first, at_rank[place])
        for other in range(capacity):
            for rank in range(ranks_per_node):
                by_rank[other, rank] = at_rank[place, rank]
        # Ranks with the expert in the placement in force save a move. Ranks that hold it now are excluded.
        back, none = np.float32(-1.0), np.float32(0.0)
        set_costs(current_first[x], current_next, rank_of, first, ranks_per_node, usual_cost, back, cost)
        set_costs(held_first[x], held_next, rank_of, first, ranks_per_node, usual_cost, NEVER, cost)
        _bound_swaps(
            scratch.at_heavy[mine - begin], np.float32(1.0) - saves[mine], state.weight[heavy], price,
            least_gain, most, scratch.at_heavy, scratch.rest_at_heavy, scratch.at_own, at_rank_of_slot,
            scratch.weight, scratch.inverse, cost, bound[place], slot_bound,
        )  # fmt: skip
        set_costs(current_first[x], current_next, rank_of, first, ranks_per_node, usual_cost, none, cost)
        set_costs(held_first[x], held_next, rank_of, first, ranks_per_node, usual_cost, none, cost)
    rank_bound[:] = np.float32(0.0)
    for other in range(capacity):
        for rank in range(ranks_per_node):
            value = bound_by_rank[other, rank]
            rank_bound[rank] = value if value > rank_bound[rank] else rank_bound[rank]
    best = 0.0
    best_mine, best_other, best_moves = -1, -1, 0
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
                    load, power, unit, slope, expert_load, fraction, replicas, heavy, first + rank, x, y,
                    terms,
                )  # fmt: skip
                moves = moves_to(current_first, current_next, rank_of, x, first + rank)
                moves += moves_to(current_first, current_next, rank_of, y, heavy)
                moves -= int(saves[mine]) + int(saves[begin + at])
                net = net_gain(gain, moves, price, least_gain)
                if net > best:
                    best = net
                    best_mine, best_other, best_moves = mine, begin + at, moves
    return best, best_mine, best_other, best_moves


@jitted
def _weigh_slots(state, scratch, heavy):
    """Fill what the search around a heavy rank needs of each slot of its node."""
    capacity, ranks_per_node = state.capacity, state.ranks_per_node
    expert, current, saves, rank_weight = state.expert, state.current, state.saves, state.weight
    slope, derivative = state.slope, state.derivative
    weight, inverse, expert_cost, cost = scratch.weight, scratch.inverse, scratch.expert_cost, scratch.cost
    usual_cost, weights = scratch.usual_cost, scratch.weights
    at_heavy, rest_at_heavy, rank_bound = scratch.at_heavy, scratch.rest_at_heavy, scratch.rank_bound
    first = heavy // ranks_per_node * ranks_per_node
    width = capacity * ranks_per_node
    begin = first * capacity
    own = heavy - first
    for snapshot in range(weights.shape[0]):
        weights[snapshot] = slope[snapshot] * derivative[snapshot, heavy]
    weighted_sum(state.share, weights, begin, at_heavy)
    weighted_sum(state.share_power, slope, begin, scratch.at_own)
    # The inner loops run over ranks, which are neighbours in memory.
    shape = (capacity, ranks_per_node)
    heavy_by_rank, rest_by_rank = at_heavy.reshape(shape), rest_at_heavy.reshape(shape)
    weight_by_rank, inverse_by_rank = weight.reshape(shape), inverse.reshape(shape)
    rank_bound[:] = np.float32(0.0)
    for place in range(capacity):
        for rank in range(ranks_per_node):
            rank_bound[rank] += heavy_by_rank[place, rank]
    for rank in range(ranks_per_node):
        here = rank_weight[first + rank]
        weight_by_rank[0, rank] = here
        inverse_by_rank[0, rank] = np.float32(1.0) / here if here > _LEAST_WEIGHT else np.float32(0.0)
    for place in range(capacity):
        for rank in range(ranks_per_node):
            weight_by_rank[place, rank] = weight_by_rank[0, rank]
            inverse_by_rank[place, rank] = inverse_by_rank[0, rank]
            rest_by_rank[place, rank] = rank_bound[rank] - heavy_by_rank[place, rank]
    for at in range(begin + own, begin + width, ranks_per_node):
        if current[at] >= 0:
            expert_cost[current[at]] = np.float32(0.0)
    for at in range(begin + own, begin + width, ranks_per_node):
        if expert[at] >= 0:
            expert_cost[expert[at]] = NEVER
    for at in range(width):
        held = expert[begin + at]
        usual_cost[at] = expert_cost[held] - saves[begin + at] if held >= 0 else NEVER
        cost[at] = usual_cost[at]
    for at in range(begin + own, begin + width, ranks_per_node):
        if current[at] >= 0:
            expert_cost[current[at]] = np.float32(1.0)
        if expert[at] >= 0:
            expert_cost[expert[at]] = np.float32(1.0)


@jitted
def _bound_swaps(
    mine, own_cost, heavy_weight, price, least_gain, most, at_heavy, rest_at_heavy, at_own, arriving, weight,
    inverse, cost, bound, highest,
):  # fmt: skip
    """Bound the net gain of swaps of one slot of the heavy rank with each slot of its node from above.

    Powers are convex. Weight snapshots by their power now: the mean power of a rank after a swap is at least
    the power of the weighted mean. That takes one power a rank, rather than one a snapshot. The bound is -1
    where a swap cannot be worth a round.
    """
    scale = np.float32(1.0) / heavy_weight
    fee = np.float32(price)
    least = np.float32(least_gain)
    limit = np.float32(most)
    for at in range(bound.shape[0]):
        here = np.float32(1.0) - (mine - at_heavy[at]) * scale
        there = np.float32(1.0) + (arriving[at] - at_own[at]) * inverse[at]
        # The weights of a light rank say little; its load, weighted as on the heavy rank, says more.
        again = (mine + rest_at_heavy[at]) * scale
        least_there, least_again = weight[at] * power_16(there), heavy_weight * power_16(again)
        after = least_there if least_there > least_again else least_again
        gain = heavy_weight * (ROUNDING - power_16(here)) + ROUNDING * weight[at] - after
        moves = own_cost + cost[at]
        net = gain - fee * moves
        net = net if net > least else np.float32(-1.0)
        net = net if moves <= limit else np.float32(-1.0)
        bound[at] = net
        highest[at] = net if net > highest[at] else highest[at]


@jitted
def _swap_gain(load, power, unit, slope, expert_load, fraction, replicas, heavy, rank, x, y, terms):
    """The least fall of the norms when `heavy` gives expert `x` to `rank` and gets `y`."""
    given, taken = np.float32(fraction[replicas[x]]), np.float32(fraction[replicas[y]])
    for snapshot in range(terms.shape[0]):
        shift = expert_load[x, snapshot] * given - expert_load[y, snapshot] * taken
        after = power_16((load[heavy, snapshot] - shift) * unit[snapshot])
        after += power_16((load[rank, snapshot] + shift) * unit[snapshot])
        now = power[heavy, snapshot] + power[rank, snapshot]
        terms[snapshot] = slope[snapshot] * (now - after)
    return sum_terms(terms)
