"""The hierarchical policy: every group of experts within one node, where the numbers allow it."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..core.topology import Topology

__all__ = ["effective_topology", "groups_within_nodes"]


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
