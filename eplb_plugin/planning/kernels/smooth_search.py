"""Lowering the smooth peak of a layer."""

from __future__ import annotations

import numpy as np

from .cells import _count_moves
from .compiling import _compile_apart, _compile_in_place
from .limits import _TRIED_RANKS
from .smooth_changes import _best_change
from .smooth_exchanges import _make_change, _make_swap
from .smooth_peak import _smooth_peak
from .smooth_state import _cell, _start_search
from .smooth_swaps import _best_swap


@_compile_apart
def _begin(scaled, slot_expert, current, num_ranks, ranks_per_node):
    """A search that starts from `slot_expert`.

    Returns:
        The layer; bool [ranks], those that could not be relieved and have not changed since; int64 [ranks],
        after how many exchanges each was looked at last, in vain; and int64 [3], the moves away from
        `current`, whether the first ranks failed against what is there now, and the exchanges so far.
    """
    state = _start_search(scaled, slot_expert, current, num_ranks, ranks_per_node)
    moves = _count_moves(
        state.expert, state.first, state.next_, state.rank_of, state.origin_first, state.origin_next
    )
    return state, np.zeros(num_ranks, np.bool_), np.full(num_ranks, -1), np.array([moves, 1, 0])


@_compile_in_place
def _lower_smooth_peak(
    state, failed, in_vain, progress, scratch, ranks_per_node, price, max_moves, rounds, tolerance, rival,
):  # fmt: skip
    """Lower the smooth peak of a search by swaps and changes of replicas; it may be carried on later.

    A round relieves the rank that weighs most in the smooth peak. An exchange has to earn the price of its
    moves, of which there are at most `max_moves`; of those that do, the one that gains most beyond it is
    made. The search is given up where the smooth peak plus the price of all moves would not come below
    `rival` even if each round that is left gained as much as the best of the last three.

    Returns:
        The smooth peak, summed over snapshots; whether more rounds would change nothing.
    """
    num_ranks, num_slots = failed.shape[0], state.expert.shape[0]
    capacity = num_slots // num_ranks
    heat, rank_of = state.heat, state.rank_of
    done = False
    one, two, three = np.inf, np.inf, np.inf  # what the last rounds started from
    for number in range(rounds):
        norm, peak = _smooth_peak(state)
        value = norm + price * progress[0]
        if number >= 3:
            gain = max(three - two, two - one, one - value)
            if value - gain * (rounds - number) > rival:
                break
        one, two, three = value, one, two
        if peak <= 1.0 + tolerance:
            done = True
            break
        improved = False
        for _ in range(_TRIED_RANKS):
            heavy = num_ranks  # none: of a literal, all that takes it would be compiled once more
            for rank in range(num_ranks):
                if not failed[rank] and (heavy == num_ranks or heat[rank] > heat[heavy]):
                    heavy = rank
            if heavy == num_ranks:
                break
            if in_vain[heavy] == progress[2]:
                failed[heavy] = True
                continue
            worth, mine, other, cost = _best_swap(
                state, scratch, heavy, capacity, ranks_per_node, price, max_moves - progress[0]
            )
            expert, cell, change_cost = _best_change(
                state, scratch, heavy, capacity, ranks_per_node, price, max_moves - progress[0], worth
            )
            if cell >= 0:
                _make_change(state, expert, cell, capacity, ranks_per_node)
                progress[0] += change_cost
                progress[2] += 1
                failed[:] = False
                progress[1] = 1
                improved = True
                break
            if mine >= 0:
                _make_swap(state, mine, other, capacity, ranks_per_node)
                progress[0] += cost
                progress[2] += 1
                failed[rank_of[other]] = False
                progress[1] = 0
                improved = True
                break
            failed[heavy] = True
            in_vain[heavy] = progress[2]
        if not improved:
            if progress[1] == 1:
                done = True
                break
            failed[:] = False
            progress[1] = 1
    return _smooth_peak(state)[0], done


@_compile_in_place
def _placement_of(state, num_ranks, ranks_per_node, slot_expert):
    """Write what the slots hold."""
    capacity = slot_expert.shape[0] // num_ranks
    for slot in range(slot_expert.shape[0]):
        slot_expert[slot] = state.expert[_cell(slot, capacity, ranks_per_node)]
