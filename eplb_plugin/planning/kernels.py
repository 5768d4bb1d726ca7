"""Compiled search over the placements of single layers, for loads on the CPU.

The functions here release the interpreter lock and are cached on disk. They run without `fastmath`, and
every sum has a fixed order, so the same input gives the same placement on every machine. They share one
file because the cache on disk does not notice changes of functions that live in another one.

A layer's state is: `slot_expert [slots]`, `count [logical]` (replicas), `held [logical, ranks]` (how many
slots of a rank hold an expert), `share [snapshots, slots]` (load of what each slot holds), `load
[snapshots, ranks]`, and `slot_load [snapshots, slots]`, the load of each slot's rank. Loads are float32,
scaled so that the mean rank load, summed over snapshots, is 1.

With several snapshots the search lowers the smooth peak: the 16-norm of the rank loads of a snapshot,
summed over snapshots. It also counts ranks that are nearly the heaviest, any of which may be the heaviest
in the next step, so it reaches the same balance on later traffic with about half the moves. A single
load, which has no future to differ from, is planned for its true peak.

Where ranks differ in slots, all are given as many as the largest. What a rank does not have is closed: it
holds the last expert, which weighs nothing, counts as one replica, and as held by every rank, so that no
exchange takes or gives one. Its id is called `closed`, and is -1 where every slot is open.
"""

from __future__ import annotations

import numba
import numpy as np

__all__ = ["plan_layers"]

_compile = numba.njit(nogil=True, cache=True, fastmath=False, boundscheck=False)

_TRIED_RANKS = 3  # heavy ranks that a round looks at before the search gives up
_RACE_ROUNDS = 5  # rounds after which the better of two starts is carried on
_HYSTERESIS = 1.2  # how much heavier an expert counts that would lose a replica
_LEAST_GAIN = 2e-4  # smaller gains are not worth a round, as a share of the mean rank load
_LEAST_EXACT_GAIN = 1e-5  # the same for a single load
_SHORTLIST = 3  # slots that are looked at closely for each expert that might get a replica
_UNBOUNDED = 1 << 40


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
        expert_node: int64 [layers, logical], the node that each expert belongs to; -1 for the closed one.
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
    closed = num_logical - 1 if room.sum() < result.shape[1] else -1
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
            if closed >= 0:
                scaled[:, closed] = np.float32(0.0)
        else:
            scale = num_ranks / total
            for snapshot in range(num_snapshots):
                for expert in range(num_logical):
                    scaled[snapshot, expert] = np.float32(weight[snapshot, layer, expert] * scale)
        if start.shape[1]:
            _grow(
                scaled, current[layer], start[layer], num_ranks, ranks_per_node, room, closed, price,
                max_moves, rounds, tolerance, result[layer],
            )  # fmt: skip
        else:
            _from_scratch(
                scaled, expert_node[layer], num_ranks, ranks_per_node, room, closed, rounds, candidates,
                patience, tolerance, seed, result[layer],
            )  # fmt: skip


@_compile
def _grow(
    scaled, current, start, num_ranks, ranks_per_node, room, closed, price, max_moves, rounds, tolerance, best
):
    """Grow a placement from `start`, for the lowest peak plus price of its moves from `current`, into `best`.

    One start is the placement as it is. Single exchanges rarely find their way to other replica counts, so
    another starts from counts chosen anew, somewhat in favour of those in force.
    """
    num_snapshots, num_logical = scaled.shape
    num_slots = current.shape[0]
    total = np.zeros(num_logical, np.float64)
    for snapshot in range(num_snapshots):
        for expert in range(num_logical):
            total[expert] += np.float64(scaled[snapshot, expert])
    capacity = num_slots // num_ranks
    count = np.zeros(num_logical, np.int64)
    expert_node = np.zeros(num_logical, np.int64)
    for slot in range(num_slots):
        count[start[slot]] += 1
        expert_node[start[slot]] = slot // capacity // ranks_per_node
    if closed >= 0:
        count[closed], expert_node[closed] = 1, -1
    # A few rounds tell which of the two starts is better; only that one is carried through.
    race = min(rounds, _RACE_ROUNDS)
    best[:] = start
    peak, moves, done = _lower_smooth_peak(
        scaled, best, current, closed, num_ranks, ranks_per_node, price, max_moves, race, tolerance
    )
    target = _replicate(total, expert_node, count, _HYSTERESIS, room.sum(), num_ranks, ranks_per_node)
    changes = 0
    for expert in range(num_logical):
        changes += max(0, target[expert] - count[expert])
    if 0 < changes <= max_moves:
        slot_expert = start.copy()
        _regrow(total, count, target, slot_expert, num_ranks, ranks_per_node)
        other_peak, other_moves, other_done = _lower_smooth_peak(
            scaled, slot_expert, current, closed, num_ranks, ranks_per_node, price, max_moves, race, tolerance
        )
        if other_moves <= max_moves and other_peak + price * other_moves < peak + price * moves:
            best[:] = slot_expert
            done = other_done
    if not done:
        _lower_smooth_peak(
            scaled, best, current, closed, num_ranks, ranks_per_node, price, max_moves, rounds - race,
            tolerance,
        )  # fmt: skip


