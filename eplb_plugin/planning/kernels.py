"""Compiled search over the placements of single layers, for loads on the CPU.

The functions here release the interpreter lock and are cached on disk. They run without `fastmath`, and
every sum has a fixed order, so the same input gives the same placement on every machine. They share one
file because the cache on disk does not notice changes of functions that live in another one.

Loads are float32, scaled so that the mean rank load, summed over snapshots, is 1. Where ranks
differ in slots, all are given as many as the largest; what a rank does not have is closed, and holds -1.

With several snapshots the search lowers the smooth peak: the 16-norm of the rank loads of a snapshot,
summed over snapshots. It also counts ranks that are nearly the heaviest, any of which may be the heaviest
in the next step, so it reaches the same balance on later traffic with about half the moves. A single
load, which has no future to differ from, is planned for its true peak.

Functions whose inner loops matter take arrays rather than the named tuples that hold them: fetching an array
out of a tuple counts references, which costs as much as a short loop.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

__all__ = ["plan_layers"]

_compile = numba.njit(nogil=True, cache=True, fastmath=False, boundscheck=False, error_model="numpy")

_TRIED_RANKS = 3  # heavy ranks that a round looks at before the search gives up
_RACE_ROUNDS = 5  # rounds after which the better of two starts is carried on
_HYSTERESIS = 1.2  # how much heavier an expert counts that would lose a replica
_LEAST_GAIN = 2e-4  # smaller gains are not worth a round, as a share of the mean rank load
_LEAST_GAIN_32 = np.float32(_LEAST_GAIN)
_LEAST_EXACT_GAIN = 1e-5  # the same for a single load
_SHORTLIST = 3  # slots that are looked at closely for each expert that might get a replica
_UNBOUNDED = 1 << 40
_ROUNDING = np.float32(1.0001)  # bounds are as much too high as sums of float32 may be too low
_COLD = np.float32(1e-30)
_NEVER = np.float32(1e18)  # moves of an exchange that is not allowed


@_compile
def plan_layers(
    weight, first, last, num_ranks, ranks_per_node, room, expert_node, current, start, price, max_moves,
    rounds, candidates, patience, tolerance, seed, result,
):  # fmt: skip
    """Plan layers `first..last-1`, writing `result`.

    Args:
        weight: float64 [snapshots, layers, logical], tokens times the weight of their snapshot.
        num_ranks, ranks_per_node: the topology.
        room: int64 [ranks], open slots of each rank; the others of a rank come last.
        expert_node: int64 [layers, logical], the node that each expert belongs to.
        current: int64 [layers, slots], what is held now, -1 for an empty slot: moves are counted from it.
        start: int64 [layers, slots], the placement to grow from, or [layers, 0] to start from scratch.
        price: what a move costs, as a share of the mean rank load.
        max_moves: most moves per layer away from `current`.
        rounds: most rounds of improvement per candidate.
        candidates: most candidates per layer from scratch.
        patience: candidates in a row that may fail to improve on the best.
        tolerance: stop within this share of the mean rank load above the lower bound.
        seed: of the candidates' noise.
        result: int64 [layers, slots], written.
    """
    num_snapshots, _, num_logical = weight.shape
    scaled = np.empty((num_snapshots, num_logical), np.float32)
    for layer in range(first, last):
        total = 0.0
        for snapshot in range(num_snapshots):
            for expert in range(num_logical):
                total += weight[snapshot, layer, expert]
        if total <= 0.0:
            if start.shape[1]:
                result[layer] = start[layer]
                continue
            # Nothing to balance, but replicas still belong on distinct ranks: plan for even loads.
            scaled[:] = np.float32(num_ranks / (num_snapshots * num_logical))
        else:
            # Loads so small that this overflows are made larger first, by a power of two.
            larger = 1.0 if num_ranks / total < np.inf else 2.0**100
            scale = num_ranks / (total * larger)
            for snapshot in range(num_snapshots):
                for expert in range(num_logical):
                    scaled[snapshot, expert] = np.float32(weight[snapshot, layer, expert] * larger * scale)
        _plan_layer(
            scaled, expert_node[layer], current[layer], start[layer], num_ranks, ranks_per_node, room, price,
            max_moves, rounds, candidates, patience, tolerance, seed, result[layer],
        )  # fmt: skip


@_compile
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
            trial[:] = begin
            effort = race
        elif start == 1:
            changes = 0
            for expert in range(num_logical):
                changes += max(0, count[expert] - in_force[expert])
            if changes == 0 or changes > max_moves:
                continue
            trial[:] = begin
            _regrow(total, in_force, count, trial, num_ranks, ranks_per_node)
            effort = race
        else:
            if done:
                break
            trial[:] = best
            best_value = np.inf
            effort = rounds - race
        moves, finished = 0, True
        if num_snapshots == 1 and not grows:
            value = _lower_peak(scaled, trial, num_ranks, ranks_per_node, rounds, tolerance)
        else:
            value, moves, finished = _lower_smooth_peak(
                scaled, trial, current if grows else trial, num_ranks, ranks_per_node,
                price if grows else 0.0, max_moves if grows else _UNBOUNDED, effort, tolerance,
            )  # fmt: skip
        value += price * moves
        if start == 1 and moves > max_moves and grows:
            continue
        failures = 0 if value < best_value - 1e-5 else failures + 1
        if start == 0 or value < best_value:
            best_value, done = value, finished
            best[:] = trial
        if not grows and (best_value <= bound + tolerance or failures >= patience):
            break


@_compile
def _regrow(total, count, target, slot_expert, num_ranks, ranks_per_node):
    """Change `slot_expert` from `count` to `target` replicas: surplus ones leave the heaviest ranks, missing
    ones go to the lightest rank of their node that has room and lacks the expert."""
    num_logical = total.shape[0]
    num_slots = slot_expert.shape[0]
    capacity = num_slots // num_ranks
    load = np.zeros(num_ranks, np.float64)
    node_of = np.zeros(num_logical, np.int64)
    # The slots of each expert, as linked lists in rising order.
    first = np.full(num_logical, -1, np.int64)
    next_ = np.full(num_slots, -1, np.int64)
    for slot in range(num_slots - 1, -1, -1):
        expert = slot_expert[slot]
        if expert < 0:
            continue
        rank = slot // capacity
        load[rank] += total[expert] / target[expert]
        node_of[expert] = rank // ranks_per_node
        next_[slot] = first[expert]
        first[expert] = slot
    free = np.empty(num_slots, np.int64)
    num_free = 0
    for expert in range(num_logical):
        for _ in range(count[expert] - target[expert]):
            leaves = -1
            slot = first[expert]
            while slot >= 0:
                heavier = leaves < 0 or load[slot // capacity] > load[leaves // capacity]
                if slot_expert[slot] == expert and heavier:
                    leaves = slot
                slot = next_[slot]
            slot_expert[leaves] = -1
            load[leaves // capacity] -= total[expert] / target[expert]
            at = num_free
            while at > 0 and free[at - 1] > leaves:
                free[at] = free[at - 1]
                at -= 1
            free[at] = leaves
            num_free += 1
    key = np.empty(num_logical, np.float64)
    for expert in range(num_logical):
        key[expert] = -total[expert] / target[expert]
    for expert in np.argsort(key, kind="mergesort"):
        for _ in range(target[expert] - count[expert]):
            chosen, fallback = -1, -1
            for at in range(num_free):
                slot = free[at]
                rank = slot // capacity
                if slot_expert[slot] >= 0 or rank // ranks_per_node != node_of[expert]:
                    continue
                lacks = True
                for other in range(rank * capacity, (rank + 1) * capacity):
                    if slot_expert[other] == expert:
                        lacks = False
                if lacks:
                    if chosen < 0 or load[rank] < load[chosen // capacity]:
                        chosen = slot
                elif fallback < 0 or load[rank] < load[fallback // capacity]:
                    fallback = slot
            if chosen < 0:
                chosen = fallback
            slot_expert[chosen] = expert
            load[chosen // capacity] += total[expert] / target[expert]


@_compile
def _packing_bound(scaled, count, capacity):
    """No packing with these replica counts has a lower sum of peaks: the heaviest replica of a snapshot
    shares its rank with at least the lightest ones."""
    num_snapshots, num_logical = scaled.shape
    num_slots = count.sum()
    share = np.empty(num_slots, np.float32)
    heap = np.empty(num_slots, np.int64)
    bound = 0.0
    for snapshot in range(num_snapshots):
        at = 0
        heaviest = np.float32(0.0)
        for expert in range(num_logical):
            part = scaled[snapshot, expert] / np.float32(count[expert])
            heaviest = max(heaviest, part)
            for _ in range(count[expert]):
                share[at], heap[at] = part, at
                at += 1
        bound += np.float64(heaviest)
        for at in range(num_slots // 2 - 1, -1, -1):
            _sink(heap, num_slots, at, share)
        for place in range(1, capacity):
            bound += np.float64(share[heap[0]])
            heap[0] = heap[num_slots - place]
            _sink(heap, num_slots - place, 0, share)
    return bound


@_compile
def _sink(heap, size, at, key):
    """Let an item of a heap sink to where it belongs: the lowest key is on top, of equal ones the first."""
    item = heap[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        low, high = heap[child], heap[min(child + 1, size - 1)]
        if key[high] < key[low] or (key[high] == key[low] and high < low):
            child, low = child + 1, high
        if key[item] < key[low] or (key[item] == key[low] and item < low):
            break
        heap[at] = low
        at = child
    heap[at] = item


@_compile
def _rise(heap, at, key):
    """Let an item of a heap rise to where it belongs."""
    item = heap[at]
    while at > 0:
        above = heap[(at - 1) // 2]
        if key[above] < key[item] or (key[above] == key[item] and above < item):
            break
        heap[at] = above
        at = (at - 1) // 2
    heap[at] = item


@_compile
def _replicate(total, expert_node, in_force, bonus, num_slots, num_ranks, ranks_per_node):
    """Replicas of each expert, int64 [logical]: greedy on load per replica, within each node's slots.

    An expert with fewer replicas than `in_force` counts as `bonus` times as heavy.
    """
    num_logical = total.shape[0]
    num_nodes = num_ranks // ranks_per_node
    node_slots = num_slots // num_nodes
    count = np.ones(num_logical, np.int64)
    key = np.empty(num_logical, np.float64)  # minus the load per replica
    for expert in range(num_logical):
        key[expert] = -total[expert] * (bonus if in_force[expert] > 1 else 1.0)
    heap = np.empty(num_logical, np.int64)
    for node in range(num_nodes):
        size = 0
        for expert in range(num_logical):
            if expert_node[expert] == node:
                heap[size] = expert
                size += 1
        if size == 0:
            continue
        spare = node_slots - size
        bound = max(ranks_per_node, -(-node_slots // size))
        for at in range(size // 2 - 1, -1, -1):
            _sink(heap, size, at, key)
        for _ in range(spare if bound > 1 else 0):
            expert = heap[0]
            count[expert] += 1
            key[expert] = -total[expert] / count[expert]
            if count[expert] < in_force[expert]:
                key[expert] *= bonus
            if count[expert] == bound:
                size -= 1
                heap[0] = heap[size]
            _sink(heap, size, 0, key)
    return count


@_compile
def _mix(x):
    """A bijection of 64-bit words that spreads every bit (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@_compile
def _hand_out(total, count, expert_node, ranks_per_node, room, candidate, seed, slot_expert):
    """Longest processing time with capacity: each replica to the lightest rank of its node that has room
    and lacks the expert. Candidates after the first take the replicas in a noisy order."""
    num_logical = total.shape[0]
    num_ranks = room.shape[0]
    capacity = slot_expert.shape[0] // num_ranks
    slot_expert[:] = -1
    key = np.empty(num_logical, np.float64)
    for expert in range(num_logical):
        key[expert] = -total[expert] / count[expert]
        if candidate > 0:
            word = _mix(np.uint64(seed) * np.uint64(4096) + np.uint64(candidate))
            word = _mix(word + np.uint64(expert))
            # In [0.8, 1.2), as the document that the ensemble comes from has it.
            key[expert] *= 0.8 + 0.4 * (np.float64(word >> np.uint64(11)) * 2.0**-53)
    order = np.argsort(key, kind="mergesort")
    load = np.zeros(num_ranks, np.float64)
    used = np.zeros(num_ranks, np.int64)
    # The ranks of each node that have room, as heaps; those that got a replica of the expert wait aside.
    heap = np.empty(num_ranks, np.int64)
    size = np.zeros(num_ranks // ranks_per_node, np.int64)
    for rank in range(num_ranks):
        node = rank // ranks_per_node
        if room[rank] > 0:
            heap[node * ranks_per_node + size[node]] = rank
            size[node] += 1
    aside = np.empty(ranks_per_node, np.int64)
    for expert in order:
        share = total[expert] / count[expert]
        node = expert_node[expert]
        open_ranks = heap[node * ranks_per_node : (node + 1) * ranks_per_node]
        waiting = 0
        for _ in range(count[expert]):
            if size[node] > 0:
                chosen = open_ranks[0]
                size[node] -= 1
                open_ranks[0] = open_ranks[size[node]]
                _sink(open_ranks, size[node], 0, load)
                aside[waiting] = chosen
                waiting += 1
            else:
                # Every rank with room has the expert: it shares the lightest of them.
                chosen = -1
                for at in range(waiting):
                    rank = aside[at]
                    if used[rank] < room[rank]:
                        lighter = chosen < 0 or load[rank] < load[chosen]
                        if lighter or (load[rank] == load[chosen] and rank < chosen):
                            chosen = rank
            slot_expert[chosen * capacity + used[chosen]] = expert
            used[chosen] += 1
            load[chosen] += share
        for at in range(waiting):
            if used[aside[at]] < room[aside[at]]:
                open_ranks[size[node]] = aside[at]
                size[node] += 1
                _rise(open_ranks, size[node] - 1, load)


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
    load: np.ndarray
    power: np.ndarray
    powers: np.ndarray
    steep: np.ndarray
    unit: np.ndarray
    slope: np.ndarray
    heat: np.ndarray
    total: np.ndarray
    highest: np.ndarray


class _Scratch(NamedTuple):
    """Memory for the search around one rank. Cells and ranks are those of its node, from 0."""

    leaving: np.ndarray  # float32 [cells]
    staying: np.ndarray  # float32 [cells]
    relief: np.ndarray  # float32 [cells]
    arriving: np.ndarray  # float32 [capacity, ranks]
    tiled: np.ndarray  # float32 [cells]
    warm: np.ndarray  # float32 [cells]
    inverse: np.ndarray  # float32 [cells]
    cost: np.ndarray  # float32 [cells]
    usual_cost: np.ndarray  # float32 [cells]
    bound: np.ndarray  # float32 [capacity, cells]
    cell_bound: np.ndarray  # float32 [cells]
    rank_bound: np.ndarray  # float32 [ranks]
    flag: np.ndarray  # float32 [logical]
    weights: np.ndarray  # float32 [snapshots]
    terms: np.ndarray  # float32 [snapshots]
    growth: np.ndarray  # float32 [snapshots]
    surplus: np.ndarray  # int64 [cells]
    burden: np.ndarray  # float32 [cells]
    extra: np.ndarray  # float32 [cells]
    total: np.ndarray  # float64 [logical]
    packed: np.ndarray  # float32 [7, cells]


@_compile
def _cell(slot, capacity, ranks_per_node):
    rank = slot // capacity
    node = rank // ranks_per_node
    place = slot - rank * capacity
    return (node * capacity + place) * ranks_per_node + rank - node * ranks_per_node


@_compile
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
                for snapshot in range(num_snapshots):
                    load[rank, snapshot] += state.expert_load[held, snapshot] / np.float32(count[held])
        for snapshot in range(num_snapshots):
            peak[snapshot] = max(peak[snapshot], load[rank, snapshot])
    for snapshot in range(num_snapshots):
        unit[snapshot] = np.float32(1.0) / peak[snapshot] if peak[snapshot] > 0.0 else np.float32(0.0)
    for rank in range(num_ranks):
        _refresh_rank(state, rank, capacity, ranks_per_node)
    return state


@_compile
def _new_scratch(num_snapshots, num_logical, capacity, ranks_per_node):
    width = capacity * ranks_per_node
    return _Scratch(
        np.empty(width, np.float32),
        np.empty(width, np.float32),
        np.empty(width, np.float32),
        np.empty((capacity, ranks_per_node), np.float32),
        np.empty(width, np.float32),
        np.empty(width, np.float32),
        np.empty(width, np.float32),
        np.empty(width, np.float32),
        np.empty(width, np.float32),
        np.empty((capacity, width), np.float32),
        np.empty(width, np.float32),
        np.empty(ranks_per_node, np.float32),
        np.ones(num_logical, np.float32),
        np.empty(num_snapshots, np.float32),
        np.empty(num_snapshots, np.float32),
        np.empty(num_snapshots, np.float32),
        np.empty(width, np.int64),
        np.empty(width, np.float32),
        np.empty(width, np.float32),
        np.zeros(num_logical, np.float64),
        np.empty((7, width), np.float32),
    )


@_compile
def _refresh_rank(state, rank, capacity, ranks_per_node):
    """Compute anew all that depends on what `rank` holds."""
    expert, origin, count, expert_load = state.expert, state.origin, state.replicas, state.expert_load
    twins, frees, share, pull = state.twins, state.frees, state.share, state.pull
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
        part = np.float32(1.0) / np.float32(count[held])
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


@_compile
def _count_moves(expert, first, next_, rank_of, origin_first, origin_next):
    """Experts on ranks that do not hold them in the placement in force."""
    moves = 0
    for cell in range(expert.shape[0]):
        if expert[cell] >= 0 and _leads(first, next_, rank_of, expert[cell], cell):
            moves += _arrives(origin_first, origin_next, rank_of, expert[cell], rank_of[cell])
    return moves


@_compile
def _arrives(origin_first, origin_next, rank_of, expert, rank):
    """Moves that it takes to bring an expert to a rank: 0 where the placement in force has it there."""
    cell = origin_first[expert]
    while cell >= 0:
        if rank_of[cell] == rank:
            return 0
        cell = origin_next[cell]
    return 1


@_compile
def _leads(first, next_, rank_of, expert, cell):
    """Whether a cell is the first of those on its rank in the list of an expert."""
    other = first[expert]
    while rank_of[other] != rank_of[cell]:
        other = next_[other]
    return other == cell


@_compile
def _lower_smooth_peak(
    scaled, slot_expert, current, num_ranks, ranks_per_node, price, max_moves, rounds, tolerance
):
    """Lower the smooth peak by swaps and changes of replicas, in place.

    A round relieves the rank that weighs most in the smooth peak. An exchange has to earn the price of its
    moves away from `current`, of which there are at most `max_moves`; of those that do, the one with the
    most gain per move is made.

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
        improved = False
        for _ in range(_TRIED_RANKS):
            heavy = -1
            for rank in range(num_ranks):
                if not failed[rank] and (heavy < 0 or heat[rank] > heat[heavy]):
                    heavy = rank
            if heavy < 0:
                break
            worth, mine, other, cost = _best_swap(
                state, scratch, heavy, capacity, ranks_per_node, price, max_moves - moves
            )
            expert, cell, change_cost = _best_change(
                state, scratch, heavy, capacity, ranks_per_node, price, max_moves - moves, worth
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


@_compile
def _power(x):
    """x to the power of 16, by multiplications alone: the same on every machine."""
    x = x * x
    x = x * x
    x = x * x
    return x * x


@_compile
def _smooth_peak(state):
    """The 16-norm of the rank loads of each snapshot. Writes `slope` and `heat`.

    The norm is concave in the sum of powers, so a gain that is judged by the slope is at least reached.

    Returns:
        The norms and the peaks, each summed over snapshots.
    """
    load, power, unit, slope = state.load, state.power, state.unit, state.slope
    total, highest, heat = state.total, state.highest, state.heat
    num_ranks, num_snapshots = load.shape
    total[:] = np.float32(0.0)
    highest[:] = np.float32(0.0)
    for rank in range(num_ranks):
        for snapshot in range(num_snapshots):
            total[snapshot] += power[rank, snapshot]
            here = load[rank, snapshot]
            highest[snapshot] = here if here > highest[snapshot] else highest[snapshot]
    norms, peaks = 0.0, 0.0
    for snapshot in range(num_snapshots):
        slope[snapshot] = np.float32(0.0)
        if total[snapshot] > 0.0:
            norm = np.sqrt(np.sqrt(np.sqrt(np.sqrt(total[snapshot])))) / unit[snapshot]
            slope[snapshot] = norm / (np.float32(16.0) * total[snapshot])
            norms += np.float64(norm)
        peaks += np.float64(highest[snapshot])
    _project(state.powers, slope, 0, heat)
    return norms, peaks


@_compile
def _project(rows, weights, begin, out):
    """The weighted sum of rows, from column `begin` on."""
    out[:] = np.float32(0.0)
    start = np.uint64(begin)  # an index that may be negative keeps a loop from being vectorised
    for row in range(weights.shape[0]):
        weight = weights[row]
        for at in range(out.shape[0]):
            out[at] += rows[row, start + np.uint64(at)] * weight


@_compile
def _worth(gain, cost, price):
    """How good an exchange is, more being better: 0 where it does not earn the price of its moves."""
    if gain - price * cost <= _LEAST_GAIN:
        return 0.0
    # Per move, so that balance comes from the cheapest exchanges; free ones are not infinitely good.
    return gain / (max(cost, 0) + 0.5) if price > 0.0 else gain


@_compile
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
    charged = np.float32(1.0) if price > 0.0 else np.float32(0.0)
    least = np.float32(0.5) if price > 0.0 else np.float32(1.0)
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
        paid = moves if moves > np.float32(0.0) else np.float32(0.0)
        worth = gain / (paid * charged + least)
        worth = worth if gain - fee * moves > _LEAST_GAIN_32 else np.float32(-1.0)
        worth = worth if moves <= limit else np.float32(-1.0)
        bound[at] = worth
        highest[at] = worth if worth > highest[at] else highest[at]


@_compile
def _look_around(state, scratch, heavy, capacity, ranks_per_node):
    """Fill what the search around a heavy rank needs to know of the cells of its node."""
    expert, origin, frees, heat, slope, steep = (
        state.expert, state.origin, state.frees, state.heat, state.slope, state.steep,
    )  # fmt: skip
    warm, inverse, flag, cost, usual_cost, weights = (
        scratch.warm, scratch.inverse, scratch.flag, scratch.cost, scratch.usual_cost, scratch.weights,
    )  # fmt: skip
    leaving, staying = scratch.leaving, scratch.staying
    first = heavy // ranks_per_node * ranks_per_node
    width = capacity * ranks_per_node
    begin = first * capacity
    own = heavy - first
    for snapshot in range(weights.shape[0]):
        weights[snapshot] = slope[snapshot] * steep[snapshot, heavy]
    _project(state.share, weights, begin, leaving)
    _project(state.pull, slope, begin, scratch.relief)
    for rank in range(ranks_per_node):
        here = heat[first + rank]
        # Too cold for a meaningful quotient: then nothing is known but that powers are not negative.
        quotient = np.float32(1.0) / here if here > _COLD else np.float32(0.0)
        load = np.float32(0.0)
        for at in range(rank, width, ranks_per_node):
            warm[at] = here
            inverse[at] = quotient
            load += leaving[at]
        for at in range(rank, width, ranks_per_node):
            staying[at] = load - leaving[at]
    for at in range(begin + own, begin + width, ranks_per_node):
        if origin[at] >= 0:
            flag[origin[at]] = np.float32(0.0)
    for at in range(begin + own, begin + width, ranks_per_node):
        if expert[at] >= 0:
            flag[expert[at]] = _NEVER
    for at in range(width):
        held = expert[begin + at]
        usual_cost[at] = flag[held] - frees[begin + at] if held >= 0 else _NEVER
        cost[at] = usual_cost[at]
    for at in range(begin + own, begin + width, ranks_per_node):
        if origin[at] >= 0:
            flag[origin[at]] = np.float32(1.0)
        if expert[at] >= 0:
            flag[expert[at]] = np.float32(1.0)


@_compile
def _mark(cell, next_, rank_of, first, ranks_per_node, usual, change, cost):
    """Set `cost` to `usual` plus `change` on each rank of the node that is in a list of cells."""
    while cell >= 0:
        rank = rank_of[cell] - first
        if 0 <= rank < ranks_per_node:
            for at in range(rank, cost.shape[0], ranks_per_node):
                cost[at] = usual[at] + change
        cell = next_[cell]


@_compile
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
    load, power, unit, expert_load, count = (
        state.load, state.power, state.unit, state.expert_load, state.replicas,
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
                    load, power, unit, slope, expert_load, count, heavy, first + rank, x, y, terms
                )
                moves = _arrives(origin_first, origin_next, rank_of, x, first + rank)
                moves += _arrives(origin_first, origin_next, rank_of, y, heavy)
                moves -= int(frees[mine]) + int(frees[begin + at])
                worth = _worth(gain, moves, price)
                if worth > best:
                    best = worth
                    best_mine, best_other, best_cost = mine, begin + at, moves
    return best, best_mine, best_other, best_cost


@_compile
def _swap_gain(load, power, unit, slope, expert_load, count, heavy, rank, x, y, terms):
    """By how much the norms fall, at least, when `heavy` gives `x` to `rank` and gets `y`."""
    fewer = np.float32(1.0) / np.float32(count[x])
    more = np.float32(1.0) / np.float32(count[y])
    for snapshot in range(terms.shape[0]):
        shift = expert_load[x, snapshot] * fewer - expert_load[y, snapshot] * more
        after = _power((load[heavy, snapshot] - shift) * unit[snapshot])
        after += _power((load[rank, snapshot] + shift) * unit[snapshot])
        now = power[heavy, snapshot] + power[rank, snapshot]
        terms[snapshot] = slope[snapshot] * (now - after)
    return _sum(terms)


@_compile
def _sum(terms):
    total = np.float32(0.0)
    for at in range(terms.shape[0]):
        total += terms[at]
    return np.float64(total)


@_compile
def _add_growth(load, power, unit, expert_load, expert, factor, rank, growth):
    """Add to `growth` [snapshots] by how much a rank's power grows with `factor` times an expert."""
    for snapshot in range(growth.shape[0]):
        after = load[rank, snapshot] + expert_load[expert, snapshot] * factor
        growth[snapshot] += _power(after * unit[snapshot]) - power[rank, snapshot]


@_compile
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


@_compile
def _bound_changes(relief, price, most, part, arriving, leaving, warm, inverse, burden, cost, bound):
    """Bound the worth of one more replica of an expert, in each surplus cell, from above; see
    `_bound_swaps`."""
    charged = np.float32(1.0) if price > 0.0 else np.float32(0.0)
    least = np.float32(0.5) if price > 0.0 else np.float32(1.0)
    fee = np.float32(price)
    limit = np.float32(most)
    for at in range(bound.shape[0]):
        there = np.float32(1.0) + (arriving[at] * part - leaving[at]) * inverse[at]
        gain = relief + warm[at] * (_ROUNDING - _power(there)) - burden[at]
        paid = cost[at] if cost[at] > np.float32(0.0) else np.float32(0.0)
        worth = gain / (paid * charged + least)
        worth = worth if gain - fee * cost[at] > _LEAST_GAIN_32 else np.float32(-1.0)
        bound[at] = worth if cost[at] <= limit else np.float32(-1.0)


@_compile
def _list_surplus(state, scratch, begin):
    """List the cells whose expert has several replicas, with what a change of each is bounded by, in
    `scratch.surplus` and `scratch.packed`; returns how many there are."""
    expert, count, twins = state.expert, state.replicas, state.twins
    surplus, extra, total, packed = scratch.surplus, scratch.extra, scratch.total, scratch.packed
    relief, inverse, warm = scratch.relief, scratch.inverse, scratch.warm
    number = 0
    for at in range(relief.shape[0]):
        y = expert[begin + at]
        if y < 0 or count[y] < 2:
            continue
        # What the loss of a replica elsewhere costs on this rank, at least.
        hotter = _power(np.float32(1.0) + relief[at] * inverse[at] / np.float32(count[y] - 1))
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


@_compile
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
        fewer = np.float32(1.0 / count[x] - 1.0 / (count[x] + 1))
        growth[:] = np.float32(0.0)
        _add_holders(
            load, power, unit, expert_load, held_first, held_next, rank_of, twins, x, -fewer, -1, growth
        )
        for snapshot in range(terms.shape[0]):
            terms[snapshot] = -growth[snapshot] * slope[snapshot]
        relief = _sum(terms)
        if _worth(relief, -1, price) <= best:
            continue
        by_rank[:] = ones  # moves that it takes to bring the expert to a rank
        _mark(state.origin_first[x], state.origin_next, rank_of, first, ranks_per_node, ones, none, by_rank)
        _mark(held_first[x], held_next, rank_of, first, ranks_per_node, ones, _NEVER, by_rank)
        for number in range(num_surplus):
            cell = begin + surplus[number]
            arriving[number] = scratch.arriving[place, rank_of[cell] - first]
            cost[number] = by_rank[rank_of[cell] - first] - frees[cell]
        _bound_changes(
            np.float32(relief), price, most, np.float32(count[x] / (count[x] + 1)), arriving,
            scratch.packed[1], scratch.packed[2], scratch.packed[3], scratch.packed[4], cost, bound,
        )  # fmt: skip
        for number in range(num_surplus):
            if bound[number] <= best:
                continue
            cell = begin + surplus[number]
            y, rank = expert[cell], rank_of[cell]
            more = np.float32(1.0 / (count[y] - 1) - 1.0 / count[y])
            arrives = np.float32(1.0 / (count[x] + 1))
            leaves = np.float32(1.0 / count[y]) - np.float32(twins[cell] - 1) * more
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


@_compile
def _put(expert, first, next_, cell, arrives):
    """Put an expert into a cell, in the place of what is there. What follows from it is not refreshed."""
    old = expert[cell]
    if first[old] == cell:
        first[old] = next_[cell]
    else:
        before = first[old]
        while next_[before] != cell:
            before = next_[before]
        next_[before] = next_[cell]
    expert[cell] = arrives
    next_[cell] = first[arrives]
    first[arrives] = cell


@_compile
def _make_swap(state, mine, other, capacity, ranks_per_node):
    expert, rank_of = state.expert, state.rank_of
    x, y = expert[mine], expert[other]
    for cell, arrives in ((mine, y), (other, x)):
        _put(expert, state.first, state.next_, cell, arrives)
    for cell in (mine, other):
        _refresh_rank(state, rank_of[cell], capacity, ranks_per_node)


@_compile
def _make_change(state, expert, cell, capacity, ranks_per_node):
    count, first, next_, rank_of = state.replicas, state.first, state.next_, state.rank_of
    old = state.expert[cell]
    count[old] -= 1
    count[expert] += 1
    _put(state.expert, first, next_, cell, expert)
    for changed in (old, expert):
        holder = first[changed]
        while holder >= 0:
            _refresh_rank(state, rank_of[holder], capacity, ranks_per_node)
            holder = next_[holder]


@_compile
def _lower_peak(scaled, slot_expert, num_ranks, ranks_per_node, rounds, tolerance):
    """Lower the peak of a single load by swaps and changes of replicas, in place; returns the peak.

    A round relieves the heaviest rank that can be relieved.
    """
    num_logical = scaled.shape[1]
    num_slots = slot_expert.shape[0]
    capacity = num_slots // num_ranks
    count = np.zeros(num_logical, np.int64)
    held = np.zeros((num_logical, num_ranks), np.int16)
    for slot in range(num_slots):
        if slot_expert[slot] >= 0:
            count[slot_expert[slot]] += 1
            held[slot_expert[slot], slot // capacity] += 1
    share = np.empty((1, num_slots), np.float32)
    load = np.empty((1, num_ranks), np.float32)
    slot_load = np.empty((1, num_slots), np.float32)
    rest = np.empty(ranks_per_node * capacity, np.float32)
    lowest = np.empty(ranks_per_node * capacity, np.float32)
    _recompute(scaled, slot_expert, count, share, load, slot_load)
    failed = np.zeros(num_ranks, np.bool_)
    fresh = True
    for _ in range(rounds):
        peak = load[0].max()
        if peak <= 1.0 + tolerance:
            break
        improved = False
        for _ in range(_TRIED_RANKS):
            heavy = -1
            for rank in range(num_ranks):
                if not failed[rank] and (heavy < 0 or load[0, rank] > load[0, heavy]):
                    heavy = rank
            # Ranks that tie for the peak are relieved one after the other; others do not set it.
            if heavy < 0 or load[0, heavy] < peak * np.float32(1.0 - 1e-4):
                break
            mine, other = _best_peak_swap(
                share[0], slot_load[0], slot_expert, held, heavy, ranks_per_node, capacity, rest, lowest
            )
            if mine >= 0:
                _swap(share, load, slot_load, slot_expert, held, mine, other, capacity)
                failed[other // capacity] = False
                fresh = False
                improved = True
                break
            expert, slot = _best_peak_change(
                scaled[0], load[0], slot_expert, count, held, heavy, ranks_per_node, capacity
            )
            if slot >= 0:
                held[slot_expert[slot], slot // capacity] -= 1
                count[slot_expert[slot]] -= 1
                held[expert, slot // capacity] += 1
                count[expert] += 1
                slot_expert[slot] = expert
                _recompute(scaled, slot_expert, count, share, load, slot_load)
                failed[:] = False
                fresh = True
                improved = True
                break
            failed[heavy] = True
        if not improved:
            if fresh:
                break
            failed[:] = False
            fresh = True
    _recompute(scaled, slot_expert, count, share, load, slot_load)
    return np.float64(load[0].max())


@_compile
def _keep_lowest_peaks(given, mine, share, rest, lowest):
    """Lower `lowest` to the higher of two ranks after swaps of one slot of the heavy rank with each slot."""
    for at in range(lowest.shape[0]):
        here, there = mine - given + share[at], rest[at] + given
        after = here if here > there else there
        lowest[at] = after if after < lowest[at] else lowest[at]


@_compile
def _best_peak_swap(share, slot_load, slot_expert, held, heavy, ranks_per_node, capacity, rest, lowest):
    """The swap that leaves `heavy` and its partner the lowest: (slot, other slot), or -1 where none helps.

    `rest` and `lowest` are scratch, float32 [slots of a node].
    """
    first = heavy // ranks_per_node * ranks_per_node
    low = first * capacity
    mine = slot_load[heavy * capacity]
    best = mine - np.float32(_LEAST_EXACT_GAIN)
    for at in range(rest.shape[0]):
        closed = slot_expert[low + at] < 0 or (low + at) // capacity == heavy
        rest[at] = np.float32(np.inf) if closed else slot_load[low + at] - share[low + at]
    lowest[:] = best
    partners = share[low : low + rest.shape[0]]
    for place in range(heavy * capacity, (heavy + 1) * capacity):
        if slot_expert[place] >= 0:
            _keep_lowest_peaks(share[place], mine, partners, rest, lowest)
    best_mine, best_other = -1, -1
    for at in range(rest.shape[0]):
        if lowest[at] >= best or held[slot_expert[low + at], heavy] > 0:
            continue
        rank = (low + at) // capacity
        for place in range(heavy * capacity, (heavy + 1) * capacity):
            x = slot_expert[place]
            if x < 0 or held[x, rank] > 0:
                continue
            after = max(mine - share[place] + share[low + at], rest[at] + share[place])
            if after < best:
                best = after
                best_mine, best_other = place, low + at
    return best_mine, best_other


@_compile
def _best_peak_change(weight, load, slot_expert, count, held, heavy, ranks_per_node, capacity):
    """The change of a replica that lowers the peak most, for an expert of `heavy`: (expert, slot), or -1."""
    num_logical, num_ranks = held.shape
    first = heavy // ranks_per_node * ranks_per_node
    low, high = first * capacity, (first + ranks_per_node) * capacity
    # The heaviest rank that shares an expert with several replicas bounds what taking one away costs.
    heaviest_holder = np.zeros(num_logical, np.float32)
    surplus = np.empty(high - low, np.int64)
    num_surplus = 0
    for slot in range(low, high):
        expert = slot_expert[slot]
        if expert >= 0 and count[expert] > 1:
            heaviest_holder[expert] = max(heaviest_holder[expert], load[slot // capacity])
            surplus[num_surplus] = slot
            num_surplus += 1
    best = load.max() - np.float32(_LEAST_EXACT_GAIN)
    best_expert, best_slot = -1, -1
    if num_surplus == 0:
        return best_expert, best_slot
    staying = np.empty(num_surplus, np.float64)
    burden = np.empty(num_surplus, np.float64)
    for at in range(num_surplus):
        y = slot_expert[surplus[at]]
        staying[at] = load[surplus[at] // capacity] - weight[y] / count[y]
        burden[at] = heaviest_holder[y] + weight[y] / (count[y] - 1) - weight[y] / count[y]
    short_slot = np.empty(_SHORTLIST, np.int64)
    short_value = np.empty(_SHORTLIST, np.float64)
    for place in range(heavy * capacity, (heavy + 1) * capacity):
        x = slot_expert[place]
        if x < 0:
            continue
        short_slot[:] = -1
        short_value[:] = load[heavy]
        arriving = weight[x] / (count[x] + 1)
        for number in range(num_surplus):
            value = max(staying[number] + arriving, burden[number])
            at = _SHORTLIST - 1
            if value >= short_value[at]:
                continue
            slot = surplus[number]
            if slot_expert[slot] == x or held[x, slot // capacity] > 0:
                continue
            while at > 0 and value < short_value[at - 1]:
                short_value[at], short_slot[at] = short_value[at - 1], short_slot[at - 1]
                at -= 1
            short_value[at], short_slot[at] = value, slot
        fewer = np.float32(1.0 / count[x] - 1.0 / (count[x] + 1))
        for at in range(_SHORTLIST):
            slot = short_slot[at]
            if slot < 0:
                break
            y = slot_expert[slot]
            rank = slot // capacity
            more = np.float32(1.0 / (count[y] - 1) - 1.0 / count[y])
            highest = np.float32(0.0)
            for r in range(num_ranks):
                after = load[r] - weight[x] * fewer * np.float32(held[x, r])
                after += weight[y] * more * np.float32(held[y, r] - (1 if r == rank else 0))
                if r == rank:
                    after += weight[x] * np.float32(1.0 / (count[x] + 1)) - weight[y] * np.float32(
                        1.0 / count[y]
                    )
                highest = max(highest, after)
            if highest < best:
                best = highest
                best_expert, best_slot = x, slot
    return best_expert, best_slot


@_compile
def _recompute(scaled, slot_expert, count, share, load, slot_load):
    num_snapshots, num_slots = share.shape
    num_ranks = load.shape[1]
    capacity = num_slots // num_ranks
    inverse = np.empty(num_slots, np.float32)
    for slot in range(num_slots):
        inverse[slot] = np.float32(1.0) / np.float32(count[max(slot_expert[slot], 0)])
    for snapshot in range(num_snapshots):
        for slot in range(num_slots):
            share[snapshot, slot] = np.float32(0.0)
            if slot_expert[slot] >= 0:
                share[snapshot, slot] = scaled[snapshot, slot_expert[slot]] * inverse[slot]
        for rank in range(num_ranks):
            total = np.float32(0.0)
            for slot in range(rank * capacity, (rank + 1) * capacity):
                total += share[snapshot, slot]
            load[snapshot, rank] = total
            for slot in range(rank * capacity, (rank + 1) * capacity):
                slot_load[snapshot, slot] = total


@_compile
def _swap(share, load, slot_load, slot_expert, held, mine, other, capacity):
    x, y = slot_expert[mine], slot_expert[other]
    a, b = mine // capacity, other // capacity
    held[x, a] -= 1
    held[y, b] -= 1
    held[x, b] += 1
    held[y, a] += 1
    slot_expert[mine], slot_expert[other] = y, x
    for snapshot in range(load.shape[0]):
        shift = share[snapshot, mine] - share[snapshot, other]
        share[snapshot, mine], share[snapshot, other] = share[snapshot, other], share[snapshot, mine]
        load[snapshot, a] -= shift
        load[snapshot, b] += shift
        for slot in range(a * capacity, (a + 1) * capacity):
            slot_load[snapshot, slot] = load[snapshot, a]
        for slot in range(b * capacity, (b + 1) * capacity):
            slot_load[snapshot, slot] = load[snapshot, b]
