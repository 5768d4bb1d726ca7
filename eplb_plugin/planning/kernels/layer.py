"""The plan of one layer: starts and candidates, and which of them is carried on."""

from __future__ import annotations

import numpy as np

from .compiling import _compile_in_place
from .copying import _copy
from .counts import _replicate
from .hand_out import _hand_out
from .limits import _VACANT
from .packing_bounds import _packing_bound
from .regrow import _regrow
from .smooth_scratch import _new_scratch
from .smooth_search import _begin, _lower_smooth_peak, _placement_of

_RACE_ROUNDS = 15  # rounds after which the better of two starts is carried on
_HYSTERESIS = 1.5  # how much heavier an expert counts that would lose a replica
_UNBOUNDED = 1 << 40


@_compile_in_place
def _plan_layer(
    scaled, expert_node, current, begin, num_ranks, ranks_per_node, room, price, max_moves, rounds,
    candidates, patience, tolerance, seed, best,
):  # fmt: skip
    """Plan one layer into `best`: grown from `begin`, or from scratch where that is empty.

    Growth has two starts, the placement as it is, and one with counts chosen anew, somewhat in favour of
    those in force, since single exchanges rarely find their way to other counts, and with all experts on
    `expert_node`. A few rounds tell which has the lower peak plus price of its moves from `current`; that one
    is carried through. Where `begin` has vacant slots there is only the second. From scratch, candidates are
    improved one after the other, and the one with the lowest peak is taken.
    """
    num_snapshots, num_logical = scaled.shape
    num_slots = best.shape[0]
    capacity = num_slots // num_ranks
    grows = begin.shape[0] > 0
    total = np.zeros(num_logical, np.float64)
    for snapshot in range(num_snapshots):
        for expert in range(num_logical):
            total[expert] += np.float64(scaled[snapshot, expert])
    in_force = np.zeros(num_logical, np.int64)
    regrown = np.empty(num_slots, np.int64)
    strays, vacant = 0, 0
    if grows:
        for slot in range(num_slots):
            expert = begin[slot]
            regrown[slot] = expert
            if expert == _VACANT:
                vacant += 1
            elif expert >= 0 and expert_node[expert] != slot // capacity // ranks_per_node:
                regrown[slot] = _VACANT
                strays += 1
            elif expert >= 0:
                in_force[expert] += 1
    bonus = _HYSTERESIS if grows else 1.0
    count = _replicate(total, expert_node, in_force, bonus, room.sum(), num_ranks, ranks_per_node)
    bound = 1.0
    if not grows:
        bound = max(bound, _packing_bound(scaled, count, room.min()))
    trial = np.empty(num_slots, np.int64)
    race = min(rounds, _RACE_ROUNDS)
    best_value = np.inf
    failures = 0
    done = False
    anew = 0
    first = 0
    if grows:
        for expert in range(num_logical):
            anew += max(0, count[expert] - in_force[expert])
        if vacant > 0 or 0 < anew <= max_moves:
            _regrow(total, in_force, count, expert_node, regrown, num_ranks, ranks_per_node)
        else:
            anew = 0
        if vacant > 0:
            anew = 0
            _copy(regrown, trial)
        else:
            _copy(begin, trial)
        # The one that promises more goes first, since the other is given up where it cannot catch up.
        if (
            anew > 0
            and strays == 0
            and (_peak_of(total, count, regrown, capacity) < _peak_of(total, in_force, begin, capacity))
        ):
            first = 1
    else:
        _hand_out(total, count, expert_node, ranks_per_node, room, 0, seed, trial)
    held = current if grows else trial
    own = _begin(scaled, trial, held, num_ranks, ranks_per_node)
    kept = own
    scratch = _new_scratch(num_snapshots, num_logical, capacity, ranks_per_node)
    for turn in range(3 if grows else candidates):
        start = first ^ turn if turn < 2 else turn
        effort = race if grows else rounds
        rival = best_value if grows else np.inf
        search = own
        if grows and start == 2:
            if done:
                break
            # Ranks that could not be relieved get another look.
            search = kept
            search[1][:] = False
            search[3][1] = 1
            effort = rounds - race
            rival = np.inf
        elif start > 0:
            if grows and anew == 0:
                continue
            if grows:
                _copy(regrown, trial)
            else:
                _hand_out(total, count, expert_node, ranks_per_node, room, turn, seed, trial)
            search = _begin(scaled, trial, held, num_ranks, ranks_per_node)
        state, failed, in_vain, progress = search
        value, finished = _lower_smooth_peak(
            state, failed, in_vain, progress, scratch, ranks_per_node, price if grows else 0.0,
            max_moves if grows else _UNBOUNDED, effort, tolerance, rival,
        )  # fmt: skip
        value += price * progress[0]
        if grows and start == 1 and progress[0] > max_moves:
            continue
        failures = 0 if value < best_value - 1e-5 else failures + 1
        if value < best_value or (grows and (start == 2 or (start == 0 and value == best_value))):
            best_value, done = value, finished
            kept = search
        if not grows and (best_value <= bound + tolerance or failures >= patience):
            break
    _placement_of(kept[0], num_ranks, ranks_per_node, best)


@_compile_in_place
def _peak_of(total, count, slot_expert, capacity):
    """The peak rank load of the summed loads of all snapshots."""
    peak = 0.0
    for first in range(0, slot_expert.shape[0], capacity):
        load = 0.0
        for slot in range(first, first + capacity):
            if slot_expert[slot] >= 0:
                load += total[slot_expert[slot]] / count[slot_expert[slot]]
        peak = max(peak, load)
    return peak
