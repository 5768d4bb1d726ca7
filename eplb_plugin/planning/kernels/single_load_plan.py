"""The plan of one layer for a single load, from scratch: node by node, with several replica counts each.

With two slots a rank, counts are searched first, and packed once (`single_load_counts`). With more, greedy
counts are packed and improved. They give the lowest hottest replica, but not always the lowest peak. Two
searches over other counts follow, each with new packings:
- `_isolate_hottest`: no two of the hottest experts share a rank. Greedy counts often give them more replicas
  than ranks. Example: loads of 100 and 50 get 7 and 3 replicas on 8 ranks, so two ranks hold both, with a
  load of 31. With 5 and 3 replicas, of 20 and 17, each rank has one.
- `_shift_replicas`: one replica at a time goes from one expert to another.
"""

from __future__ import annotations

import numpy as np

from .compiling import copy_into, inlined, jitable
from .lower_bounds import counts_bound, rank_bound
from .lpt_packing import pack_lpt
from .replica_counts import greedy_counts
from .single_load_counts import isolating_counts, pair_counts
from .single_load_search import LEAST_EXACT_GAIN, lower_peak
from .single_load_state import new_node, refresh_node

__all__ = ["plan_node", "plan_single_load"]

_MOST_HOT = 16  # hottest experts; with more of them none is much hotter than the next
_MOST_WITHOUT = 2  # ranks that may be left without any of the hottest experts
_RECEIVERS = 3  # experts of the heaviest rank that may get a replica
_DONORS = 4  # experts that may lose one
_ROUNDS = 40  # of each packing of other counts: enough to tell whether they are better
_EFFORT = 1536  # slots of all these packings together, so that a node of any size takes as long


@inlined
def plan_single_load(problem, layer, load, slot_expert):
    """Plan one layer of a `Problem`, the heaviest node first: the others need not be better than it.

    Writes `slot_expert`, int64 [slots], for `load`, float32 [logical], scaled to a mean rank load of 1.
    """
    expert_node, rank_slots = problem.expert_node[layer], problem.rank_slots
    num_logical, ranks_per_node = load.shape[0], problem.ranks_per_node
    num_nodes = rank_slots.shape[0] // ranks_per_node
    capacity = slot_expert.shape[0] // rank_slots.shape[0]
    node_load = np.zeros(num_nodes, np.float64)
    for expert in range(num_logical):
        node_load[expert_node[expert]] += np.float64(load[expert])
    members = np.empty(num_logical, np.int64)
    done = np.zeros(num_nodes, np.bool_)
    reached = 1.0 + problem.tolerance
    for _ in range(num_nodes):
        node = -1
        for other in range(num_nodes):
            if not done[other] and (node < 0 or node_load[other] > node_load[node]):
                node = other
        done[node] = True
        size = 0
        for expert in range(num_logical):
            if expert_node[expert] == node:
                members[size] = expert
                size += 1
        first = node * ranks_per_node
        packed = slot_expert[first * capacity : (first + ranks_per_node) * capacity]
        target = max(reached, node_load[node] / ranks_per_node + problem.tolerance)
        peak = plan_node(
            problem, load[members[:size]], rank_slots[first : first + ranks_per_node], target, packed
        )
        reached = max(reached, peak)
        for slot in range(packed.shape[0]):
            if packed[slot] >= 0:
                packed[slot] = members[packed[slot]]


@jitable
def plan_node(problem, load, rank_slots, target, best):
    """Plan the ranks of a node until the peak is at most `target`, or nothing more is found.

    `load` is float32 [experts of the node]. Writes `best`, int64 [slots of the node], with experts numbered
    within the node, and returns its peak.
    """
    num_experts, num_ranks = load.shape[0], rank_slots.shape[0]
    capacity, tolerance = best.shape[0] // num_ranks, problem.tolerance
    weight = load.astype(np.float64)
    if capacity == 2 and num_experts > 1:
        return _plan_pairs(weight, rank_slots, target, tolerance, problem.seed, best)
    one_node = np.zeros(num_experts, np.int64)
    node = new_node(weight, rank_slots, capacity)
    count = greedy_counts(weight, one_node, one_node, 1.0, rank_slots.sum(), num_ranks, num_ranks)
    peak = np.inf
    enough = target
    failures = 0
    for candidate in range(problem.candidates):
        pack_lpt(weight, count, one_node, num_ranks, rank_slots, candidate, problem.seed, node.expert)
        value = lower_peak(node, problem.rounds, target)
        failures = 0 if value < peak - tolerance else failures + 1
        if candidate == 0 or value < peak:
            peak = value
            copy_into(best, node.expert)
        if candidate == 0 and peak > target:
            if capacity > 1:
                target = max(target, rank_bound(weight, rank_slots) + tolerance)
            enough = max(target, counts_bound(weight, count, rank_slots) + tolerance)
        if peak <= enough or failures >= problem.patience:
            break
    # With one slot a rank, no other counts are better.
    if peak > target + tolerance and capacity > 1:
        peak = _isolate_hottest(node, one_node, problem.rounds, target, tolerance, peak, best)
    if peak > target + tolerance and capacity > 1:
        copy_into(node.expert, best)
        refresh_node(node)
        peak = _shift_replicas(node, one_node, target, peak, best)
    return peak


