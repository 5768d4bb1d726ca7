"""Lower bounds on the peak rank load of any placement."""

from __future__ import annotations

from itertools import combinations

import torch

from ..core.topology import Topology
from .hierarchy import MOST_PACKINGS, num_packings, packings
from .kernels.api import shared_bounds
from .replica_counts import count_replicas, replicate

__all__ = ["peak_lower_bound"]

_MOST_HALVED = 12  # groups, of which there are 462 halves
_ROWS_AT_ONCE = 2048  # layers of snapshots
_ROWS_OF_ALL_NODES = 64  # the same, each with every possible set of groups of a node
_EQUAL = 1e-12


def peak_lower_bound(load: torch.Tensor, topology: Topology, *, even: bool = True) -> torch.Tensor:
    """A lower bound on the peak rank load of every layer, mean over the snapshots: float64 [layers], tokens.

    The largest of three bounds of each snapshot:

    - The mean rank load.
    - The load T of the hottest replica at the best replica counts: the smallest T with
      sum of ceil(load / T) <= slots. Loads 300 and 100 in 4 slots: 100.
    - With the even split, the bound of ranks that share their experts (`kernels.lower_bounds`). With groups
      within nodes, it is the minimum over all packings of groups to nodes, if these are few. If they are
      many, or the split is another, two weaker bounds replace it. One is the mean rank load of the heaviest
      node. The other is T of each group, in the slots left by the other groups of its node.

    Args:
        load: float64 [snapshots, layers, logical], tokens.
        topology: as from `effective_topology`.
        even: whether the tokens of an expert spread evenly over its replicas; else they go to them in any
            way.
    """
    at_once = max(1, _ROWS_AT_ONCE // load.shape[1])
    return torch.cat([_step_bounds(part, topology, even) for part in torch.split(load, at_once)]).mean(0)


def _step_bounds(load: torch.Tensor, topology: Topology, even: bool) -> torch.Tensor:
    """The bound of each snapshot: `load` [snapshots, layers, logical] to float64 [snapshots, layers]."""
    bound = torch.maximum(load.sum(2) / topology.num_ranks, _hottest_replica(load, topology.num_slots))
    if topology.num_nodes == 1:
        if not even:
            return bound
        shared = shared_bounds(load.flatten(0, 1), topology.slots_by_rank).view_as(bound)
        return torch.maximum(bound, shared)
    by_group = load.view(*load.shape[:2], topology.num_groups, -1)
    per_node = topology.num_groups // topology.num_nodes
    if even and num_packings(topology.num_groups, topology.num_nodes) <= MOST_PACKINGS:
        best = _best_packing_bound(by_group.flatten(0, 1), topology).view_as(bound)
        return torch.maximum(bound, best)
    node = _heaviest_node(by_group.sum(3), topology.num_nodes)
    # Every expert of the other groups takes a slot.
    slots = topology.slots_per_node - (per_node - 1) * by_group.shape[3]
    replica = _hottest_replica(by_group, slots).amax(2)
    return torch.maximum(bound, torch.maximum(node / topology.ranks_per_node, replica))


def _best_packing_bound(by_group: torch.Tensor, topology: Topology) -> torch.Tensor:
    """The minimum, over all packings of groups to nodes, of the highest bound of a node: of loads
    [X, groups, experts], float64 [X].

    If the bound of the packing with the lowest mean loads is that mean, no other packing has a lower one.
    """
    num_groups = by_group.shape[1]
    nodes = list(combinations(range(num_groups), num_groups // topology.num_nodes))
    place = {node: index for index, node in enumerate(nodes)}
    device = by_group.device
    groups = torch.tensor(nodes, device=device)
    every = torch.tensor(
        [[place[node] for node in packing] for packing in packings(num_groups, topology.num_nodes)],
        device=device,
    )
    rank_slots = topology.slots_by_rank[: topology.ranks_per_node]

    def of_nodes(rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The bounds of nodes of rows: float64 [rows, nodes], `chosen` int64 [rows or 1, nodes]."""
        loads = by_group[rows[:, None, None], groups[chosen]]
        return shared_bounds(loads.flatten(2).flatten(0, 1), rank_slots).view(loads.shape[:2])

    means = by_group.sum(2)[:, groups].sum(2) / topology.ranks_per_node
    lowest, packing = means[:, every].amax(2).min(1)
    bound = of_nodes(torch.arange(len(by_group), device=device), every[packing]).amax(1)
    above = (bound > lowest * (1 + _EQUAL)).nonzero()[:, 0]
    for rows in torch.split(above, _ROWS_OF_ALL_NODES):
        of_node = of_nodes(rows, torch.arange(len(nodes), device=device)[None])
        bound[rows] = of_node[:, every].amax(2).amin(1)
    return bound


def _heaviest_node(group_load: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """A lower bound on the load of the heaviest node: [snapshots, layers, groups] to [snapshots, layers].

    Some node gets k + 1 of the k * nodes + 1 heaviest groups, and at best the lightest groups beside them.
    With two groups a node, pairing the heaviest with the lightest is optimal. For two nodes, all halves are
    tried if they are few.
    """
    num_groups = group_load.shape[2]
    if num_nodes == 2 and num_groups <= _MOST_HALVED:
        halves = list(combinations(range(1, num_groups), num_groups // 2 - 1))
        first = group_load.new_zeros(num_groups, len(halves))
        first[0] = 1.0
        for at, half in enumerate(halves):
            first[list(half), at] = 1.0
        node = group_load @ first
        return torch.maximum(node, group_load.sum(2, keepdim=True) - node).amin(2)
    group = group_load.sort(2, descending=True).values
    per_node = num_groups // num_nodes
    bound = group.sum(2) / num_nodes
    for k in range(per_node):
        rest = group[:, :, num_groups - (per_node - k - 1) :].sum(2)
        bound = torch.maximum(bound, group[:, :, k * num_nodes - k : k * num_nodes + 1].sum(2) + rest)
    if per_node == 2:
        bound = torch.maximum(bound, (group + group.flip(2)).amax(2))
    return bound


def _hottest_replica(load: torch.Tensor, num_slots: int) -> torch.Tensor:
    """The load of the hottest replica at the best replica counts: [..., experts] in `num_slots` to [...].

    Greedy replication attains it: a slot for the expert of the hottest replica is never wrong.
    """
    rows = load.flatten(0, -2)
    count = count_replicas(replicate(rows, num_slots), load.shape[-1])
    return (rows / count).amax(1).view(load.shape[:-1])
