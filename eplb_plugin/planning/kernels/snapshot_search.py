"""The plan of one layer for several snapshots: a search that lowers their smooth peak."""

from __future__ import annotations

import numpy as np

from .compiling import copy_into, inlined, jitted
from .load_drift import price_factor
from .lower_bounds import snapshots_bound
from .lpt_packing import pack_lpt
from .rank_matching import match_by_overlap
from .replica_counts import VACANT, apply_counts, greedy_counts
from .single_load_counts import pair_counts_by_node
from .snapshot_objective import LEAST_GAIN, SPREAD, ExchangeTerms, smooth_peak
from .snapshot_replicas import best_replica_change
from .snapshot_state import interleaved, make_replica_change, make_swap, start_search
from .snapshot_swaps import best_swap, new_scratch

__all__ = ["plan_snapshots"]

_TRIED_RANKS = 3  # heavy ranks that a round tries before the search ends
_FIRST_ROUNDS = 15  # rounds after which the better of two starts is continued
_HYSTERESIS = 1.5  # factor on the load of an expert that would lose a replica
_STEADY = 0.5  # factor on the price up to which a fresh start may earn its moves
_SPREAD_RISE = 3.0  # measured: loads with a factor of a third or more vary enough for all of `SPREAD`
_LEAST_PROGRESS = 1e-5  # by which a candidate has to beat the best one


@inlined
def plan_snapshots(problem, layer, load, slot_expert):
    """Plan one layer of a `Problem`, from its start or, where it has none, from scratch.

    Writes `slot_expert`, int64 [slots], for `load`, float32 [snapshots, logical] of a mean rank load of 1.
    """
    num_snapshots, num_logical = load.shape
    total, older = np.zeros(num_logical, np.float64), np.zeros(num_logical, np.float64)
    even = np.zeros(num_logical, np.float64)
    for snapshot in range(num_snapshots):
        if snapshot == num_snapshots // 2:
            copy_into(older, total)
        for expert in range(num_logical):
            total[expert] += np.float64(load[snapshot, expert])
        if snapshot % 2 == 0:
            for expert in range(num_logical):
                even[expert] += np.float64(load[snapshot, expert])
    capacity = slot_expert.shape[0] // problem.rank_slots.shape[0]
    scratch = new_scratch(num_snapshots, num_logical, capacity, problem.ranks_per_node)
    # Gains that last earn their moves with less, and do not have to allow for other loads.
    factor = price_factor(total, older, even, problem.rank_slots.shape[0], problem.least_price)
    spread = SPREAD * min(1.0, _SPREAD_RISE * factor)
    terms = ExchangeTerms(problem.price * factor, LEAST_GAIN * factor, spread, factor)
    if problem.start.shape[1] > 0:
        state = _improve_start(problem, terms, layer, load, total, scratch)
    else:
        state = _plan_from_scratch(problem, terms, layer, load, total, scratch, slot_expert)
    for slot in range(slot_expert.shape[0]):
        slot_expert[slot] = state.expert[interleaved(slot, capacity, problem.ranks_per_node)]


@inlined
def _plan_from_scratch(problem, terms, layer, load, total, scratch, packed):
    """Improve LPT packings, the candidates, one after the other; the lowest smooth peak wins.

    `packed`, int64 [slots], is scratch.
    """
    expert_node, rank_slots = problem.expert_node[layer], problem.rank_slots
    num_ranks, ranks_per_node = rank_slots.shape[0], problem.ranks_per_node
    none = np.zeros(total.shape[0], np.int64)
    count = greedy_counts(total, expert_node, none, 1.0, rank_slots.sum(), num_ranks, ranks_per_node)
    bound = max(1.0, snapshots_bound(load, count, rank_slots.min()))
    pack_lpt(total, count, expert_node, ranks_per_node, rank_slots, 0, problem.seed, packed)
    best = start_search(load, packed, packed, num_ranks, ranks_per_node, terms.spread)
    best_value, failures = np.inf, 0
    for candidate in range(problem.candidates):
        state = best
        if candidate > 0:
            pack_lpt(total, count, expert_node, ranks_per_node, rank_slots, candidate, problem.seed, packed)
            state = start_search(load, packed, packed, num_ranks, ranks_per_node, terms.spread)
        value, _ = _lower_smooth_peak(problem, terms, state, scratch, problem.rounds, np.inf)
        failures = 0 if value < best_value - _LEAST_PROGRESS else failures + 1
        if value < best_value:
            best, best_value = state, value
        if best_value <= bound + problem.tolerance or failures >= problem.patience:
            break
    # Two slots a rank: counts for the summed load are one more candidate.
    if best_value > 1.0 + problem.tolerance and pair_counts_by_node(
        total, expert_node, rank_slots, ranks_per_node, problem.tolerance, problem.seed, count
    ):
        pack_lpt(total, count, expert_node, ranks_per_node, rank_slots, 0, problem.seed, packed)
        state = start_search(load, packed, packed, num_ranks, ranks_per_node, terms.spread)
        value, _ = _lower_smooth_peak(problem, terms, state, scratch, problem.rounds, np.inf)
        if value < best_value:
            best = state
    return best


