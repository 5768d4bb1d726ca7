"""Groups to nodes, for a placement in force: the heaviest node against the price of the moves."""

from __future__ import annotations

import numpy as np

from .compiling import SOURCES, entry_point, inlined
from .load_drift import price_factor
from .replica_counts import VACANT

__all__ = ["choose_nodes"]

_LEAST_GROUP_GAIN = 1e-6  # as a fraction of the mean node load


@inlined
def _best_exchange(group_load, node_load, fee, node_of):
    """The best exchange of two groups of different nodes: gain, group, other group.

    It gains most in the load of the heaviest node, summed over snapshots, plus the price of all moves: `fee`,
    float64 [groups, nodes]. `group_load` and `node_load` are float64 [groups or nodes, snapshots].
    """
    num_groups, num_snapshots = group_load.shape
    num_nodes = node_load.shape[0]
    best, best_group, best_other = _LEAST_GROUP_GAIN, 0, 0
    now = 0.0
    for snapshot in range(num_snapshots):
        heaviest = 0.0
        for node in range(num_nodes):
            heaviest = max(heaviest, node_load[node, snapshot])
        now += heaviest
    for group in range(num_groups):
        for other in range(group + 1, num_groups):
            here, there = node_of[group], node_of[other]
            if here == there:
                continue
            gain = now + fee[group, here] + fee[other, there] - fee[group, there] - fee[other, here]
            for snapshot in range(num_snapshots):
                shift = group_load[group, snapshot] - group_load[other, snapshot]
                heaviest = max(node_load[here, snapshot] - shift, node_load[there, snapshot] + shift)
                for node in range(num_nodes):
                    if node not in (here, there):
                        heaviest = max(heaviest, node_load[node, snapshot])
                gain -= heaviest
            if gain > best:
                best, best_group, best_other = gain, group, other
    return best, best_group, best_other


@inlined
def _count_experts(slot_expert, group_size, node_slots, seen, held):
    """Count the experts of each group on each node, in `held`, int64 [groups, nodes]."""
    held[:] = 0
    seen[:] = -1
    for slot in range(slot_expert.shape[0]):
        expert, node = slot_expert[slot], slot // node_slots
        if expert >= 0 and seen[expert] != node:
            seen[expert] = node
            held[expert // group_size, node] += 1


@inlined
def _locate(held, free, node_of):
    """Write the node of each group to `node_of`; say whether groups span nodes or fill them unevenly.

    If they do, each group in turn gets the node that holds most of it: `held`, int64 [groups, nodes]. `free`,
    int64 [nodes], is scratch for the groups that a node may still get.
    """
    num_groups, num_nodes = held.shape
    spans = False
    free[:] = num_groups // num_nodes
    for group in range(num_groups):
        node_of[group] = np.argmax(held[group])
        free[node_of[group]] -= 1
        for node in range(num_nodes):
            spans = spans or free[node] < 0 or (held[group, node] > 0 and node != node_of[group])
    if spans:
        node_of[:] = -1
        free[:] = num_groups // num_nodes
        for _ in range(num_groups):
            chosen, place = -1, -1
            for group in range(num_groups):
                for node in range(num_nodes):
                    open_ = node_of[group] < 0 and free[node] > 0
                    if open_ and (chosen < 0 or held[group, node] > held[chosen, place]):
                        chosen, place = group, node
            node_of[chosen] = place
            free[place] -= 1
    return spans


def _build(sources):
    @entry_point
    def choose_nodes(
        weight, first, last, num_nodes, num_ranks, num_groups, price, least_price, current, start, expert_node
    ):
        """Choose the node of each group, for layers `first..last-1`.

        Groups begin on the node that holds most of them. Exchanges follow as long as one lowers the load of
        the heaviest node by more than the price of its moves. Where groups span nodes, the slots of experts
        on other nodes than their group become vacant in `start`.

        Args:
            weight: float64 [snapshots, layers, logical], tokens times the weight of their snapshot.
            num_nodes, num_ranks, num_groups: the topology; nodes divide the groups.
            price: of one move, as a fraction of the mean node load.
            least_price: least factor on the price, where traffic is steady.
            current: int64 [layers, slots], the placement in force, -1 for an empty slot.
            start: int64 [layers, slots], where the search begins; negative slots are skipped; written.
            expert_node: int64 [layers, logical], written.
        """
        _ = sources  # numba adds values of the closure to the key of the cache
        num_snapshots, _, num_logical = weight.shape
        group_size = num_logical // num_groups
        node_slots = start.shape[1] // num_nodes
        node_of = np.empty(num_groups, np.int64)
        free = np.empty(num_nodes, np.int64)
        group_load = np.empty((num_groups, num_snapshots), np.float64)
        node_load = np.empty((num_nodes, num_snapshots), np.float64)
        fee = np.empty((num_groups, num_nodes), np.float64)
        held = np.empty((num_groups, num_nodes), np.int64)
        seen = np.empty(num_logical, np.int64)
        whole, older, even = np.empty(num_logical), np.empty(num_logical), np.empty(num_logical)
        for layer in range(first, last):
            _count_experts(start[layer], group_size, node_slots, seen, held)
            spans = _locate(held, free, node_of)
            _count_experts(current[layer], group_size, node_slots, seen, held)
            total = 0.0
            older[:] = 0.0
            even[:] = 0.0
            whole[:] = 0.0
            for group in range(num_groups):
                for snapshot in range(num_snapshots):
                    load = 0.0
                    for expert in range(group * group_size, (group + 1) * group_size):
                        here = weight[snapshot, layer, expert]
                        load += here
                        whole[expert] += here
                        older[expert] += here if snapshot < num_snapshots // 2 else 0.0
                        even[expert] += here if snapshot % 2 == 0 else 0.0
                    group_load[group, snapshot] = load
                    total += load
            each = price * price_factor(whole, older, even, num_ranks, least_price)
            for group in range(num_groups):
                for node in range(num_nodes):
                    fee[group, node] = each * (group_size - held[group, node])
            scale = num_nodes / total if total > 0.0 else 0.0
            node_load[:] = 0.0
            for group in range(num_groups):
                for snapshot in range(num_snapshots):
                    group_load[group, snapshot] *= scale
                    node_load[node_of[group], snapshot] += group_load[group, snapshot]
            for _ in range(num_groups * num_groups):
                gain, group, other = _best_exchange(group_load, node_load, fee, node_of)
                if gain <= _LEAST_GROUP_GAIN:
                    break
                here, there = node_of[group], node_of[other]
                for snapshot in range(num_snapshots):
                    shift = group_load[group, snapshot] - group_load[other, snapshot]
                    node_load[here, snapshot] -= shift
                    node_load[there, snapshot] += shift
                node_of[group], node_of[other] = there, here
            for expert in range(num_logical):
                expert_node[layer, expert] = node_of[expert // group_size]
            if spans:
                for slot in range(start.shape[1]):
                    expert = start[layer, slot]
                    if expert >= 0 and expert_node[layer, expert] != slot // node_slots:
                        start[layer, slot] = VACANT

    return choose_nodes


choose_nodes = _build(SOURCES)
