"""A layer while its smooth peak is lowered, and how swaps and replica changes update it.

Functions whose inner loops matter take arrays rather than the named tuples that hold them. Fetching an array
from a tuple counts references, which costs as much as a short loop.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiling import jitted

__all__ = [
    "SearchState",
    "interleaved",
    "is_first_on_rank",
    "make_replica_change",
    "make_swap",
    "moves_to",
    "set_costs",
    "start_search",
]


class SearchState(NamedTuple):
    """A layer while its smooth peak is lowered.

    Slots are interleaved here: of each node first the first slot of each rank, then the second of each, and
    so on. Loops over the slots of a node then run over ranks as well. Arrays of one element are counters that
    change during the search.
    """

    capacity: int  # slots of each rank, closed ones included
    ranks_per_node: int  # ranks of each node
    # int64 [slots], expert of a slot now, and in the placement in force; -1 for none
    expert: np.ndarray
    current: np.ndarray
    rank_of: np.ndarray  # int64 [slots], rank of a slot
    copies: np.ndarray  # int64 [slots], replicas of the slot's expert on its rank
    saves: np.ndarray  # float32 [slots], moves saved when the expert leaves the slot: 0 or 1
    share: np.ndarray  # float32 [snapshots, slots], load of a slot
    share_power: np.ndarray  # float32 [snapshots, slots], `share` times `derivative` of the rank
    replicas: np.ndarray  # int64 [logical], replicas of each expert
    # int64 [logical] and [slots], slots of each expert as linked lists, -1 at the end
    first: np.ndarray
    next_: np.ndarray
    # the same for `current`
    current_first: np.ndarray
    current_next: np.ndarray
    expert_load: np.ndarray  # float32 [logical, snapshots]
    # float64 [slots + 2], fraction of an expert's load that one replica counts as, by the number of replicas
    fraction: np.ndarray
    # float32 [ranks, snapshots], rank load, and (load * unit) ** 16
    load: np.ndarray
    power: np.ndarray
    # float32 [snapshots, ranks], `power` transposed, and its derivative by the load / 16
    powers: np.ndarray
    derivative: np.ndarray
    unit: np.ndarray  # float32 [snapshots], 1 / peak at the start
    slope: np.ndarray  # float32 [snapshots], derivative of the norm by the sum of powers
    # float32 [ranks], weight of a rank in the smooth peak: `slope` times `power`, summed over snapshots
    weight: np.ndarray
    # float32 [snapshots], sum of powers, and peak
    total: np.ndarray
    highest: np.ndarray
    # bool [ranks]; `failed[rank]`: no improving exchange was found, and the rank is unchanged since
    failed: np.ndarray
    # int64 [ranks], value of `exchanges` when the last search for a rank found nothing; -1: never
    tried_at: np.ndarray
    moves: np.ndarray  # int64 [1], moves away from `current`
    exchanges: np.ndarray  # int64 [1], swaps and replica changes made so far
    stale: np.ndarray  # bool [1], whether a swap was made after some rank failed


@jitted
def interleaved(slot, capacity, ranks_per_node):
    """Where a slot, numbered rank by rank, lies in the order of `SearchState`.

    Example: with 2 slots a rank and 3 ranks a node, slots 0 to 5 go to 0, 3, 1, 4, 2, 5.
    """
    rank = slot // capacity
    node = rank // ranks_per_node
    place = slot - rank * capacity
    return (node * capacity + place) * ranks_per_node + rank - node * ranks_per_node


@jitted
def start_search(load, slot_expert, current, num_ranks, ranks_per_node, spread):
    """A search for `load`, float32 [snapshots, logical], that starts from the placement `slot_expert`.

    That is int64 [slots], -1 for closed slots. So is the placement in force, `current`, with -1 for empty
    slots too.
    """
    num_snapshots, num_logical = load.shape
    num_slots = slot_expert.shape[0]
    capacity = num_slots // num_ranks
    expert = np.empty(num_slots, np.int64)
    in_force = np.empty(num_slots, np.int64)
    rank_of = np.empty(num_slots, np.int64)
    replicas = np.zeros(num_logical, np.int64)
    first = np.full(num_logical, -1, np.int64)
    next_ = np.full(num_slots, -1, np.int64)
    current_first = np.full(num_logical, -1, np.int64)
    current_next = np.full(num_slots, -1, np.int64)
    for at in range(num_slots):
        slot = interleaved(at, capacity, ranks_per_node)
        held, before = slot_expert[at], current[at]
        expert[slot], in_force[slot] = held, before
        rank_of[slot] = at // capacity
        if held >= 0:
            replicas[held] += 1
            next_[slot] = first[held]
            first[held] = slot
        if before >= 0:
            current_next[slot] = current_first[before]
            current_first[before] = slot
    state = SearchState(
        capacity=capacity, ranks_per_node=ranks_per_node,
        expert=expert, current=in_force, rank_of=rank_of,
        copies=np.ones(num_slots, np.int64), saves=np.zeros(num_slots, np.float32),
        share=np.zeros((num_snapshots, num_slots), np.float32),
        share_power=np.zeros((num_snapshots, num_slots), np.float32),
        replicas=replicas, first=first, next_=next_,
        current_first=current_first, current_next=current_next,
        expert_load=np.ascontiguousarray(load.T), fraction=_fractions(num_slots, num_snapshots, spread),
        load=np.zeros((num_ranks, num_snapshots), np.float32),
        power=np.zeros((num_ranks, num_snapshots), np.float32),
        powers=np.zeros((num_snapshots, num_ranks), np.float32),
        derivative=np.zeros((num_snapshots, num_ranks), np.float32),
        unit=np.ones(num_snapshots, np.float32), slope=np.zeros(num_snapshots, np.float32),
        weight=np.zeros(num_ranks, np.float32),
        total=np.zeros(num_snapshots, np.float32), highest=np.zeros(num_snapshots, np.float32),
        failed=np.zeros(num_ranks, np.bool_), tried_at=np.full(num_ranks, -1),
        moves=np.zeros(1, np.int64), exchanges=np.zeros(1, np.int64), stale=np.zeros(1, np.bool_),
    )  # fmt: skip
    state.moves[0] = _count_moves(expert, first, next_, rank_of, current_first, current_next)
    _choose_units(state, slot_expert)
    for rank in range(num_ranks):
        _refresh_rank(state, rank)
    return state


@jitted
def _choose_units(state, slot_expert):
    """Set `unit` to 1 / peak of each snapshot, so that powers of rank loads neither overflow nor vanish."""
    load, unit, expert_load = state.load, state.unit, state.expert_load
    num_ranks, num_snapshots = load.shape
    peak = np.zeros(num_snapshots, np.float32)
    for rank in range(num_ranks):
        for slot in range(rank * state.capacity, (rank + 1) * state.capacity):
            held = slot_expert[slot]
            if held >= 0:
                part = np.float32(state.fraction[state.replicas[held]])
                for snapshot in range(num_snapshots):
                    load[rank, snapshot] += expert_load[held, snapshot] * part
        for snapshot in range(num_snapshots):
            peak[snapshot] = max(peak[snapshot], load[rank, snapshot])
    for snapshot in range(num_snapshots):
        unit[snapshot] = np.float32(1.0) / peak[snapshot] if peak[snapshot] > 0.0 else np.float32(0.0)


@jitted
def _fractions(num_slots, num_snapshots, spread):
    """Fraction of an expert's load that each of `n` replicas counts as: float64 [slots + 2].

    It is more than 1 / n, because the load of single steps varies. The variance of a rank load is the sum
    over its experts of load / n**2, times the clustering of tokens. It raises the peak of a step. So of two
    placements with equal loads, the one with more replicas of hot experts is better. A single load counts as
    it is.
    """
    fraction = np.zeros(num_slots + 2, np.float64)
    for count in range(1, num_slots + 2):
        fraction[count] = 1.0 / count
        if num_snapshots > 1:
            fraction[count] += spread / count**2
    return fraction


@jitted
def _refresh_rank(state, rank):
    """Compute all that depends on the experts of `rank`."""
    expert, current, replicas, expert_load = state.expert, state.current, state.replicas, state.expert_load
    copies, saves, share, share_power = state.copies, state.saves, state.share, state.share_power
    load, power, powers, derivative = state.load, state.power, state.powers, state.derivative
    fraction, unit, ranks_per_node = state.fraction, state.unit, state.ranks_per_node
    num_snapshots = unit.shape[0]
    node = rank // ranks_per_node
    start = node * state.capacity * ranks_per_node + rank - node * ranks_per_node
    stop = start + state.capacity * ranks_per_node
    for snapshot in range(num_snapshots):
        load[rank, snapshot] = np.float32(0.0)
    for slot in range(start, stop, ranks_per_node):
        held = expert[slot]
        if held < 0:
            continue
        part = np.float32(fraction[replicas[held]])
        for snapshot in range(num_snapshots):
            load[rank, snapshot] += expert_load[held, snapshot] * part
        for snapshot in range(num_snapshots):
            share[snapshot, slot] = expert_load[held, snapshot] * part
        same, known = 0, False
        for other in range(start, stop, ranks_per_node):
            same += 1 if expert[other] == held else 0
            known = known or current[other] == held
        copies[slot] = same
        saves[slot] = np.float32(0.0) if known or same > 1 else np.float32(1.0)
    for snapshot in range(num_snapshots):
        once = load[rank, snapshot] * unit[snapshot]
        twice = once * once
        fourth = twice * twice
        eighth = fourth * fourth
        power[rank, snapshot] = powers[snapshot, rank] = eighth * eighth
        derivative[snapshot, rank] = eighth * fourth * twice * once * unit[snapshot]
        for slot in range(start, stop, ranks_per_node):
            share_power[snapshot, slot] = share[snapshot, slot] * derivative[snapshot, rank]


@jitted
def make_swap(state, slot, other):
    """Swap the experts of two slots."""
    x, y = state.expert[slot], state.expert[other]
    for place, arrives in ((slot, y), (other, x)):
        _replace_expert(state.expert, state.first, state.next_, place, arrives)
    for place in (slot, other):
        _refresh_rank(state, state.rank_of[place])


@jitted
def make_replica_change(state, expert, slot):
    """Give `slot`, whose expert loses a replica, to `expert`."""
    replicas, first, next_, rank_of = state.replicas, state.first, state.next_, state.rank_of
    old = state.expert[slot]
    replicas[old] -= 1
    replicas[expert] += 1
    _replace_expert(state.expert, first, next_, slot, expert)
    for changed in (old, expert):
        holder = first[changed]
        while holder >= 0:
            _refresh_rank(state, rank_of[holder])
            holder = next_[holder]


@jitted
def _replace_expert(expert, first, next_, slot, arrives):
    """Put another expert into a slot, in `expert` and in the linked lists."""
    old = expert[slot]
    if first[old] == slot:
        first[old] = next_[slot]
    else:
        before = first[old]
        while next_[before] != slot:
            before = next_[before]
        next_[before] = next_[slot]
    expert[slot] = arrives
    next_[slot] = first[arrives]
    first[arrives] = slot


@jitted
def _count_moves(expert, first, next_, rank_of, current_first, current_next):
    """Experts on ranks that do not hold them in the placement in force."""
    moves = 0
    for slot in range(expert.shape[0]):
        if expert[slot] >= 0 and is_first_on_rank(first, next_, rank_of, expert[slot], slot):
            moves += moves_to(current_first, current_next, rank_of, expert[slot], rank_of[slot])
    return moves


@jitted
def moves_to(current_first, current_next, rank_of, expert, rank):
    """Moves to bring an expert to a rank: 0 where the placement in force has it there, else 1."""
    slot = current_first[expert]
    while slot >= 0:
        if rank_of[slot] == rank:
            return 0
        slot = current_next[slot]
    return 1


@jitted
def is_first_on_rank(first, next_, rank_of, expert, slot):
    """Whether no slot of the same rank comes before `slot` in the list of an expert."""
    other = first[expert]
    while rank_of[other] != rank_of[slot]:
        other = next_[other]
    return other == slot


@jitted
def set_costs(slot, next_, rank_of, first_rank, ranks_per_node, usual, change, cost):
    """Set `cost` to `usual` plus `change` on each rank of the node that has a slot in a linked list.

    The list starts with `slot`, or is empty (-1). `usual` and `cost`, float32, are by rank or slot of a node.
    """
    while slot >= 0:
        rank = rank_of[slot] - first_rank
        if 0 <= rank < ranks_per_node:
            for at in range(rank, cost.shape[0], ranks_per_node):
                cost[at] = usual[at] + change
        slot = next_[slot]
