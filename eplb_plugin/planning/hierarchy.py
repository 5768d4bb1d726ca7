"""The hierarchical policy: every group of experts within one node, where the numbers allow it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np
import torch

from ..core.topology import Topology

__all__ = [
    "MOST_PACKINGS",
    "best_nodes",
    "effective_topology",
    "groups_within_nodes",
    "num_packings",
    "packings",
]

MOST_PACKINGS = 128  # that are all tried: 105 of eight groups to four nodes, 35 to two


def effective_topology(topology: Topology, num_logical: int) -> Topology:
    """The topology to plan for: itself where the hierarchical policy fits, else one node and one group."""
    if topology.is_hierarchical(num_logical):
        return topology
    return replace(topology, num_nodes=1, num_groups=1)


def groups_within_nodes(ids: torch.Tensor, num_logical: int, topology: Topology) -> torch.Tensor:
    """Whether a layer has every group within one node, and no node more groups than its share: bool [layers].

    Every plan has. Empty slots (-1 in `ids`, int64 [layers, slots]) are ignored.
    """
    if topology.num_nodes == 1:
        return torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
    filled = ids >= 0
    group = ids.clamp(min=0) // (num_logical // topology.num_groups)
    node = torch.arange(topology.num_slots, device=ids.device) // topology.slots_per_node
    lowest = torch.full((ids.shape[0], topology.num_groups), topology.num_nodes, device=ids.device)
    lowest.scatter_reduce_(1, group, torch.where(filled, node, topology.num_nodes), "amin")
    whole = ((lowest.gather(1, group) == node) | ~filled).all(1)
    members = (lowest[:, :, None] == torch.arange(topology.num_nodes, device=ids.device)).sum(1)
    return whole & (members <= topology.num_groups // topology.num_nodes).all(1)


def packings(num_groups: int, num_nodes: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Every even split of the groups, regardless of the order of the nodes: the groups of each node."""

    def split(left: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
        if not left:
            yield ()
            return
        first, rest = left[0], left[1:]
        for others in combinations(rest, num_groups // num_nodes - 1):
            for more in split(tuple(group for group in rest if group not in others)):
                yield ((first, *others), *more)

    return split(tuple(range(num_groups)))


def num_packings(num_groups: int, num_nodes: int) -> int:
    """The number of `packings`: 105 of eight groups to four nodes."""
    size, count = num_groups // num_nodes, 1
    for left in range(num_groups, 0, -size):
        count *= comb(left - 1, size - 1)
    return count


def best_nodes(group_load: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """The packing with the lowest load of the heaviest node, summed over the snapshots.

    Of float64 [snapshots, layers, groups] on the CPU: int64 [layers, groups], the node of each group.
    """
    members = _all_members(group_load.shape[2], num_nodes)
    loads = group_load.numpy()
    heaviest = np.zeros((*loads.shape[:2], len(members)))
    for of_node in members.transpose(1, 2, 0):
        # Group by group: the order of the sums in a matrix product depends on the machine.
        total = np.zeros_like(heaviest)
        for groups in of_node:
            total += loads[:, :, groups]
        np.maximum(heaviest, total, out=heaviest)
    best = members[heaviest.sum(0).argmin(1)]
    node = np.empty((len(best), loads.shape[2]), np.int64)
    np.put_along_axis(node, best.reshape(node.shape), np.arange(node.shape[1])[None] // best.shape[2], 1)
    return torch.from_numpy(node)


@lru_cache(maxsize=16)
def _all_members(num_groups: int, num_nodes: int) -> np.ndarray[tuple[int, int, int], np.dtype[np.int64]]:
    """int64 [packings, nodes, groups of a node]: the groups of each node."""
    return np.array(list(packings(num_groups, num_nodes)), np.int64)
