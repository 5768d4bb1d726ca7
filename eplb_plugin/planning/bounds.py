"""What no placement can beat: lower bounds on the peak rank load."""

from __future__ import annotations

import torch

from ..topology import Topology
from .replication import replica_slots, replicate

__all__ = ["peak_lower_bound"]


def peak_lower_bound(load: torch.Tensor, topology: Topology) -> torch.Tensor:
    """A lower bound on the peak rank load of every layer, mean over the snapshots.

    Per snapshot the largest of: the mean rank load; the smallest T with sum over experts of
    ceil(load / T) <= slots, since some replica carries that much whatever the replica counts are; and, where
    groups stay within nodes, the mean rank load of a node that holds the heaviest group and the lightest
    others.

    Args:
        load: float64 [snapshots, layers, logical], tokens.
        topology: as from `effective_topology`.

    Returns:
        float64 [layers], tokens.
    """
    num_snapshots, num_layers, _ = load.shape
    bound = torch.maximum(load.sum(2) / topology.num_ranks, _hottest_replica(load, topology.num_slots))
    if topology.num_nodes > 1:
        per_node = topology.num_groups // topology.num_nodes
        group = load.view(num_snapshots, num_layers, topology.num_groups, -1).sum(3).sort(2).values
        node = group[:, :, -1] + group[:, :, : per_node - 1].sum(2)
        bound = torch.maximum(bound, node / topology.ranks_per_node)
    return bound.mean(0)


def _hottest_replica(load: torch.Tensor, num_slots: int) -> torch.Tensor:
    """The load of the hottest replica when it is as low as counts allow: float64 [snapshots, layers].

    Greedy replication attains that smallest T: giving a slot to the hottest replica's expert is never wrong.
    """
    rows = load.reshape(-1, load.shape[2])
    count = replica_slots(replicate(rows, num_slots), load.shape[2])
    return (rows / count).amax(1).view(load.shape[:2])
