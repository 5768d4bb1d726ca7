"""Fair tables: the search for level ranks, by source ranks, swaps of slots and other replica counts."""

from __future__ import annotations

import numpy as np

from .compiling import SOURCES, copy_into, entry_point, jitted
from .fair_counts import fair_counts, pack
from .fair_state import LEAST_GAIN, new_state, restore, settle, share_out
from .placement_tables import keep_slots
from .rank_matching import match_by_overlap

__all__ = ["assign_sources", "level_by_exchanges", "level_sources"]

_MOST_SWAPS = 1000


@jitted
def _even_peak(state):
    per_rank = state.expert.shape[0] // state.level.shape[0]
    peak = 0.0
    for rank in range(state.level.shape[0]):
        level = 0.0
        for slot in range(rank * per_rank, (rank + 1) * per_rank):
            level += state.unit[state.expert[slot]] / state.replicas[state.expert[slot]]
        peak = max(peak, level * state.level.shape[0])
    return peak


@jitted
def _swap(state, nodes, was, fee):
    """Swap a slot of the peak with one of another rank, sources and all; whether that paid for its moves.

    Args:
        nodes: first rank and last rank + 1, of those that exchange.
        was: bool [logical, ranks], whether a rank holds an expert now.
        fee: tokens that the peak has to fall by for a move.
    """
    expert, unit, sources, level, at = state.expert, state.unit, state.sources, state.level, state.at
    per_rank = expert.shape[0] // level.shape[0]
    first_rank, last_rank = nodes
    peak = first_rank + int(np.argmax(level[first_rank:last_rank]))
    best = level[peak] * LEAST_GAIN
    chosen = (-1, -1)
    for slot in range(peak * per_rank, (peak + 1) * per_rank):
        e = expert[slot]
        if state.weight[slot] != 1:
            continue
        for b in range(first_rank, last_rank):
            if b == peak or at[e, b] >= 0:
                continue
            for second in range(b * per_rank, (b + 1) * per_rank):
                f = expert[second]
                if state.weight[second] != 1 or at[f, peak] >= 0:
                    continue
                less = sources[slot] * unit[e] - sources[second] * unit[f]
                moves = int(was[e, peak]) + int(was[f, b]) - int(was[e, b]) - int(was[f, peak])
                gain = level[peak] - max(level[peak] - less, level[b] + less) - fee * max(moves, 0)
                if gain > best:
                    best, chosen = gain, (slot, second)
    if chosen[0] < 0:
        return False
    first, second = chosen
    e, f, other = expert[first], expert[second], second // per_rank
    less = sources[first] * unit[e] - sources[second] * unit[f]
    level[peak] -= less
    level[other] += less
    at[e, peak], at[f, other] = -1, -1
    at[e, other], at[f, peak] = second, first
    expert[first], expert[second] = f, e
    sources[first], sources[second] = sources[second], sources[first]
    return True


@jitted
def _search(state, nodes, was, goal, fee):
    """Exchange source ranks, and above `goal` also slots, while that lowers the peak."""
    settle(state, nodes[0], nodes[1])
    for _ in range(_MOST_SWAPS):
        if state.level[nodes[0] : nodes[1]].max() <= goal or not _swap(state, nodes, was, fee):
            break
        settle(state, nodes[0], nodes[1])


@jitted
def _cost(state, nodes, was, fee):
    """The peak in tokens, and the fee of all moves."""
    moves = 0
    for expert in range(was.shape[0]):
        for rank in range(nodes[0], nodes[1]):
            moves += int(state.at[expert, rank] >= 0 and not was[expert, rank])
    return state.level[nodes[0] : nodes[1]].max() + fee * moves


