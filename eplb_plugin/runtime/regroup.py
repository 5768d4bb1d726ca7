"""What a smaller or larger group of ranks holds of the weights that the old one had in force."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.errors import TopologyError
from ..core.placement import Placement
from ..core.topology import Topology

__all__ = ["regroup"]


def regroup(
    placement: Placement,
    topology: Topology,
    ranks: Sequence[int | None],
    *,
    new_slots: int | None = None,
) -> torch.Tensor:
    """The slots of a new group in terms of the old one: what to start its `Rebalancer` from.

    Args:
        placement: in force when the old group ended.
        topology: of the old group.
        ranks: for each rank of the new group the rank that it was in the old one, None where it is new.
        new_slots: slots of each new rank; None is as many as every rank of the old group has.

    Returns:
        int64 [layers, slots of the new group], the logical expert in each slot; -1 in those of a new
        rank. Experts that only missing ranks held do not occur.

    Raises:
        TopologyError: a rank that the old group did not have, or one twice; new ranks without `new_slots`,
            where old ranks differ in slots.
        PlacementError: the placement does not fit the topology.
    """
    placement.validate(topology)
    known = [rank for rank in ranks if rank is not None]
    unknown = [rank for rank in known if not 0 <= rank < topology.num_ranks]
    if unknown or len(set(known)) < len(known) or not ranks:
        raise TopologyError(
            f"ranks={list(ranks)} are not ranks of an old group of {topology.num_ranks}, each once"
        )
    held = placement.physical_to_logical.cpu()
    if None in ranks and new_slots is None:
        new_slots = topology.slots_per_rank
    new = held.new_full((placement.num_layers, new_slots or 0), -1)
    return torch.cat([new if rank is None else held[:, topology.slots_of_rank(rank)] for rank in ranks], 1)
