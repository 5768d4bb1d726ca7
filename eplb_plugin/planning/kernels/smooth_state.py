"""A layer while its smooth peak is lowered, and how that is kept up to date.

Functions whose inner loops matter take arrays rather than the named tuples that hold them: fetching an array
out of a tuple counts references, which costs as much as a short loop.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiling import _compile_apart

_SPREAD = 0.1  # measured: more helps where few experts are very hot, and costs elsewhere


class _Search(NamedTuple):
    """A layer while its smooth peak is lowered.

    Slots are kept as cells: those of a node lie together, place by place, and the ranks of the node side by
    side within a place, so that loops over cells run over ranks as well.

    Attributes:
        expert, origin: int64 [cells], what a cell holds, and what it holds in the placement in force.
        rank_of: int64 [cells].
        twins: int64 [cells], how many cells of the rank hold the expert.
        frees: float32 [cells], 1 where a move is saved when the expert leaves.
        share: float32 [snapshots, cells], load of what a cell holds.
        pull: float32 [snapshots, cells], share times `steep` of the rank.
        replicas: int64 [logical].
        first, next_: int64 [logical] and [cells], the cells of each expert as linked lists, -1 at the end.
        origin_first, origin_next: the same for `origin`.
        expert_load: float32 [logical, snapshots].
        portion: float64 [slots + 2], what part of it a replica counts as, by the number of replicas.
        load, power: float32 [ranks, snapshots]; power is (load * unit) ** 16.
        powers, steep: float32 [snapshots, ranks], power again, and its derivative over 16.
        unit: float32 [snapshots], 1 / peak at the start.
        slope: float32 [snapshots], by how much the norm grows with the sum of powers.
        heat: float32 [ranks], slope times power, summed over snapshots.
        total, highest: float32 [snapshots], the sum of powers, and the peak.
    """

    expert: np.ndarray
    origin: np.ndarray
    rank_of: np.ndarray
    twins: np.ndarray
    frees: np.ndarray
    share: np.ndarray
    pull: np.ndarray
    replicas: np.ndarray
    first: np.ndarray
    next_: np.ndarray
    origin_first: np.ndarray
    origin_next: np.ndarray
    expert_load: np.ndarray
    portion: np.ndarray
    load: np.ndarray
    power: np.ndarray
    powers: np.ndarray
    steep: np.ndarray
    unit: np.ndarray
    slope: np.ndarray
    heat: np.ndarray
    total: np.ndarray
    highest: np.ndarray


@_compile_apart
def _cell(slot, capacity, ranks_per_node):
    rank = slot // capacity
    node = rank // ranks_per_node
    place = slot - rank * capacity
    return (node * capacity + place) * ranks_per_node + rank - node * ranks_per_node


@_compile_apart
def _portions(num_slots, num_snapshots):
    """What part of an expert's load each of `n` replicas counts as: float64 [slots + 2].

    More than 1 / n, since what arrives in a step varies: the variance of a rank load is the sum over its
    experts of load / n**2, times how much tokens come in clusters, and the peak of a step is higher by about
    as much. So of two placements with the same loads the one with more replicas of the hot experts is better.
    A single load is taken as it is.
    """
    portion = np.zeros(num_slots + 2, np.float64)
    for count in range(1, num_slots + 2):
        portion[count] = 1.0 / count
        if num_snapshots > 1:
            portion[count] += _SPREAD / count**2
    return portion


@_compile_apart
def _start_search(scaled, slot_expert, current, num_ranks, ranks_per_node):
    """The state of a layer that holds `slot_expert`, with `current` in force."""
    num_snapshots, num_logical = scaled.shape
    num_slots = slot_expert.shape[0]
    capacity = num_slots // num_ranks
    expert = np.empty(num_slots, np.int64)
    origin = np.empty(num_slots, np.int64)
    rank_of = np.empty(num_slots, np.int64)
    count = np.zeros(num_logical, np.int64)
    first = np.full(num_logical, -1, np.int64)
    next_ = np.full(num_slots, -1, np.int64)
    origin_first = np.full(num_logical, -1, np.int64)
    origin_next = np.full(num_slots, -1, np.int64)
    for slot in range(num_slots):
        cell = _cell(slot, capacity, ranks_per_node)
        held, before = slot_expert[slot], current[slot]
        expert[cell], origin[cell] = held, before
        rank_of[cell] = slot // capacity
        if held >= 0:
            count[held] += 1
            next_[cell] = first[held]
            first[held] = cell
        if before >= 0:
            origin_next[cell] = origin_first[before]
            origin_first[before] = cell
    unit = np.ones(num_snapshots, np.float32)
    load = np.zeros((num_ranks, num_snapshots), np.float32)
    state = _Search(
        expert,
        origin,
        rank_of,
        np.ones(num_slots, np.int64),
        np.zeros(num_slots, np.float32),
        np.zeros((num_snapshots, num_slots), np.float32),
        np.zeros((num_snapshots, num_slots), np.float32),
        count,
        first,
        next_,
        origin_first,
        origin_next,
        np.ascontiguousarray(scaled.T),
        _portions(num_slots, num_snapshots),
        load,
        np.zeros((num_ranks, num_snapshots), np.float32),
        np.zeros((num_snapshots, num_ranks), np.float32),
        np.zeros((num_snapshots, num_ranks), np.float32),
        unit,
        np.zeros(num_snapshots, np.float32),
        np.zeros(num_ranks, np.float32),
        np.zeros(num_snapshots, np.float32),
        np.zeros(num_snapshots, np.float32),
    )
    # The unit has to be known before powers are taken: the peak, in round numbers.
    peak = np.zeros(num_snapshots, np.float32)
    for rank in range(num_ranks):
        load[rank] = np.float32(0.0)
        for slot in range(rank * capacity, (rank + 1) * capacity):
            held = slot_expert[slot]
            if held >= 0:
                part = np.float32(state.portion[count[held]])
                for snapshot in range(num_snapshots):
                    load[rank, snapshot] += state.expert_load[held, snapshot] * part
        for snapshot in range(num_snapshots):
            peak[snapshot] = max(peak[snapshot], load[rank, snapshot])
    for snapshot in range(num_snapshots):
        unit[snapshot] = np.float32(1.0) / peak[snapshot] if peak[snapshot] > 0.0 else np.float32(0.0)
    for rank in range(num_ranks):
        _refresh_rank(state, rank, capacity, ranks_per_node)
    return state


@_compile_apart
def _refresh_rank(state, rank, capacity, ranks_per_node):
    """Compute anew all that depends on what `rank` holds."""
    expert, origin, count, expert_load = state.expert, state.origin, state.replicas, state.expert_load
    twins, frees, share, pull = state.twins, state.frees, state.share, state.pull
    portion = state.portion
    load, power, powers, steep, unit = state.load, state.power, state.powers, state.steep, state.unit
    num_snapshots = unit.shape[0]
    node = rank // ranks_per_node
    start = node * capacity * ranks_per_node + rank - node * ranks_per_node
    stop = start + capacity * ranks_per_node
    for snapshot in range(num_snapshots):
        load[rank, snapshot] = np.float32(0.0)
    for cell in range(start, stop, ranks_per_node):
        held = expert[cell]
        if held < 0:
            continue
        part = np.float32(portion[count[held]])
        for snapshot in range(num_snapshots):
            load[rank, snapshot] += expert_load[held, snapshot] * part
        for snapshot in range(num_snapshots):
            share[snapshot, cell] = expert_load[held, snapshot] * part
        same, known = 0, False
        for other in range(start, stop, ranks_per_node):
            same += 1 if expert[other] == held else 0
            known = known or origin[other] == held
        twins[cell] = same
        frees[cell] = np.float32(0.0) if known or same > 1 else np.float32(1.0)
    for snapshot in range(num_snapshots):
        once = load[rank, snapshot] * unit[snapshot]
        twice = once * once
        fourth = twice * twice
        eighth = fourth * fourth
        power[rank, snapshot] = powers[snapshot, rank] = eighth * eighth
        steep[snapshot, rank] = eighth * fourth * twice * once * unit[snapshot]
        for cell in range(start, stop, ranks_per_node):
            pull[snapshot, cell] = share[snapshot, cell] * steep[snapshot, rank]
