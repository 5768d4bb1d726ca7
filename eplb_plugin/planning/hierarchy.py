"""The pipeline of every plan from scratch: pack groups to nodes, replicate experts, pack replicas to ranks.

The steps are those of DeepSeek's EPLB; how each is done is given, so that the plain policy and the ensemble
share them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..core.topology import Topology

__all__ = ["Filler", "Packer", "effective_topology", "groups_within_nodes", "place_from_scratch"]

Packer = Callable[[torch.Tensor, int], torch.Tensor]
"""(weight [snapshots, X, n], num_packs) -> int64 [X, n], the items pack by pack."""

Filler = Callable[[torch.Tensor], torch.Tensor]
"""load [snapshots, X, n] of a node's experts -> int64 [X, slots of a node], which of them is in which."""


def effective_topology(topology: Topology, num_logical: int) -> Topology:
    """The topology to plan for: itself where the hierarchical policy fits, else one node and one group."""
    if topology.is_hierarchical(num_logical):
        return topology
    return replace(topology, num_nodes=1, num_groups=1)


def place_from_scratch(load: torch.Tensor, topology: Topology, pack: Packer, fill: Filler) -> torch.Tensor:
    """Plan without regard to any placement in force.

    Args:
        load: float64 [snapshots, layers, logical].
        topology: as from `effective_topology`.
        pack: packs groups to nodes.
        fill: hands out the slots of a node.

    Returns:
        physical_to_logical: int64 [layers, slots].
    """
    num_snapshots, num_layers, num_logical = load.shape
    nodes, groups = topology.num_nodes, topology.num_groups
    group_size = num_logical // groups

    # `in_node[l, x]` is the expert at place x when experts are listed node by node.
    order = pack(load.view(num_snapshots, num_layers, groups, group_size).sum(3), nodes)
    member = torch.arange(group_size, device=load.device)
    in_node = (order[:, :, None] * group_size + member).flatten(1)

    # A row is a node of a layer from here on.
    node_load = load.gather(2, in_node.expand(num_snapshots, -1, -1))
    placed = fill(node_load.reshape(num_snapshots, num_layers * nodes, num_logical // nodes))
    return in_node.view(num_layers * nodes, -1).gather(1, placed).view(num_layers, -1)


def groups_within_nodes(ids: torch.Tensor, num_logical: int, topology: Topology) -> torch.Tensor:
    """Whether each layer keeps every group within one node and gives no node more groups than its share, as
    every plan does: bool [layers]; empty slots (-1) break nothing."""
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
