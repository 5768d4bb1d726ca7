"""The pipeline of a plan from scratch: groups to nodes, replica counts, replicas to ranks.

The three steps are those of DeepSeek's EPLB. The policies that use it differ in how they pack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeAlias

import torch

from ..core.topology import Topology
from .replica_counts import count_replicas, replicate

__all__ = ["Packer", "place_from_scratch"]

Packer: TypeAlias = Callable[[torch.Tensor, Sequence[int], torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(weight [X, n], items of each pack, expert [X, n]) -> (pack_index, rank_in_pack), both int64 [X, n].

Two items of one expert should not share a pack."""


def place_from_scratch(
    load: torch.Tensor, topology: Topology, pack: Packer, max_replicas: int | None = None
) -> torch.Tensor:
    """Plan without regard to any placement in force: int64 [layers, slots].

    Args:
        load: float64 [layers, logical], tokens, on any device.
        topology: as from `effective_topology`.
        pack: packs groups to nodes, and replicas to the ranks of a node.
        max_replicas: most replicas of one expert, see `replicate`.
    """
    layers, num_logical = load.shape
    nodes, groups, width = topology.num_nodes, topology.num_groups, topology.ranks_per_node

    # 1. Pack groups to nodes; `expert` [layers * nodes, experts of a node] lists the members of each node.
    each = torch.arange(groups, device=load.device).expand(layers, -1)
    node, place = pack(load.view(layers, groups, -1).sum(2), (groups // nodes,) * nodes, each)
    group = _inverse(node * (groups // nodes) + place)
    member = torch.arange(num_logical // groups, device=load.device)
    expert = (group[:, :, None] * len(member) + member).view(layers * nodes, -1)
    weight = load.gather(1, expert.view(layers, -1)).view_as(expert)

    # 2. Replicate the experts of each node into its slots.
    replica = replicate(weight, topology.slots_per_node, max_replicas)
    share = (weight / count_replicas(replica, expert.shape[1])).gather(1, replica)

    # 3. Pack the replicas of each node to its ranks.
    capacities = topology.slots_by_rank[:width]
    rank, place = pack(share, capacities, replica)
    first_slot = torch.tensor([0, *accumulate(capacities[:-1])], device=load.device)
    in_slot = replica.gather(1, _inverse(first_slot[rank] + place))
    return expert.gather(1, in_slot).view(layers, -1)


def _inverse(permutation: torch.Tensor) -> torch.Tensor:
    """The inverse of each row of int64 [X, n]."""
    index = torch.arange(permutation.shape[1], device=permutation.device).expand_as(permutation)
    return torch.empty_like(permutation).scatter_(1, permutation, index)
