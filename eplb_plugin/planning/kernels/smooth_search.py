"""Lowering the smooth peak of a layer."""

from __future__ import annotations

import numpy as np

from .cells import _count_moves
from .compiling import _compile_in_place
from .limits import _TRIED_RANKS
from .prices import _price_of_next
from .smooth_changes import _best_change
from .smooth_exchanges import _make_change, _make_swap
from .smooth_peak import _smooth_peak
from .smooth_scratch import _new_scratch
from .smooth_state import _cell, _start_search
from .smooth_swaps import _best_swap


@_compile_in_place
def _lower_smooth_peak(
    scaled, slot_expert, current, num_ranks, ranks_per_node, price, forced, max_moves, rounds, tolerance
):
    """Lower the smooth peak by swaps and changes of replicas, in place.

    A round relieves the rank that weighs most in the smooth peak. An exchange has to earn the price of its
    moves away from `current`, of which there are at most `max_moves`; of those that do, the one with the
    most gain per move is made. The price is that of the first move; `forced` moves cost nothing.

    Returns:
        The smooth peak, summed over snapshots; the moves; whether more rounds would change nothing.
    """
    num_snapshots, num_logical = scaled.shape
    capacity = slot_expert.shape[0] // num_ranks
    state = _start_search(scaled, slot_expert, current, num_ranks, ranks_per_node)
    scratch = _new_scratch(num_snapshots, num_logical, capacity, ranks_per_node)
    heat, rank_of = state.heat, state.rank_of
    moves = _count_moves(
        state.expert, state.first, state.next_, rank_of, state.origin_first, state.origin_next
    )
    # Ranks that could not be relieved, and have not changed since: not worth another look each round.
    failed = np.zeros(num_ranks, np.bool_)
    fresh = True  # whether they failed against the placement as it is now
    done = False
    for _ in range(rounds):
        _, peak = _smooth_peak(state)
        if peak <= 1.0 + tolerance:
            done = True
            break
        fee = _price_of_next(price, moves - forced, slot_expert.shape[0])
        improved = False
        for _ in range(_TRIED_RANKS):
            heavy = -1
            for rank in range(num_ranks):
                if not failed[rank] and (heavy < 0 or heat[rank] > heat[heavy]):
                    heavy = rank
            if heavy < 0:
                break
            worth, mine, other, cost = _best_swap(
                state, scratch, heavy, capacity, ranks_per_node, fee, max_moves - moves
            )
            expert, cell, change_cost = _best_change(
                state, scratch, heavy, capacity, ranks_per_node, fee, max_moves - moves, worth
            )
            if cell >= 0:
                _make_change(state, expert, cell, capacity, ranks_per_node)
                moves += change_cost
                failed[:] = False
                fresh = True
                improved = True
                break
            if mine >= 0:
                _make_swap(state, mine, other, capacity, ranks_per_node)
                moves += cost
                failed[rank_of[other]] = False
                fresh = False
                improved = True
                break
            failed[heavy] = True
        if not improved:
            if fresh:
                done = True
                break
            failed[:] = False
            fresh = True
    for slot in range(slot_expert.shape[0]):
        slot_expert[slot] = state.expert[_cell(slot, capacity, ranks_per_node)]
    return _smooth_peak(state)[0], moves, done
