"""A table of slots by rank and expert that is fair: the replicas of an expert serve equally many ranks.

SGLang's dispatch `static` sends all tokens that a rank has for an expert to one slot. Of 16 ranks with
equally many tokens, 3 replicas serve 5, 5 and 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config.options import PlannerOptions
from ..core.balancedness import rank_loads
from ..core.errors import LoadError, PlacementError, TopologyError
from ..core.load import as_snapshots
from ..core.placement import Placement
from ..core.topology import Topology
from .anti_affinity import shared_replicas
from .hierarchy import effective_topology, groups_within_nodes

__all__ = ["FairTable", "fair_table", "plan_fair_table"]

_TOLERANCE = 0.01  # a layer is changed only if its peak is this far above that of the even split


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

        Each rank uses its own slot first, if that serves any. What a slot has left goes to the ranks of its
        node, then to others. Example: replicas on ranks 0 and 4 of 8, on two nodes. Each serves the four
        ranks of its node.

        Raises:
            TopologyError: there is no such rank.
        """
        from .kernels.fair_search import assign_sources

        if not 0 <= rank < self.topology.num_ranks:
            raise TopologyError(f"rank {rank} is not among {self.topology.num_ranks} ranks")
        ids, topology = self.placement.physical_to_logical.numpy(), self.topology
        per_node = topology.num_ranks // topology.num_nodes
        arguments = topology.num_ranks, per_node, rank, self.placement.num_logical
        return torch.from_numpy(assign_sources(ids, self.sources.numpy(), *arguments))


def fair_table(placement: Placement, topology: Topology, load: torch.Tensor | None = None) -> FairTable:
    """The fair table for a placement. A pure function: the same on every rank.

    A replica serves floor or ceil of ranks / replicas, or one rank beyond these. Who serves more is chosen so
    that the rank loads come out level. Of several replicas on a rank, the first one serves for all:
    SGLang loads no weights into the others at the start.

    Args:
        placement: on the CPU, without empty slots.
        load: [layers, logical], tokens that are expected; None: all experts get the same.

    Raises:
        PlacementError: an empty slot, or another number of slots than in the topology. LoadError: `load` has
        another shape, or NaN, infinite or negative values. TopologyError: ranks differ in slots.
    """
    ids, load = _checked_inputs(placement, topology, load)
    from .kernels.fair_search import level_sources

    sources = torch.from_numpy(level_sources(ids.numpy(), load.numpy(), topology.num_ranks))
    return FairTable(placement, sources, topology)


def plan_fair_table(
    load: torch.Tensor,
    topology: Topology,
    planned: Placement,
    in_force: Placement | None,
    options: PlannerOptions,
) -> FairTable:
    """The fair table for a plan for the even split; where it costs over 1 %, experts change slots for it.

    Example: an expert with 75 % of all tokens has 13 replicas on 16 ranks. Three of them serve two ranks, 1.5
    times the mean rank load. With 16 replicas each serves one.

    Args:
        load: [layers, logical], tokens that are expected.
        planned: for the even split.
        in_force: what moves are counted from; None: no placement is, and moves are free. A layer keeps it
            where it gains too little by its table.
        options: with `move_price`, `min_gain` and `max_moves`. A bound on moves is kept by the plan: nothing
            changes for the table then.

    Returns:
        The table, with the placement to go to.

    Raises:
        As `fair_table`. PlacementError: `in_force` has an empty slot, or another shape than `planned`.
    """
    if in_force is not None:
        _check_alike(planned, in_force)
    if options.max_moves is not None:
        return fair_table(planned, topology, load)
    ids, load = _checked_inputs(planned, topology, load)
    from .kernels.fair_search import level_by_exchanges

    # Groups stay within their nodes.
    width = topology.num_ranks // effective_topology(topology, planned.num_logical).num_nodes
    held = planned if in_force is None else in_force
    price = 0.0 if in_force is None else options.known_price
    arguments = topology.num_ranks, width, held.physical_to_logical.cpu().numpy(), price, _TOLERANCE
    sources = torch.from_numpy(level_by_exchanges(ids.numpy(), load.numpy(), *arguments))
    made = FairTable(Placement(ids, planned.num_logical), sources, topology)
    if in_force is None:
        return made
    # Both with tables made in the same way: else two placements could each gain over the other.
    kept = fair_table(in_force, topology, load)
    tables = kept, fair_table(made.placement, topology, load)
    peaks = [rank_loads(load, each.placement, topology, each.shares)[0].amax(1) for each in tables]
    mean = load.sum(1) / topology.num_ranks
    gain = torch.where(mean > 0, mean / peaks[1] - mean / peaks[0], 0.0)
    stays = (gain < options.min_gain) | (gain <= 0)
    stays &= _keeps_rules(in_force, made.placement, effective_topology(topology, planned.num_logical))
    placement = made.placement.with_layers(stays, in_force)
    return FairTable(placement, torch.where(stays[:, None], kept.sources, sources), topology)


def _keeps_rules(in_force: Placement, made: Placement, topology: Topology) -> torch.Tensor:
    """Layers with groups within nodes, and no more replicas that share ranks than `made`: bool [layers]."""
    start, end = (each.physical_to_logical.cpu() for each in (in_force, made))
    shared = [shared_replicas(ids, topology).sum(1) for ids in (start, end)]
    return groups_within_nodes(start, made.num_logical, topology) & (shared[0] <= shared[1])


def _checked_inputs(
    placement: Placement, topology: Topology, load: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """For the kernels, a copy of int64 [layers, slots], and float64 [layers, logical]; see `fair_table`."""
    placement.validate(topology)
    _ = topology.slots_per_rank
    if placement.has_empty_slots:
        raise PlacementError(f"{placement} has empty slots: no rank can send its tokens there")
    shape = placement.num_layers, placement.num_logical
    tokens = as_snapshots(torch.ones(shape) if load is None else load).cpu()
    if load is not None and tuple(load.shape) != shape:
        raise LoadError(f"load is {tuple(load.shape)}, the placement has layers and experts {shape}")
    return placement.physical_to_logical.cpu().clone(), tokens[0]


def _check_alike(planned: Placement, in_force: Placement) -> None:
    """Raise PlacementError if the placement in force has an empty slot or another shape."""
    numbers = [(each.num_layers, each.num_slots, each.num_logical) for each in (in_force, planned)]
    if numbers[0] != numbers[1]:
        raise PlacementError(f"layers, slots and experts in force are {numbers[0]}, planned {numbers[1]}")
    if in_force.has_empty_slots:
        raise PlacementError(f"{in_force} in force has empty slots: no rank sends its tokens there")
