"""Where a placement puts the replicas of its experts: repeats on a rank, all on one rank, all on one node."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.placement import Placement
from ..core.topology import Topology
from ..planning.anti_affinity import shared_replicas

__all__ = ["ReplicaSpread", "replica_spread"]


@dataclass(frozen=True, eq=False)
class ReplicaSpread:
    """Counts by layer: int64 [layers], on the CPU.

    Attributes:
        spare: slots beyond one for each expert; empty slots are not counted.
        repeats: slots whose expert sits in a lower slot of the same rank too. They relieve no rank.
        on_one_rank: experts with several replicas, all on one rank.
        on_one_node: experts with several replicas, all on one node; equal to `replicated` with one node.
        replicated: experts with several replicas.
        empty: slots without an expert.
        replica_count: int64 [layers, logical], replicas of each expert.
    """

    spare: torch.Tensor
    repeats: torch.Tensor
    on_one_rank: torch.Tensor
    on_one_node: torch.Tensor
    replicated: torch.Tensor
    empty: torch.Tensor
    replica_count: torch.Tensor


def replica_spread(placement: Placement, topology: Topology) -> ReplicaSpread:
    """Count repeats and experts whose replicas stay together.

    Example: experts 0, 1 on rank 0 and 1, 1 on rank 1 have two spare slots, and one of them is a repeat.

    Raises:
        PlacementError: the placement's slots differ from the topology's.
    """
    placement.validate(topology)
    placement = placement.to("cpu")
    ids, count = placement.physical_to_logical, placement.replica_count
    empty = ids < 0
    rank = topology.rank_of_slot()
    several = count > 1
    return ReplicaSpread(
        spare=count.sum(1) - placement.num_logical,
        repeats=(shared_replicas(ids, topology) & ~empty).sum(1),
        on_one_rank=(several & _within_one(ids, rank, placement.num_logical)).sum(1),
        on_one_node=(several & _within_one(ids, rank // topology.ranks_per_node, placement.num_logical)).sum(
            1
        ),
        replicated=several.sum(1),
        empty=empty.sum(1),
        replica_count=count,
    )


def _within_one(ids: torch.Tensor, part: torch.Tensor, num_logical: int) -> torch.Tensor:
    """bool [layers, logical]: whether all slots of an expert are in one part (rank or node).

    Args:
        ids: int64 [layers, slots], -1 for an empty slot.
        part: int64 [slots], part of each slot.
    """
    part = part.expand_as(ids)
    # Empty slots are counted in column 0 and cut off.
    column = ids + 1
    lowest = part.new_full((len(ids), num_logical + 1), len(part[0]))
    highest = part.new_full((len(ids), num_logical + 1), -1)
    lowest.scatter_reduce_(1, column, part, "amin")
    highest.scatter_reduce_(1, column, part, "amax")
    return (lowest == highest)[:, 1:]
