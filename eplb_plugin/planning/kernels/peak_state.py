"""The ranks of one node while the peak of a single load is lowered.

Experts and ranks are numbered within the node. Slots of a rank are kept in falling order of their share, and
ranks in rising order of their load, so that searches can stop early.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiling import _compile
from .copying import _copy


class _Node(NamedTuple):
    """What the ranks of a node hold.

    Attributes:
        weight: float64 [experts].
        replicas: int64 [experts], how many there are of each.
        room: int64 [ranks], open slots.
        expert: int64 [slots], what a slot holds, the heaviest of a rank first and closed ones (-1) last.
        share: float64 [slots], load of what a slot holds; -1 for closed ones.
        load: float64 [ranks].
        order: int64 [ranks], the ranks from the lightest to the heaviest, equal ones by number.
        place: int64 [ranks], where in `order` each rank is.
    """

    weight: np.ndarray
    replicas: np.ndarray
    room: np.ndarray
    expert: np.ndarray
    share: np.ndarray
    load: np.ndarray
    order: np.ndarray
    place: np.ndarray


@_compile
def _new_node(weight, room, capacity):
    num_ranks = room.shape[0]
    return _Node(
        weight,
        np.zeros(weight.shape[0], np.int64),
        room,
        np.empty(num_ranks * capacity, np.int64),
        np.empty(num_ranks * capacity, np.float64),
        np.empty(num_ranks, np.float64),
        np.empty(num_ranks, np.int64),
        np.empty(num_ranks, np.int64),
    )


@_compile
def _enter_node(node, capacity):
    """Bring everything in line with `expert`, which has just been written."""
    count, expert, order, place = node.replicas, node.expert, node.order, node.place
    for at in range(count.shape[0]):
        count[at] = 0
    for slot in range(expert.shape[0]):
        if expert[slot] >= 0:
            count[expert[slot]] += 1
    for rank in range(order.shape[0]):
        _weigh_rank(node.weight, count, expert, node.share, node.load, capacity, rank)
    _copy(np.argsort(node.load, kind="mergesort"), order)
    for at in range(order.shape[0]):
        place[order[at]] = at


@_compile
def _refresh_ranks(node, capacity, rank):
    """Bring a rank in line with what it holds."""
    _weigh_rank(node.weight, node.replicas, node.expert, node.share, node.load, capacity, rank)
    _keep_in_order(node.load, node.order, node.place, rank)


@_compile
def _weigh_rank(weight, count, expert, share, load, capacity, rank):
    """Compute shares and load of a rank, and sort its slots: by insertion, few are out of place."""
    first = rank * capacity
    for slot in range(first, first + capacity):
        held = expert[slot]
        part = weight[held] / count[held] if held >= 0 else -1.0
        at = slot
        while at > first and share[at - 1] < part:
            share[at], expert[at] = share[at - 1], expert[at - 1]
            at -= 1
        share[at], expert[at] = part, held
    total = 0.0
    for slot in range(first, first + capacity):
        if share[slot] > 0.0:
            total += share[slot]
    load[rank] = total


@_compile
def _keep_in_order(load, order, place, rank):
    """Move a rank to where its load belongs in `order`."""
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


@_compile
def _holds(expert, capacity, rank, sought):
    found = False
    for slot in range(rank * capacity, (rank + 1) * capacity):
        found |= expert[slot] == sought
    return found
