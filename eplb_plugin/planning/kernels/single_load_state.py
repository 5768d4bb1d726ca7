"""The ranks of one node while the peak of a single load is lowered.

Experts and ranks are numbered within the node. Slots of a rank are in falling order of load, and ranks in
rising order, so that searches can stop early.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiling import copy_into, jitable

__all__ = ["NodeState", "holds", "make_replica_change", "make_swap", "new_node", "refresh_node"]


class NodeState(NamedTuple):
    """The ranks of a node and their experts."""

    capacity: int  # slots of each rank, closed ones included
    weight: np.ndarray  # float64 [experts], load of each expert
    rank_slots: np.ndarray  # int64 [ranks], open slots
    replicas: np.ndarray  # int64 [experts], replicas of each expert
    # int64 [slots], expert of a slot; of each rank the heaviest first, and closed slots (-1) last
    expert: np.ndarray
    share: np.ndarray  # float64 [slots], load of a slot; -1 for closed ones
    load: np.ndarray  # float64 [ranks], rank load
    order: np.ndarray  # int64 [ranks], ranks from the lightest to the heaviest, equal ones by number
    place: np.ndarray  # int64 [ranks], place of each rank in `order`


@jitable
def new_node(weight, rank_slots, capacity):
    """A node whose `expert` is to be written, and `refresh_node` called."""
    num_ranks = rank_slots.shape[0]
    return NodeState(
        capacity=capacity,
        weight=weight,
        rank_slots=rank_slots,
        replicas=np.zeros(weight.shape[0], np.int64),
        expert=np.empty(num_ranks * capacity, np.int64),
        share=np.empty(num_ranks * capacity, np.float64),
        load=np.empty(num_ranks, np.float64),
        order=np.empty(num_ranks, np.int64),
        place=np.empty(num_ranks, np.int64),
    )


@jitable
def refresh_node(node):
    """Compute all that depends on `expert`."""
    for at in range(node.replicas.shape[0]):
        node.replicas[at] = 0
    for slot in range(node.expert.shape[0]):
        if node.expert[slot] >= 0:
            node.replicas[node.expert[slot]] += 1
    for rank in range(node.order.shape[0]):
        _compute_rank(node, rank)
    copy_into(node.order, np.argsort(node.load, kind="mergesort"))
    for at in range(node.order.shape[0]):
        node.place[node.order[at]] = at


@jitable
def make_swap(node, slot, other):
    """Swap the experts of two slots."""
    expert = node.expert
    expert[slot], expert[other] = expert[other], expert[slot]
    _refresh_rank(node, slot // node.capacity)
    _refresh_rank(node, other // node.capacity)


@jitable
def make_replica_change(node, expert, slot):
    """Give `slot`, whose expert loses a replica, to `expert`."""
    old = node.expert[slot]
    node.replicas[old] -= 1
    node.replicas[expert] += 1
    node.expert[slot] = expert
    for rank in range(node.load.shape[0]):
        if holds(node, rank, expert) or holds(node, rank, old):
            _refresh_rank(node, rank)


@jitable
def holds(node, rank, sought):
    """Whether a rank holds an expert."""
    expert, capacity = node.expert, node.capacity
    found = False
    for slot in range(rank * capacity, (rank + 1) * capacity):
        found |= expert[slot] == sought
    return found


@jitable
def _refresh_rank(node, rank):
    """Compute all that depends on the experts of a rank."""
    _compute_rank(node, rank)
    load, order, place = node.load, node.order, node.place
    at = place[rank]
    mine = load[rank]
    while at > 0:
        other = order[at - 1]
        if load[other] < mine or (load[other] == mine and other < rank):
            break
        order[at] = other
        place[other] = at
        at -= 1
    while at + 1 < order.shape[0]:
        other = order[at + 1]
        if load[other] > mine or (load[other] == mine and other > rank):
            break
        order[at] = other
        place[other] = at
        at += 1
    order[at] = rank
    place[rank] = at


@jitable
def _compute_rank(node, rank):
    """Compute the load of a rank, and sort its slots: by insertion, since few are out of place."""
    weight, replicas, expert, share = node.weight, node.replicas, node.expert, node.share
    first, end = rank * node.capacity, (rank + 1) * node.capacity
    for slot in range(first, end):
        held = expert[slot]
        part = weight[held] / replicas[held] if held >= 0 else -1.0
        at = slot
        while at > first and share[at - 1] < part:
            share[at], expert[at] = share[at - 1], expert[at - 1]
            at -= 1
        share[at], expert[at] = part, held
    total = 0.0
    for slot in range(first, end):
        if share[slot] > 0.0:
            total += share[slot]
    node.load[rank] = total