@jitted
def _change_counts(state, nodes, held, was, goal, fee):
    """Go to other replica counts where that pays for its moves: by few exchanges, or by packing anew."""
    num_logical, num_ranks = state.at.shape
    first_rank, last_rank = nodes
    width, per_rank = last_rank - first_rank, state.expert.shape[0] // num_ranks
    first, last = first_rank * per_rank, last_rank * per_rank
    here = np.zeros(num_logical, np.bool_)
    here[state.expert[first:last]] = True
    experts = np.argsort(-state.unit, kind="mergesort")
    experts = experts[here[experts]]
    counts = state.replicas.copy()
    if fair_counts(state.unit, experts, num_ranks, width, per_rank, goal, counts) == np.inf:
        return
    cost, best, sources = _cost(state, nodes, was, fee), state.expert.copy(), state.sources.copy()
    for anew in range(2):
        if anew:
            _pack_anew(
                state.expert[first:last], state.unit, experts, counts, num_ranks, width, held[first:last]
            )
        else:
            for expert in experts:
                while state.replicas[expert] < counts[expert] and _add_replica(state, nodes, expert, counts):
                    pass
        share_out(state, here)
        _search(state, nodes, was, goal, fee)
        now = _cost(state, nodes, was, fee)
        if now < cost * (1.0 - LEAST_GAIN):
            cost, best, sources = now, state.expert.copy(), state.sources.copy()
        else:
            restore(state, best, sources)