@inlined
def _improve_start(problem, terms, layer, load, total, scratch):
    """Improve the start by swaps and replica changes that earn the price of their moves.

    There are two starts: the given one, and one with new replica counts and all experts on `expert_node`.
    Single exchanges rarely lead to other counts. The counts in force get a bonus. After a few rounds
    the start with the lower smooth peak plus price of moves is continued. A given start with vacant slots
    takes the new counts at once. With two slots a rank and steady traffic, a plan from scratch competes.
    """
    start, current, expert_node = problem.start[layer], problem.current[layer], problem.expert_node[layer]
    num_ranks, ranks_per_node = problem.rank_slots.shape[0], problem.ranks_per_node
    num_slots = start.shape[0]
    capacity = num_slots // num_ranks
    in_force = np.zeros(total.shape[0], np.int64)
    recounted = np.empty(num_slots, np.int64)
    num_outside, num_vacant = 0, 0
    for slot in range(num_slots):
        expert = start[slot]
        recounted[slot] = expert
        if expert == VACANT:
            num_vacant += 1
        elif expert >= 0 and expert_node[expert] != slot // capacity // ranks_per_node:
            recounted[slot] = VACANT
            num_outside += 1
        elif expert >= 0:
            in_force[expert] += 1
    count = greedy_counts(
        total, expert_node, in_force, _HYSTERESIS, problem.rank_slots.sum(), num_ranks, ranks_per_node
    )
    num_added = 0
    for expert in range(total.shape[0]):
        num_added += max(0, count[expert] - in_force[expert])
    has_other = num_vacant == 0 and 0 < num_added <= problem.max_moves
    if num_vacant > 0 or has_other:
        apply_counts(total, in_force, count, expert_node, recounted, num_ranks, ranks_per_node)
    # The more promising start goes first: the other one is given up once it cannot catch up.
    other_first = (
        has_other
        and num_outside == 0
        and (_peak(total, count, recounted, capacity) < _peak(total, in_force, start, capacity))
    )
    given = recounted if num_vacant > 0 else start
    best = start_search(load, given, current, num_ranks, ranks_per_node, terms.spread)
    first, rounds = best, min(problem.rounds, _FIRST_ROUNDS)
    best_value, done = np.inf, False
    for attempt in range(3):
        is_other = (attempt == 0) == other_first and attempt < 2
        if (is_other and not has_other) or (attempt == 2 and done):
            continue
        state, rival = first, best_value
        if is_other:
            state = start_search(load, recounted, current, num_ranks, ranks_per_node, terms.spread)
        elif attempt == 2:
            state, rival = best, np.inf
            state.failed[:] = False
            state.stale[0] = False
            rounds = problem.rounds - rounds
        value, finished = _lower_smooth_peak(problem, terms, state, scratch, rounds, rival)
        value += terms.price * state.moves[0]
        if is_other and state.moves[0] > problem.max_moves:
            continue
        if value < best_value or (value == best_value and not is_other):
            best, best_value, done = state, value, finished
    if capacity == 2 and terms.factor < _STEADY:
        state = _fresh_start(problem, terms, layer, load, total)
        if state.moves[0] <= problem.max_moves:
            value, _ = _lower_smooth_peak(problem, terms, state, scratch, problem.rounds, best_value)
            if value + terms.price * state.moves[0] < best_value:
                best = state
    return best


