"""A table of slots by rank and expert that is fair: the replicas of an expert serve equally many ranks.

SGLang's dispatch `static` sends all tokens that a rank has for an expert to one slot. Of 16 ranks with
equally many tokens, 3 replicas serve 5, 5 and 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.errors import LoadError, PlacementError
from ..core.placement import Placement
from ..core.topology import Topology

__all__ = ["FairTable", "fair_table"]


@dataclass(frozen=True)
class FairTable:
    """How many ranks each slot serves.

    Attributes:
        placement: the experts of the slots.
        sources: int64 [layers, slots], ranks that send their tokens to the slot. Over the slots of an expert:
            the number of ranks.
        topology: ranks and nodes.
    """

    placement: Placement
    sources: torch.Tensor
    topology: Topology

    @property
    def shares(self) -> torch.Tensor:
        """float64 [layers, slots], each slot's share of its expert's tokens."""
        return self.sources.double() / self.topology.num_ranks

    def of_rank(self, rank: int) -> torch.Tensor:
        """int64 [layers, logical], the slot that `rank` sends the tokens of each expert to.

        Each rank uses its own slot first. What a slot has left goes to the ranks of its node, then to others.
        Example: replicas on ranks 0 and 4 of 8, on two nodes. Each serves the four ranks of its node.
        """
        from .fair_kernels import assign_sources

        ids, topology = self.placement.physical_to_logical.numpy(), self.topology
        per_node = topology.num_ranks // topology.num_nodes
        arguments = topology.num_ranks, per_node, rank, self.placement.num_logical
        return torch.from_numpy(assign_sources(ids, self.sources.numpy(), *arguments))


def fair_table(placement: Placement, topology: Topology, load: torch.Tensor | None = None) -> FairTable:
    """The fair table for a placement. A pure function: the same on every rank.

    A replica serves floor or ceil of ranks / replicas, at most one rank more or fewer. Who serves more is
    chosen so that the rank loads come out level. Of several replicas on a rank, the first one serves for all:
    SGLang loads no weights into the others at the start.

    Args:
        placement: on the CPU, without empty slots.
        load: [layers, logical], tokens that are expected; None: all experts get the same.

    Raises:
        PlacementError: an empty slot, or another number of slots than in the topology. LoadError: `load` has
        another shape. TopologyError: ranks differ in slots.
    """
    ids, load = checked_inputs(placement, topology, load)
    from .fair_kernels import level_sources

    none = torch.zeros(len(ids), dtype=torch.bool).numpy()
    arguments = topology.num_ranks, 0, ids.numpy(), 0.0, 0.0, none
    sources = level_sources(ids.numpy(), load.numpy(), *arguments)
    return FairTable(placement, torch.from_numpy(sources), topology)


def checked_inputs(
    placement: Placement, topology: Topology, load: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """For the kernels, a copy of int64 [layers, slots], and float64 [layers, logical]; see `fair_table`."""
    placement.validate(topology)
    _ = topology.slots_per_rank
    if placement.has_empty_slots:
        raise PlacementError(f"{placement} has empty slots: no rank can send its tokens there")
    shape = placement.num_layers, placement.num_logical
    if load is None:
        load = torch.ones(shape, dtype=torch.float64)
    if tuple(load.shape) != shape:
        raise LoadError(f"load is {tuple(load.shape)}, the placement has layers and experts {shape}")
    return placement.physical_to_logical.cpu().clone(), load.to("cpu", torch.float64).contiguous()
