"""The active ranks as a topology of their own: policies never see a dead rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..core.errors import TopologyError
from ..core.topology import Topology

__all__ = ["ActivePart", "active_part"]


@dataclass(frozen=True)
class ActivePart:
    """The part of a topology that can hold experts.

    Attributes:
        topology: of the ranks that are alive and have slots, in their order. It has one node if the nodes
            differ in active ranks.
        spans: the slots of each active rank in the whole topology; None if all ranks are active.
        rank_slots: usable slots of each rank of the whole topology, 0 for a dead one.
        num_slots: slots over all ranks, dead ones included.
    """

    topology: Topology
    spans: tuple[slice, ...] | None
    rank_slots: tuple[int, ...]
    num_slots: int

    def compact(self, ids: torch.Tensor) -> torch.Tensor:
        """[layers, slots] over all ranks to [layers, active slots]."""
        return ids if self.spans is None else torch.cat([ids[:, span] for span in self.spans], dim=1)

    def expand(self, ids: torch.Tensor) -> torch.Tensor:
        """[layers, active slots] to [layers, slots] over all ranks, -1 on dead ranks."""
        if self.spans is None:
            return ids
        every = ids.new_full((ids.shape[0], self.num_slots), -1)
        first = 0
        for span in self.spans:
            last = first + span.stop - span.start
            every[:, span] = ids[:, first:last]
            first = last
        return every


def active_part(
    topology: Topology, active_ranks: Sequence[bool] | torch.Tensor | None, num_logical: int
) -> ActivePart:
    """Leave out ranks that are dead by `active_ranks` (bool [ranks], None: all are alive) or have no slots.

    Raises:
        TopologyError: a malformed mask, no rank left, or fewer slots than `num_logical` experts.
    """
    alive = topology.living_ranks(active_ranks)
    topology.check_experts(num_logical)
    rank_slots = tuple(
        slots if lives else 0 for slots, lives in zip(topology.slots_by_rank, alive, strict=True)
    )
    kept = [rank for rank, slots in enumerate(rank_slots) if slots]
    if len(kept) == topology.num_ranks:
        return ActivePart(topology, None, rank_slots, topology.num_slots)
    num_slots = sum(rank_slots)
    if num_slots < num_logical:
        raise TopologyError(
            f"num_logical={num_logical} experts do not fit into the {num_slots} slots of the "
            f"{sum(alive)} living ranks of {topology.num_ranks}"
        )
    per_node = [0] * topology.num_nodes
    for rank in kept:
        per_node[rank // topology.ranks_per_node] += 1
    left = Topology(
        num_nodes=topology.num_nodes if len(set(per_node)) == 1 else 1,
        num_ranks=len(kept),
        num_slots=num_slots,
        num_groups=topology.num_groups,
        rank_slots=tuple(rank_slots[rank] for rank in kept),
    )
    spans = tuple(topology.slots_of_rank(rank) for rank in kept)
    return ActivePart(left, spans, rank_slots, topology.num_slots)
