"""Which node each group of experts goes to, beside a placement in force: the heaviest node against moves."""

from __future__ import annotations

import numpy as np

from .compiling import SOURCES, _compile_in_place, compile_entrance
from .limits import _VACANT

__all__ = ["choose_nodes"]

_LEAST_GROUP_GAIN = 1e-6  # as a share of the mean node load


@_compile_in_place
def _best_exchange(group_load, node_load, fee, node_of):
    """The two groups of different nodes whose exchange lowers the heaviest node, summed over snapshots, and
    the fees by most: (gain, group, other group).

    Args:
        group_load, node_load: float64 [groups, snapshots] and [nodes, snapshots].
        fee: float64 [groups, nodes], what the moves cost that bring a group to a node.
        node_of: int64 [groups].
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


@_compile_in_place
def _count_held(slot_expert, group_size, node_slots, seen, there):
    """Count the experts of each group that a node holds: int64 [groups, nodes], written."""
    there[:] = 0
    seen[:] = -1
    for slot in range(slot_expert.shape[0]):
        expert, node = slot_expert[slot], slot // node_slots
        if expert >= 0 and seen[expert] != node:
            seen[expert] = node
            there[expert // group_size, node] += 1


@_compile_in_place
def _locate(there, room, node_of):
    """Write the node of each group, int64 [groups]: where it is, or, where groups span nodes or one has too
    many of them, one after the other where most of it is; whether that was so."""
    num_groups, num_nodes = there.shape
    spans = False
    room[:] = num_groups // num_nodes
    for group in range(num_groups):
        node_of[group] = np.argmax(there[group])
        room[node_of[group]] -= 1
        for node in range(num_nodes):
            spans = spans or room[node] < 0 or (there[group, node] > 0 and node != node_of[group])
    if spans:
        node_of[:] = -1
        room[:] = num_groups // num_nodes
        for _ in range(num_groups):
            chosen, place = -1, -1
            for group in range(num_groups):
                for node in range(num_nodes):
                    free = node_of[group] < 0 and room[node] > 0
                    if free and (chosen < 0 or there[group, node] > there[chosen, place]):
                        chosen, place = group, node
            node_of[chosen] = place
            room[place] -= 1
    return spans


def _entrance(sources):
    @compile_entrance
    def choose_nodes(weight, first, last, num_nodes, num_groups, price, held, start, expert_node):
        """Choose for layers `first..last-1`, writing `expert_node` and, in part, `start`.

        A layer begins with its groups where they are, or, where they span nodes, where most of them is, and
        exchanges groups as long as that lowers the heaviest node by more than the price of the moves. Where
        groups span nodes, the slots of experts that have to leave their node become vacant in `start`.

        Args:
            weight: float64 [snapshots, layers, logical], tokens times the weight of their snapshot.
            num_nodes, num_groups: the topology; nodes divide the groups.
            price: what a move costs, as a share of the mean node load.
            held: int64 [layers, slots], what is held now, -1 for an empty slot.
            start: int64 [layers, slots], the placement to grow from; negative slots are left out.
            expert_node: int64 [layers, logical], written.
        """
        _ = sources  # what is closed over belongs to the key of the cache
        num_snapshots, _, num_logical = weight.shape
        group_size = num_logical // num_groups
        node_slots = start.shape[1] // num_nodes
        node_of = np.empty(num_groups, np.int64)
        room = np.empty(num_nodes, np.int64)
        group_load = np.empty((num_groups, num_snapshots), np.float64)
        node_load = np.empty((num_nodes, num_snapshots), np.float64)
        fee = np.empty((num_groups, num_nodes), np.float64)
        there = np.empty((num_groups, num_nodes), np.int64)
        seen = np.empty(num_logical, np.int64)
        for layer in range(first, last):
            _count_held(start[layer], group_size, node_slots, seen, there)
            spans = _locate(there, room, node_of)
            _count_held(held[layer], group_size, node_slots, seen, there)
            for group in range(num_groups):
                for node in range(num_nodes):
                    fee[group, node] = price * (group_size - there[group, node])
            total = 0.0
            for group in range(num_groups):
                for snapshot in range(num_snapshots):
                    load = 0.0
                    for expert in range(group * group_size, (group + 1) * group_size):
                        load += weight[snapshot, layer, expert]
                    group_load[group, snapshot] = load
                    total += load
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
                here, other_node = node_of[group], node_of[other]
                for snapshot in range(num_snapshots):
                    shift = group_load[group, snapshot] - group_load[other, snapshot]
                    node_load[here, snapshot] -= shift
                    node_load[other_node, snapshot] += shift
                node_of[group], node_of[other] = other_node, here
            for expert in range(num_logical):
                expert_node[layer, expert] = node_of[expert // group_size]
            if spans:
                for slot in range(start.shape[1]):
                    expert = start[layer, slot]
                    if expert >= 0 and expert_node[layer, expert] != slot // node_slots:
                        start[layer, slot] = _VACANT

    return choose_nodes


choose_nodes = _entrance(SOURCES)