@_compile
def _regrow(total, count, target, slot_expert, num_ranks, ranks_per_node):
    """Change `slot_expert` from `count` to `target` replicas: surplus ones leave the heaviest ranks, missing
    ones go to the lightest rank of their node that has room and lacks the expert."""
    num_logical = total.shape[0]
    num_slots = slot_expert.shape[0]
    capacity = num_slots // num_ranks
    load = np.zeros(num_ranks, np.float64)
    for slot in range(num_slots):
        expert = slot_expert[slot]
        load[slot // capacity] += total[expert] / target[expert]
    node_of = np.zeros(num_logical, np.int64)
    for slot in range(num_slots):
        node_of[slot_expert[slot]] = slot // capacity // ranks_per_node
    for expert in range(num_logical):
        for _ in range(count[expert] - target[expert]):
            leaves = -1
            for slot in range(num_slots):
                heavier = leaves < 0 or load[slot // capacity] > load[leaves // capacity]
                if slot_expert[slot] == expert and heavier:
                    leaves = slot
            slot_expert[leaves] = -1
            load[leaves // capacity] -= total[expert] / target[expert]
    key = np.empty(num_logical, np.float64)
    for expert in range(num_logical):
        key[expert] = -total[expert] / target[expert]
    for expert in np.argsort(key, kind="mergesort"):
        low = node_of[expert] * ranks_per_node * capacity
        for _ in range(target[expert] - count[expert]):
            chosen, fallback = -1, -1
            for slot in range(low, low + ranks_per_node * capacity):
                if slot_expert[slot] >= 0:
                    continue
                rank = slot // capacity
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
def _from_scratch(
    scaled, expert_node, num_ranks, ranks_per_node, room, closed, rounds, candidates, patience, tolerance,
    seed, best,
):  # fmt: skip
    """Candidates from nothing, each improved; the one with the lowest peak goes to `best`."""
    num_snapshots, num_logical = scaled.shape
    slot_expert = np.empty(best.shape[0], np.int64)
    total = np.zeros(num_logical, np.float64)
    for snapshot in range(num_snapshots):
        for expert in range(num_logical):
            total[expert] += scaled[snapshot, expert]
    ones = np.ones(num_logical, np.int64)
    count = _replicate(total, expert_node, ones, 1.0, room.sum(), num_ranks, ranks_per_node)
    bound = max(1.0, _packing_bound(scaled, count, 1 if closed >= 0 else best.shape[0] // num_ranks))
    best_peak = np.inf
    failures = 0
    for candidate in range(candidates):
        _hand_out(total, count, expert_node, ranks_per_node, room, closed, candidate, seed, slot_expert)
        if num_snapshots == 1:
            peak = _lower_peak(scaled, slot_expert, closed, num_ranks, ranks_per_node, rounds, tolerance)
        else:
            peak, _, _ = _lower_smooth_peak(
                scaled,
                slot_expert,
                slot_expert,
                closed,
                num_ranks,
                ranks_per_node,
                0.0,
                _UNBOUNDED,
                rounds,
                tolerance,
            )
        if peak < best_peak - 1e-5:
            failures = 0
        else:
            failures += 1
        if peak < best_peak:
            best_peak = peak
            best[:] = slot_expert
        if best_peak <= bound + tolerance or failures >= patience:
            break


@_compile
def _packing_bound(scaled, count, capacity):
    """No packing with these replica counts has a lower sum of peaks: the heaviest replica of a snapshot
    shares its rank with at least the lightest ones."""
    num_snapshots, num_logical = scaled.shape
    num_slots = count.sum()
    share = np.empty(num_slots, np.float32)
    bound = 0.0
    for snapshot in range(num_snapshots):
        at = 0
        for expert in range(num_logical):
            for _ in range(count[expert]):
                share[at] = scaled[snapshot, expert] / np.float32(count[expert])
                at += 1
        share.sort()
        bound += np.float64(share[num_slots - 1])
        for place in range(capacity - 1):
            bound += np.float64(share[place])
    return bound


@_compile
def _replicate(total, expert_node, in_force, bonus, num_slots, num_ranks, ranks_per_node):
    """Replicas of each expert, int64 [logical]: greedy on load per replica, within each node's slots.

    An expert with fewer replicas than `in_force` counts as `bonus` times as heavy.
    """
    num_logical = total.shape[0]
    num_nodes = num_ranks // ranks_per_node
    node_slots = num_slots // num_nodes
    count = np.ones(num_logical, np.int64)
    for node in range(num_nodes):
        members = 0
        for expert in range(num_logical):
            if expert_node[expert] == node:
                members += 1
        if members == 0:
            continue
        bound = max(ranks_per_node, -(-node_slots // members))
        for _ in range(node_slots - members):
            chosen = -1
            most = -1.0
            for expert in range(num_logical):
                if expert_node[expert] == node and count[expert] < bound:
                    share = total[expert] / count[expert]
                    if count[expert] < in_force[expert]:
                        share *= bonus
                    if share > most:
                        most = share
                        chosen = expert
            count[chosen] += 1
    return count


@_compile
def _mix(x):
    """A bijection of 64-bit words that spreads every bit (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@_compile
def _hand_out(total, count, expert_node, ranks_per_node, room, closed, candidate, seed, slot_expert):
    """Longest processing time with capacity: each replica to the lightest rank of its node that has room
    and lacks the expert. Candidates after the first take the replicas in a noisy order."""
    num_logical = total.shape[0]
    num_slots = slot_expert.shape[0]
    num_ranks = room.shape[0]
    capacity = num_slots // num_ranks
    slot_expert[:] = closed
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
    last_of = np.full(num_ranks, -1, np.int64)  # the expert that a rank got last: its replicas come in a row
    for expert in order:
        if expert == closed:
            continue
        share = total[expert] / count[expert]
        start = expert_node[expert] * ranks_per_node
        for _ in range(count[expert]):
            chosen = -1
            fallback = -1
            for rank in range(start, start + ranks_per_node):
                if used[rank] < room[rank]:
                    if last_of[rank] != expert:
                        if chosen < 0 or load[rank] < load[chosen]:
                            chosen = rank
                    elif fallback < 0 or load[rank] < load[fallback]:
                        fallback = rank
            if chosen < 0:
                chosen = fallback
            slot_expert[chosen * capacity + used[chosen]] = expert
            used[chosen] += 1
            load[chosen] += share
            last_of[chosen] = expert


@_compile
def _lower_smooth_peak(
    scaled, slot_expert, current, closed, num_ranks, ranks_per_node, price, max_moves, rounds, tolerance
):
    """Lower the smooth peak by swaps and changes of replicas, in place.

    A round relieves the rank that weighs most in the smooth peak. An exchange has to earn the price of its
    moves away from `current`, of which there are at most `max_moves`; of those that do, the one with the
    most gain per move is made.

    Returns:
        The smooth peak, summed over snapshots; the moves; whether more rounds would change nothing.
    """
    num_snapshots, num_logical = scaled.shape
    num_slots = slot_expert.shape[0]
    capacity = num_slots // num_ranks
    width = ranks_per_node * capacity
    count = np.zeros(num_logical, np.int64)
    held = np.zeros((num_logical, num_ranks), np.int16)
    origin = np.zeros((num_logical, num_ranks), np.int16)
    for slot in range(num_slots):
        count[slot_expert[slot]] += 1
        held[slot_expert[slot], slot // capacity] += 1
        if current[slot] >= 0:
            origin[current[slot], slot // capacity] += 1
    if closed >= 0:
        count[closed] = 1
        held[closed] = 1
        origin[closed] = 1
    moves = _count_moves(slot_expert, origin, capacity)
    share = np.empty((num_snapshots, num_slots), np.float32)
    load = np.empty((num_snapshots, num_ranks), np.float32)
    slot_load = np.empty((num_snapshots, num_slots), np.float32)
    power = np.empty((num_snapshots, num_ranks), np.float32)
    slope = np.empty(num_snapshots, np.float32)
    inverse = np.empty(num_snapshots, np.float32)
    heat = np.empty(num_ranks, np.float64)
    gain = np.empty((capacity, width), np.float32)
    rows = np.empty((3, width), np.float32)
    expert_load = np.ascontiguousarray(scaled.T)
    _recompute(scaled, slot_expert, count, share, load, slot_load)
    # Ranks that could not be relieved, and have not changed since: not worth another look each round.
    failed = np.zeros(num_ranks, np.bool_)
    fresh = True  # whether they failed against the placement as it is now
    done = False
    for _ in range(rounds):
        _, peak = _smooth_peak(load, inverse, power, slope)
        if peak <= 1.0 + tolerance:
            done = True
            break
        heat[:] = 0.0
        for snapshot in range(num_snapshots):
            for rank in range(num_ranks):
                heat[rank] += np.float64(slope[snapshot] * power[snapshot, rank])
        improved = False
        for _ in range(_TRIED_RANKS):
            heavy = -1
            for rank in range(num_ranks):
                if not failed[rank] and (heavy < 0 or heat[rank] > heat[heavy]):
                    heavy = rank
            if heavy < 0:
                break
            value, mine, other, cost = _best_swap(
                share, load, slot_load, inverse, power, slope, slot_expert, held, origin, heavy,
                ranks_per_node, price, max_moves - moves, gain, rows,
            )  # fmt: skip
            expert, slot, change_cost = _best_change(
                expert_load, load, inverse, power, slope, heat, slot_expert, count, held, origin, heavy,
                ranks_per_node, price, max_moves - moves, value,
            )  # fmt: skip
            if slot >= 0:
                old, rank = slot_expert[slot], slot // capacity
                held[old, rank] -= 1
                count[old] -= 1
                held[expert, rank] += 1
                count[expert] += 1
                slot_expert[slot] = expert
                moves += change_cost
                _recompute(scaled, slot_expert, count, share, load, slot_load)
                failed[:] = False
                fresh = True
                improved = True
                break
            if mine >= 0:
                _swap(share, load, slot_load, slot_expert, held, mine, other, capacity)
                moves += cost
                failed[other // capacity] = False
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
    _recompute(scaled, slot_expert, count, share, load, slot_load)
    return _smooth_peak(load, inverse, power, slope)[0], moves, done


@_compile
def _power(x):
    """x to the power of 16, by multiplications alone: the same on every machine."""
    x = x * x
    x = x * x
    x = x * x
    return x * x


@_compile
def _smooth_peak(load, inverse, power, slope):
    """The 16-norm of the rank loads of each snapshot, and what is needed to see how it changes.

    Writes `inverse [snapshots]`, 1 / peak; `power [snapshots, ranks]`, (load / peak) ** 16; and `slope
    [snapshots]`, by how much the norm grows with the sum of these powers. The norm is concave in that sum,
    so a gain that is judged by the slope is at least reached.

    Returns:
        The norms and the peaks, each summed over snapshots.
    """
    num_snapshots, num_ranks = load.shape
    norms, peaks = 0.0, 0.0
    for snapshot in range(num_snapshots):
        peak = np.float32(0.0)
        for rank in range(num_ranks):
            peak = load[snapshot, rank] if load[snapshot, rank] > peak else peak
        if peak <= np.float32(0.0):
            inverse[snapshot] = slope[snapshot] = np.float32(0.0)
            power[snapshot] = np.float32(0.0)
            continue
        inverse[snapshot] = np.float32(1.0) / peak
        total = np.float32(0.0)
        for rank in range(num_ranks):
            power[snapshot, rank] = _power(load[snapshot, rank] * inverse[snapshot])
            total += power[snapshot, rank]
        norm = peak * np.sqrt(np.sqrt(np.sqrt(np.sqrt(total))))
        slope[snapshot] = norm / (np.float32(16.0) * total)
        norms += np.float64(norm)
        peaks += np.float64(peak)
    return norms, peaks


@_compile
def _worth(gain, cost, price):
    """How good an exchange is, more being better: 0 where it does not earn the price of its moves."""
    if gain - price * cost <= _LEAST_GAIN:
        return 0.0
    # Per move, so that balance comes from the cheapest exchanges; free ones are not infinitely good.
    return gain / (max(cost, 0) + 0.5) if price > 0.0 else gain


@_compile
def _take_powers(gain, theirs, rest, mine_left, given):
    """Take the powers that a swap leaves on its two ranks from the gain of each slot.

    This is where the time goes. All three arrays have to be contiguous, or the loop is not vectorised.
    """
    for at in range(gain.shape[0]):
        gain[at] -= _power(mine_left + theirs[at]) + _power(rest[at] + given)


@_compile
def _best_swap(
    share, load, slot_load, inverse, power, slope, slot_expert, held, origin, heavy, ranks_per_node, price,
    moves_left, gain, rows,
):  # fmt: skip
    """The best swap of a slot of `heavy` with another of its node: (worth, slot, other slot, moves); slot -1
    when none is worth it."""
    num_snapshots, num_ranks = load.shape
    capacity = slot_expert.shape[0] // num_ranks
    begin = heavy * capacity
    first = heavy // ranks_per_node * ranks_per_node
    low, width = first * capacity, ranks_per_node * capacity
    # What the two ranks weigh now, the same for every slot of `heavy`; then what they would weigh is taken.
    now, theirs, rest = rows[0], rows[1], rows[2]
    now[:] = np.float32(0.0)
    for snapshot in range(num_snapshots):
        for rank in range(ranks_per_node):
            both = slope[snapshot] * (power[snapshot, heavy] + power[snapshot, first + rank])
            for at in range(rank * capacity, (rank + 1) * capacity):
                now[at] += both
    for place in range(capacity):
        gain[place] = now
    for snapshot in range(num_snapshots):
        # With the slope inside the power, a multiplication is saved for each slot.
        scale = inverse[snapshot] * np.sqrt(np.sqrt(np.sqrt(np.sqrt(slope[snapshot]))))
        for at in range(width):
            theirs[at] = share[snapshot, low + at] * scale
            rest[at] = (slot_load[snapshot, low + at] - share[snapshot, low + at]) * scale
        for place in range(capacity):
            given = share[snapshot, begin + place] * scale
            mine_left = load[snapshot, heavy] * scale - given
            _take_powers(gain[place], theirs, rest, mine_left, given)
    best = 0.0
    best_mine, best_other, best_cost = -1, -1, 0
    for place in range(capacity):
        x = slot_expert[begin + place]
        for at in range(width):
            if gain[place, at] + 2.0 * price <= _LEAST_GAIN:
                continue
            slot = low + at
            rank = slot // capacity
            y = slot_expert[slot]
            if rank == heavy or held[x, rank] > 0 or held[y, heavy] > 0:
                continue
            cost = _move_cost(origin, held, x, heavy, rank) + _move_cost(origin, held, y, rank, heavy)
            if cost > 0 and cost > moves_left:
                continue
            worth = _worth(np.float64(gain[place, at]), cost, price)
            if worth > best:
                best = worth
                best_mine, best_other, best_cost = begin + place, slot, cost
    return best, best_mine, best_other, best_cost


@_compile
def _add_growth(growth, at, expert_load, expert, factor, rank_load, rank_power, rank, inverse):
    """Add to `growth[at]` [snapshots] by how much a rank's power grows with `factor` times an expert."""
    # Rows by index: a slice costs more than the loop over it.
    for snapshot in range(growth.shape[1]):
        after = rank_load[rank, snapshot] + expert_load[expert, snapshot] * factor
        growth[at, snapshot] += _power(after * inverse[snapshot]) - rank_power[rank, snapshot]


@_compile
def _weighted(growth, at, slope, terms):
    """The growth of the norms: sum over snapshots of slope times `growth[at]`; `terms` is scratch."""
    for snapshot in range(terms.shape[0]):
        terms[snapshot] = growth[at, snapshot] * slope[snapshot]
    total = np.float32(0.0)
    for snapshot in range(terms.shape[0]):
        total += terms[snapshot]
    return np.float64(total)


@_compile
def _best_change(
    expert_load, load, inverse, power, slope, heat, slot_expert, count, held, origin, heavy, ranks_per_node,
    price, moves_left, worth_of_swap,
):  # fmt: skip
    """The best way to give an expert of `heavy` one more replica, in a slot of an expert that has several.

    Returns (expert, slot, moves); slot -1 when nothing is worth more than `worth_of_swap`. Ranks that hold
    replicas of both experts, other than the slot's own, are judged for one change after the other.
    """
    num_snapshots, num_ranks = load.shape
    capacity = slot_expert.shape[0] // num_ranks
    first = heavy // ranks_per_node * ranks_per_node
    low, high = first * capacity, (first + ranks_per_node) * capacity

    # Snapshots last: the loops over them are what takes time, and run on contiguous memory.
    rank_load = np.ascontiguousarray(load[:, first : first + ranks_per_node].T)
    rank_power = np.ascontiguousarray(power[:, first : first + ranks_per_node].T)
    terms = np.empty(num_snapshots, np.float32)

    # By how much the sum of powers grows on the ranks that keep the expert, for each slot that may lose it.
    surplus = np.empty(high - low, np.int64)
    num_surplus = 0
    for slot in range(low, high):
        if count[slot_expert[slot]] > 1:
            surplus[num_surplus] = slot
            num_surplus += 1
    if num_surplus == 0:
        return -1, -1, 0
    burden = np.zeros((num_surplus, num_snapshots), np.float32)
    most_relief = np.empty(num_surplus, np.float64)
    for at in range(num_surplus):
        y, own = slot_expert[surplus[at]], surplus[at] // capacity
        more = np.float32(1.0 / (count[y] - 1) - 1.0 / count[y])
        for rank in range(ranks_per_node):
            if held[y, first + rank] > 0 and first + rank != own:
                factor = more * np.float32(held[y, first + rank])
                _add_growth(burden, at, expert_load, y, factor, rank_load, rank_power, rank, inverse)
        most_relief[at] = heat[own] - _weighted(burden, at, slope, terms)

    best = worth_of_swap
    best_expert, best_slot, best_cost = -1, -1, 0
    growth = np.empty((2, num_snapshots), np.float32)  # of the expert's own ranks; of all
    for place in range(heavy * capacity, (heavy + 1) * capacity):
        x = slot_expert[place]
        fewer = np.float32(1.0 / count[x] - 1.0 / (count[x] + 1))
        arriving = np.float32(1.0 / (count[x] + 1))
        growth[0] = np.float32(0.0)
        for rank in range(ranks_per_node):
            if held[x, first + rank] > 0:
                factor = -fewer * np.float32(held[x, first + rank])
                _add_growth(growth, 0, expert_load, x, factor, rank_load, rank_power, rank, inverse)
        relief = -_weighted(growth, 0, slope, terms)
        if _worth(relief, -1, price) <= best:
            continue
        for at in range(num_surplus):
            slot = surplus[at]
            y, rank = slot_expert[slot], slot // capacity
            if y == x or held[x, rank] > 0:
                continue
            cost = 1 if origin[x, rank] == 0 else 0
            if origin[y, rank] == 0 and held[y, rank] == 1:
                cost -= 1
            # No change relieves more than the expert's ranks and all of the slot's.
            if (cost > 0 and cost > moves_left) or _worth(relief + most_relief[at], cost, price) <= best:
                continue
            leaving = np.float32(1.0 / count[y])
            if held[y, rank] > 1:
                leaving -= np.float32(held[y, rank] - 1) * np.float32(1.0 / (count[y] - 1) - 1.0 / count[y])
            own = rank - first
            for snapshot in range(num_snapshots):
                after = rank_load[own, snapshot] + expert_load[x, snapshot] * arriving
                after -= expert_load[y, snapshot] * leaving
                growth[1, snapshot] = growth[0, snapshot] + burden[at, snapshot]
                growth[1, snapshot] += _power(after * inverse[snapshot]) - rank_power[own, snapshot]
            worth = _worth(-_weighted(growth, 1, slope, terms), cost, price)
            if worth > best:
                best = worth
                best_expert, best_slot, best_cost = x, slot, cost
    return best_expert, best_slot, best_cost


@_compile
def _lower_peak(scaled, slot_expert, closed, num_ranks, ranks_per_node, rounds, tolerance):
    """Lower the peak of a single load by swaps and changes of replicas, in place; returns the peak.

    A round relieves the heaviest rank that can be relieved.
    """
    num_logical = scaled.shape[1]
    num_slots = slot_expert.shape[0]
    capacity = num_slots // num_ranks
    count = np.zeros(num_logical, np.int64)
    held = np.zeros((num_logical, num_ranks), np.int16)
    for slot in range(num_slots):
        count[slot_expert[slot]] += 1
        held[slot_expert[slot], slot // capacity] += 1
    if closed >= 0:
        count[closed] = 1
        held[closed] = 1
    share = np.empty((1, num_slots), np.float32)
    load = np.empty((1, num_ranks), np.float32)
    slot_load = np.empty((1, num_slots), np.float32)
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
                share[0], slot_load[0], slot_expert, held, heavy, ranks_per_node, capacity
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
def _best_peak_swap(share, slot_load, slot_expert, held, heavy, ranks_per_node, capacity):
    """The swap that leaves `heavy` and its partner the lowest: (slot, other slot), or -1 where none helps."""
    first = heavy // ranks_per_node * ranks_per_node
    mine = slot_load[heavy * capacity]
    best = mine - np.float32(_LEAST_EXACT_GAIN)
    best_mine, best_other = -1, -1
    for place in range(heavy * capacity, (heavy + 1) * capacity):
        x = slot_expert[place]
        for slot in range(first * capacity, (first + ranks_per_node) * capacity):
            shift = share[place] - share[slot]
            after = max(mine - shift, slot_load[slot] + shift)
            if after < best and held[x, slot // capacity] == 0 and held[slot_expert[slot], heavy] == 0:
                best = after
                best_mine, best_other = place, slot
    return best_mine, best_other


@_compile
def _best_peak_change(weight, load, slot_expert, count, held, heavy, ranks_per_node, capacity):
    """The change of a replica that lowers the peak most, for an expert of `heavy`: (expert, slot), or -1."""
    num_logical, num_ranks = held.shape
    first = heavy // ranks_per_node * ranks_per_node
    low, high = first * capacity, (first + ranks_per_node) * capacity
    # The heaviest rank that shares an expert with several replicas bounds what taking one away costs.
    heaviest_holder = np.zeros(num_logical, np.float32)
    for slot in range(low, high):
        expert = slot_expert[slot]
        heaviest_holder[expert] = max(heaviest_holder[expert], load[slot // capacity])
    best = load.max() - np.float32(_LEAST_EXACT_GAIN)
    best_expert, best_slot = -1, -1
    short_slot = np.empty(_SHORTLIST, np.int64)
    short_value = np.empty(_SHORTLIST, np.float64)
    for place in range(heavy * capacity, (heavy + 1) * capacity):
        x = slot_expert[place]
        short_slot[:] = -1
        short_value[:] = np.inf
        for slot in range(low, high):
            y = slot_expert[slot]
            rank = slot // capacity
            if count[y] < 2 or y == x or held[x, rank] > 0:
                continue
            arrival = load[rank] - weight[y] / count[y] + weight[x] / (count[x] + 1)
            burden = heaviest_holder[y] + weight[y] / (count[y] - 1) - weight[y] / count[y]
            value = max(arrival, burden)
            at = _SHORTLIST - 1
            if value >= load[heavy] or value >= short_value[at]:
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
def _count_moves(slot_expert, origin, capacity):
    """How many (rank, expert) pairs hold an expert that `origin` [logical, ranks] does not."""
    num_ranks = origin.shape[1]
    moves = 0
    for rank in range(num_ranks):
        for slot in range(rank * capacity, (rank + 1) * capacity):
            first = True
            for other in range(rank * capacity, slot):
                first = first and slot_expert[other] != slot_expert[slot]
            if first and origin[slot_expert[slot], rank] == 0:
                moves += 1
    return moves


@_compile
def _recompute(scaled, slot_expert, count, share, load, slot_load):
    num_snapshots, num_slots = share.shape
    num_ranks = load.shape[1]
    capacity = num_slots // num_ranks
    inverse = np.empty(num_slots, np.float32)
    for slot in range(num_slots):
        inverse[slot] = np.float32(1.0) / np.float32(count[slot_expert[slot]])
    for snapshot in range(num_snapshots):
        for slot in range(num_slots):
            share[snapshot, slot] = scaled[snapshot, slot_expert[slot]] * inverse[slot]
        for rank in range(num_ranks):
            total = np.float32(0.0)
            for slot in range(rank * capacity, (rank + 1) * capacity):
                total += share[snapshot, slot]
            load[snapshot, rank] = total
            for slot in range(rank * capacity, (rank + 1) * capacity):
                slot_load[snapshot, slot] = total


@_compile
def _move_cost(origin, held, expert, leaves, enters):
    """Moves that it adds when one replica of `expert` goes from rank to rank: -1, 0 or 1."""
    cost = 0
    if origin[expert, enters] == 0 and held[expert, enters] == 0:
        cost += 1
    if origin[expert, leaves] == 0 and held[expert, leaves] == 1:
        cost -= 1
    return cost


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