@jitable
def _plan_pairs(weight, rank_slots, target, tolerance, seed, best):
    """Plan ranks of at most two slots. Arguments and result are otherwise as for `plan_node`."""
    peak, total, count = pair_counts(weight, rank_slots, target, tolerance, seed)
    num_experts, num_ranks = weight.shape[0], count.sum() // 2
    paired = np.empty(2 * num_ranks, np.int64)
    one_node = np.zeros(total.shape[0], np.int64)
    pack_lpt(total, count, one_node, num_ranks, np.full(num_ranks, 2), 0, seed, paired)
    # A pair with the expert that is one too many goes to a rank that lacks a slot.
    whole, partial = 0, 0
    for rank in range(rank_slots.shape[0]):
        slots = rank_slots[rank]
        at = 0
        if slots == 2:
            while paired[whole + 1] == num_experts:
                whole += 2
            at, whole = whole, whole + 2
        elif slots == 1:
            while paired[partial + 1] != num_experts:
                partial += 2
            at, partial = partial, partial + 2
        for place in range(2):
            best[2 * rank + place] = paired[at + place] if place < slots else -1
    return peak


@jitable
def _isolate_hottest(node, one_node, rounds, target, tolerance, peak, best):
    """Lower the peak by counts that isolate the 1, 2, 3, ... hottest experts, each packed anew.

    The hottest experts together get one replica a rank, or leave up to `_MOST_WITHOUT` ranks without any.
    Other spare slots go greedily to the other experts, or to the lightest ones: their replicas take little
    room. The search ends within `tolerance` of `target`. `one_node` is int64 [experts], zeros.

    Writes better packings to `best`, int64 [slots] with peak `peak`, and returns the peak of `best`.
    """
    num_ranks, num_slots = node.rank_slots.shape[0], node.rank_slots.sum()
    order = np.argsort(-node.weight, kind="mergesort")
    for variant in range(2 * (_MOST_WITHOUT + 1)):
        ranks, to_lightest = num_ranks - variant // 2, variant % 2 == 1
        for hot in range(2 if variant == 0 else 1, min(_MOST_HOT, ranks, order.shape[0] - 1) + 1):
            count = isolating_counts(node.weight, order, hot, num_slots, num_ranks, ranks, to_lightest)
            if counts_bound(node.weight, count, node.rank_slots) >= peak - tolerance:
                continue
            pack_lpt(node.weight, count, one_node, num_ranks, node.rank_slots, 0, 0, node.expert)
            value = lower_peak(node, rounds, target)
            if value < peak:
                peak = value
                copy_into(best, node.expert)
            if peak <= target + tolerance:
                return peak
    return peak


@jitable
def _shift_replicas(node, one_node, target, peak, best):
    """Lower the peak by one replica less of one expert and one more of an expert of the heaviest rank.

    Each pair of experts is packed anew. The search ends when no pair helps, or `_EFFORT` is spent. `node` has
    the packing `best`; arguments and result are otherwise as for `_isolate_hottest`.
    """
    weight, num_ranks = node.weight, node.rank_slots.shape[0]
    count = node.replicas.copy()
    trial = count.copy()
    receivers = np.empty(_RECEIVERS, np.int64)
    donors = np.empty(_DONORS, np.int64)
    num_receivers = _list_receivers(node, receivers)
    receiver, donor, num_donors = 0, 0, 0
    for _ in range(_EFFORT // best.shape[0]):
        while receiver < num_receivers and donor == num_donors:
            if num_donors > 0:
                receiver += 1
            donor, num_donors = 0, 0
            if receiver < num_receivers:
                num_donors = _list_donors(weight, count, receivers[receiver], donors)
                if num_donors == 0:
                    receiver += 1
        if receiver >= num_receivers:
            break
        copy_into(trial, count)
        trial[receivers[receiver]] += 1
        trial[donors[donor]] -= 1
        donor += 1
        pack_lpt(weight, trial, one_node, num_ranks, node.rank_slots, 0, 0, node.expert)
        if _shares_rank(node.expert, node.capacity):
            continue
        value = lower_peak(node, _ROUNDS, target)
        if value < peak - LEAST_EXACT_GAIN:
            peak = value
            copy_into(best, node.expert)
            if peak <= target:
                break
            copy_into(count, node.replicas)
            num_receivers = _list_receivers(node, receivers)
            receiver, donor, num_donors = 0, 0, 0
    return peak


@jitable
def _list_receivers(node, receivers):
    """List the experts with the largest replicas on the heaviest rank, without those on every rank.

    Returns their number.
    """
    heavy = node.order[-1]
    number = 0
    for slot in range(heavy * node.capacity, heavy * node.capacity + node.rank_slots[heavy]):
        if node.replicas[node.expert[slot]] < node.rank_slots.shape[0] and number < receivers.shape[0]:
            receivers[number] = node.expert[slot]
            number += 1
    return number


@jitable
def _list_donors(weight, count, receiver, donors):
    """List the experts whose replicas are lightest with one replica less. Returns their number."""
    number = 0
    for expert in range(count.shape[0]):
        if count[expert] < 2 or expert == receiver:
            continue
        part = weight[expert] / (count[expert] - 1)
        at = number
        while at > 0 and weight[donors[at - 1]] / (count[donors[at - 1]] - 1) > part:
            if at < donors.shape[0]:
                donors[at] = donors[at - 1]
            at -= 1
        if at < donors.shape[0]:
            donors[at] = expert
            number = min(number + 1, donors.shape[0])
    return number


@jitable
def _shares_rank(expert, capacity):
    """Whether any rank holds an expert twice."""
    for slot in range(expert.shape[0]):
        for other in range(slot // capacity * capacity, slot):
            if expert[slot] >= 0 and expert[other] == expert[slot]:
                return True
    return False