@jitted
def _pack_anew(ids, unit, experts, counts, num_ranks, width, held):
    """Pack the slots of a node, `ids`, near to what they hold: int64 [slots], as `ids`."""
    num_logical, num_slots = unit.shape[0], ids.shape[0]
    packed = np.empty(num_slots, np.int64)
    pack(unit, experts, counts, num_ranks, width, packed)
    slots = np.full(width, num_slots // width)
    packed = match_by_overlap(packed, held, slots, width, num_logical).reshape(1, num_slots)
    first_slot = np.arange(width + 1) * (num_slots // width)
    kept, moves, shared = np.empty_like(packed), np.empty(1, np.int64), np.empty((2, 1), np.int64)
    keep_slots(packed, held.reshape(1, num_slots), first_slot, num_logical, kept, moves, shared)
    copy_into(ids, kept[0])


@jitted
def _add_replica(state, nodes, expert, counts):
    """Add a replica on the lowest rank without one, in place of a replica of an expert with too many.

    Where the replaced replica is on another rank, the heaviest slot that fits there makes room. Sources and
    levels are guesses then: `share_out` has to follow. Returns whether it was possible.
    """
    ids, unit, level, at = state.expert, state.unit, state.level, state.at
    per_rank = ids.shape[0] // level.shape[0]
    first_rank, last_rank = nodes
    target = -1
    for rank in range(first_rank, last_rank):
        if at[expert, rank] < 0 and (target < 0 or level[rank] < level[target]):
            target = rank
    free, part = -1, np.inf
    for slot in range(first_rank * per_rank, last_rank * per_rank):
        if state.replicas[ids[slot]] > counts[ids[slot]] and state.weight[slot] < 2:
            # A second replica on its rank serves nobody.
            tokens = unit[ids[slot]] / state.replicas[ids[slot]] if state.weight[slot] else 0.0
            if tokens < part:
                free, part = slot, tokens
    if target < 0 or free < 0:
        return False
    gone, home = ids[free], free // per_rank
    place, heaviest = free, -1.0
    if home != target:
        for slot in range(target * per_rank, (target + 1) * per_rank):
            tokens = state.sources[slot] * unit[ids[slot]]
            if state.weight[slot] == 1 and at[ids[slot], home] < 0 and tokens > heaviest:
                place, heaviest = slot, tokens
        if place == free:
            return False
    if state.weight[free]:
        at[gone, home] = -1
    state.replicas[gone] -= 1
    if home != target:
        ids[free], state.sources[free], state.weight[free] = ids[place], state.sources[place], 1
        at[ids[place], target], at[ids[place], home] = -1, free
        level[home] += heaviest
        level[target] -= heaviest
    ids[place], state.sources[place], state.weight[place] = expert, 1, 1
    at[expert, target] = place
    state.replicas[expert] += 1
    level[target] += unit[expert]
    return True


def _build(digest):
    @entry_point
    def level_sources(ids, load, num_ranks):
        """Choose how many of the ranks each slot serves, so that the rank loads come out level.

        Args:
            ids: int64 [layers, slots], the expert of each slot.
            load: float64 [layers, logical], tokens.

        Returns:
            int64 [layers, slots], source ranks of each slot. Over the slots of an expert: `num_ranks`.
        """
        _ = digest  # numba adds values of the closure to the key of the cache
        sources = np.empty(ids.shape, np.int64)
        for layer in range(ids.shape[0]):
            state = new_state(ids[layer], load[layer], num_ranks)
            settle(state, 0, num_ranks)
            sources[layer] = state.sources
        return sources

    @entry_point
    def level_by_exchanges(ids, load, num_ranks, width, held, price, tolerance):
        """As `level_sources`; and experts change slots, in `ids`, where that lowers a high peak.

        Args:
            width: ranks within which experts may change slots, such as those of a node.
            held: int64 [layers, slots], what the slots hold now: changes away from it are moves.
            price: least reduction of the peak for a move, as a fraction of the mean slot load.
            tolerance: only layers with a peak that far above that of the even split are changed, as a
                fraction of it.
        """
        _ = digest
        num_layers, num_slots = ids.shape
        sources = np.empty(ids.shape, np.int64)
        was = np.empty((load.shape[1], num_ranks), np.bool_)
        for layer in range(num_layers):
            state = new_state(ids[layer], load[layer], num_ranks)
            was[:] = False
            for slot in range(num_slots):
                was[held[layer, slot], slot * num_ranks // num_slots] = True
            goal = _even_peak(state) * (1.0 + tolerance)
            fee = price * load[layer].sum() / num_slots
            settle(state, 0, num_ranks)
            cost = _cost(state, (0, num_ranks), was, fee)
            settled = ids[layer].copy(), state.sources.copy()
            for first_rank in range(0, num_ranks, width):
                nodes = first_rank, first_rank + width
                _search(state, nodes, was, goal, fee)
                if state.level[nodes[0] : nodes[1]].max() > goal:
                    _change_counts(state, nodes, held[layer], was, goal, fee)
            # A node below the peak of the layer pays for moves too, and a swap lowers one of several peaks.
            if _cost(state, (0, num_ranks), was, fee) >= cost * (1.0 - LEAST_GAIN):
                restore(state, settled[0], settled[1])
            sources[layer] = state.sources
        return sources

    @entry_point
    def assign_sources(ids, sources, num_ranks, ranks_per_node, rank, num_logical):
        """The slot that `rank` sends each expert's tokens to: its own, else one of its node, else the rest.

        Args:
            ids: int64 [layers, slots].
            sources: int64 [layers, slots], from `level_sources`.

        Returns:
            int64 [layers, logical].
        """
        _ = digest
        num_layers, num_slots = ids.shape
        per_rank = num_slots // num_ranks
        table = np.full((num_layers, num_logical), -1, np.int64)
        slots = np.empty((num_logical, num_ranks), np.int64)
        found = np.empty(num_logical, np.int64)
        left = np.empty(num_slots, np.int64)
        served = np.empty(num_ranks, np.bool_)
        for layer in range(num_layers):
            found[:] = 0
            for slot in range(num_slots):
                left[slot] = sources[layer, slot]
                if left[slot]:
                    expert = ids[layer, slot]
                    slots[expert, found[expert]] = slot
                    found[expert] += 1
            for expert in range(num_logical):
                served[:] = False
                for reach in (1, ranks_per_node, num_ranks):  # own rank, own node, all
                    # Replicas take turns: ranks that come first would else leave none near for those behind.
                    for place in range(found[expert]):
                        slot = slots[expert, place]
                        home = slot // per_rank // reach * reach
                        for source in range(home, home + reach):
                            if left[slot] and not served[source]:
                                served[source] = True
                                left[slot] -= 1
                                if source == rank:
                                    table[layer, expert] = slot
        return table

    return level_sources, level_by_exchanges, assign_sources


level_sources, level_by_exchanges, assign_sources = _build(SOURCES)