@inlined
def _fresh_start(problem, terms, layer, load, total):
    """A plan from scratch by the best counts and packing of two slots a rank, its ranks matched to those in
    force. Single exchanges from the placement in force end far above it: a rank has only one other slot."""
    expert_node, current = problem.expert_node[layer], problem.current[layer]
    rank_slots, ranks_per_node = problem.rank_slots, problem.ranks_per_node
    num_ranks = rank_slots.shape[0]
    none = np.zeros(total.shape[0], np.int64)
    count = greedy_counts(total, expert_node, none, 1.0, rank_slots.sum(), num_ranks, ranks_per_node)
    pair_counts_by_node(
        total, expert_node, rank_slots, ranks_per_node, problem.tolerance, problem.seed, count
    )
    packed = np.empty(current.shape[0], np.int64)
    pack_lpt(total, count, expert_node, ranks_per_node, rank_slots, 0, problem.seed, packed)
    matched = match_by_overlap(packed, current, rank_slots, ranks_per_node, total.shape[0])
    return start_search(load, matched, current, num_ranks, ranks_per_node, terms.spread)


@inlined
def _peak(total, count, slot_expert, capacity):
    """The peak rank load of the loads of all snapshots together."""
    peak = 0.0
    for first in range(0, slot_expert.shape[0], capacity):
        load = 0.0
        for slot in range(first, first + capacity):
            if slot_expert[slot] >= 0:
                load += total[slot_expert[slot]] / count[slot_expert[slot]]
        peak = max(peak, load)
    return peak


@jitted
def _lower_smooth_peak(problem, terms, state, scratch, rounds, rival):
    """Lower the smooth peak by swaps and replica changes; a later call continues the search.

    A round relieves the rank with the largest weight in the smooth peak, by the exchange with the highest net
    gain. Skip rule: a rank without improving exchange is skipped until it changes. `rival` is the smooth
    peak plus price of moves of another start. The search ends early if `rival` is out of reach, even with the
    gain of the best of the last three rounds in each round left.

    Returns:
        The smooth peak; whether more rounds would change nothing.
    """
    weight, failed, tried_at, rank_of = state.weight, state.failed, state.tried_at, state.rank_of
    moves, exchanges, stale = state.moves, state.exchanges, state.stale
    num_ranks, price, least_gain = failed.shape[0], terms.price, terms.least_gain
    done = False
    one, two, three = np.inf, np.inf, np.inf  # values before the last rounds
    for number in range(rounds):
        norm, peak = smooth_peak(state)
        value = norm + price * moves[0]
        if number >= 3:
            gain = max(three - two, two - one, one - value)
            if value - gain * (rounds - number) > rival:
                break
        one, two, three = value, one, two
        if peak <= 1.0 + problem.tolerance:
            done = True
            break
        improved = False
        for _ in range(_TRIED_RANKS):
            heavy = num_ranks  # none; a literal would compile all callees once more
            for rank in range(num_ranks):
                if not failed[rank] and (heavy == num_ranks or weight[rank] > weight[heavy]):
                    heavy = rank
            if heavy == num_ranks:
                break
            if tried_at[heavy] == exchanges[0]:
                failed[heavy] = True
                continue
            moves_left = problem.max_moves - moves[0]
            gain, mine, other, swap_moves = best_swap(state, scratch, heavy, price, least_gain, moves_left)
            expert, slot, change_moves = best_replica_change(
                state, scratch, heavy, price, least_gain, moves_left, gain
            )
            if slot >= 0:
                make_replica_change(state, expert, slot)
                moves[0] += change_moves
                failed[:] = False
            elif mine >= 0:
                make_swap(state, mine, other)
                moves[0] += swap_moves
                failed[rank_of[other]] = False
            else:
                failed[heavy] = True
                tried_at[heavy] = exchanges[0]
                continue
            stale[0] = slot < 0
            exchanges[0] += 1
            improved = True
            break
        if not improved:
            if not stale[0]:
                done = True
                break
            failed[:] = False
            stale[0] = False
    return smooth_peak(state)[0], done
