"""The pipeline of every plan from scratch: pack groups to nodes, replicate experts, pack replicas to ranks.

The three steps are those of DeepSeek's EPLB; the packer is given, so that the plain policy and the
ensemble share them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..topology import Topology
from .greedy import lpt_packing
from .replication import replica_slots, replicate

__all__ = ["Packer", "effective_topology", "groups_within_nodes", "place_from_scratch"]

Packer = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""(weight [snapshots, X, n], num_packs) -> (pack_index, rank_in_pack), both int64 [X, n]."""


def effective_topology(topology: Topology, num_logical: int) -> Topology:
    """The topology to plan for: itself where the hierarchical policy fits, else one node and one group."""
    if topology.is_hierarchical(num_logical):
        return topology
    return replace(topology, num_nodes=1, num_groups=1)


def place_from_scratch(
    load: torch.Tensor, topology: Topology, pack: Packer, spread_replicas: bool = True
) -> torch.Tensor:
    """Plan without regard to any placement in force.

    Args:
        load: float64 [snapshots, layers, logical].
        topology: as from `effective_topology`.
        pack: the packer of both packing steps; ranks that differ in slots are packed longest processing time
            first, whatever it is.
        spread_replicas: give no expert more replicas than it has ranks to spread over.

    Returns:
        physical_to_logical: int64 [layers, slots].
    """
    num_snapshots, num_layers, num_logical = load.shape
    nodes, groups = topology.num_nodes, topology.num_groups
    group_size = num_logical // groups

    # Groups to nodes. `in_node[l, x]` is the expert at place x when experts are listed node by node.
    group_load = load.view(num_snapshots, num_layers, groups, group_size).sum(3)
    node, place = pack(group_load, nodes)
    order = torch.empty_like(node).scatter_(
        1, node * (groups // nodes) + place, torch.arange(groups, device=load.device).expand_as(node)
    )
    member = torch.arange(group_size, device=load.device)
    in_node = (order[:, :, None] * group_size + member).flatten(1)

    # Replicas within each node; a row is a node of a layer from here on.
    node_load = load.gather(2, in_node.expand(num_snapshots, -1, -1))
    node_load = node_load.reshape(num_snapshots, num_layers * nodes, num_logical // nodes)
    slot_expert = replicate(
        node_load.sum(0), topology.slots_per_node, topology.ranks_per_node if spread_replicas else None
    )
    count = replica_slots(slot_expert, num_logical // nodes)
    share = (node_load / count).gather(2, slot_expert.expand(num_snapshots, -1, -1))

    # Replicas to ranks.
    width = topology.ranks_per_node
    if topology.is_even:
        rank, place = pack(share, width)
    else:
        rank, place = lpt_packing(share.sum(0), width, topology.slots_by_rank[:width])
    slot = torch.tensor(topology.first_slots[:width], device=load.device)[rank] + place
    placed = torch.empty_like(slot_expert).scatter_(1, slot, slot_expert)
    return in_node.view(num_layers * nodes, -1).gather(1, placed).view(num_layers, -1)


def groups_within_nodes(ids: torch.Tensor, num_logical: int, topology: Topology) -> torch.Tensor:
    """Whether each layer keeps every group within one node: bool [layers]; empty slots (-1) break nothing."""
    if topology.num_nodes == 1:
        return torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
    filled = ids >= 0
    group = ids.clamp(min=0) // (num_logical // topology.num_groups)
    node = torch.arange(topology.num_slots, device=ids.device) // topology.slots_per_node
    lowest = torch.full((ids.shape[0], topology.num_groups), topology.num_nodes, device=ids.device)
    lowest.scatter_reduce_(1, group, torch.where(filled, node, topology.num_nodes), "amin")
    return ((lowest.gather(1, group) == node) | ~filled).all(1)
