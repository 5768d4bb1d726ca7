"""The plan of one layer: starts and candidates, and which of them is carried on."""

from __future__ import annotations

import numpy as np

from .compiling import _compile_in_place
from .copying import _copy
from .counts import _replicate
from .hand_out import _hand_out
from .packing_bounds import _packing_bound
from .prices import _price_of_all
from .regrow import _regrow
from .smooth_search import _lower_smooth_peak

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
    those in force, since single exchanges rarely find their way to other counts. A few rounds tell which has
    the lower peak plus price of its moves from `current`; that one is carried through. From scratch,
    candidates are improved one after the other, and the one with the lowest peak is taken.
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
    node = expert_node.copy()
    if grows:
        for slot in range(num_slots):
            if begin[slot] >= 0:
                in_force[begin[slot]] += 1
                node[begin[slot]] = slot // capacity // ranks_per_node
    bonus = _HYSTERESIS if grows else 1.0
    count = _replicate(total, node, in_force, bonus, room.sum(), num_ranks, ranks_per_node)
    bound = 1.0
    if not grows:
        bound = max(bound, _packing_bound(scaled, count, room.min()))
    # Moves that completing a placement took are no choice, and make no other move dearer.
    forced = _moves_to(begin, current, capacity) if grows else 0
    trial = np.empty(num_slots, np.int64)
    race = min(rounds, _RACE_ROUNDS)
    best_value = np.inf
    failures = 0
    done = False
    for start in range(3 if grows else candidates):
        effort = rounds
        if not grows:
            _hand_out(total, count, node, ranks_per_node, room, start, seed, trial)
        elif start == 0:
            _copy(begin, trial)
            effort = race
        elif start == 1:
            changes = 0
            for expert in range(num_logical):
                changes += max(0, count[expert] - in_force[expert])
            if changes == 0 or changes > max_moves:
                continue
            _copy(begin, trial)
            _regrow(total, in_force, count, trial, num_ranks, ranks_per_node)
            effort = race
        else:
            if done:
                break
            _copy(best, trial)
            best_value = np.inf
            effort = rounds - race
        value, moves, finished = _lower_smooth_peak(
            scaled, trial, current if grows else trial, num_ranks, ranks_per_node,
            price if grows else 0.0, forced, max_moves if grows else _UNBOUNDED, effort, tolerance,
        )  # fmt: skip
        value += _price_of_all(price, moves - forced, num_slots)
        if start == 1 and moves > max_moves and grows:
            continue
        failures = 0 if value < best_value - 1e-5 else failures + 1
        if start == 0 or value < best_value:
            best_value, done = value, finished
            _copy(trial, best)
        if not grows and (best_value <= bound + tolerance or failures >= patience):
            break


@_compile_in_place
def _moves_to(wanted, held, capacity):
    """Moves from one placement to another: experts on ranks that do not hold them, int64 [slots] each."""
    moves = 0
    for slot in range(wanted.shape[0]):
        if wanted[slot] < 0:
            continue
        first = slot // capacity * capacity
        arrives = 1
        for other in range(first, first + capacity):
            if held[other] == wanted[slot] or (other < slot and wanted[other] == wanted[slot]):
                arrives = 0
        moves += arrives
    return moves
