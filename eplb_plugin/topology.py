"""How many nodes, ranks, slots and groups there are, checked once and frozen."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import TopologyError

__all__ = ["Topology"]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The expert-parallel group: `num_slots` slots in order over `num_ranks` ranks over `num_nodes` nodes.

    Attributes:
        num_ranks: ranks (GPUs) in the expert-parallel group.
        num_slots: physical experts over all ranks; every rank holds `num_slots / num_ranks` of them.
        num_nodes: nodes; node `k` holds ranks `k * num_ranks / num_nodes` and following.
        num_groups: groups of logical experts in each layer (1 where routing is not group-limited).

    Raises:
        TopologyError: a number is not a positive integer, or ranks or slots do not divide evenly.
    """

    num_nodes: int = 1
    num_ranks: int
    num_slots: int
    num_groups: int = 1

    def __post_init__(self) -> None:
        for name in ("num_nodes", "num_ranks", "num_slots", "num_groups"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TopologyError(f"{name}={value!r} is not an integer")
            if value < 1:
                raise TopologyError(f"{name}={value} is below 1")
        if self.num_ranks % self.num_nodes:
            raise TopologyError(f"num_ranks={self.num_ranks} is not divisible by num_nodes={self.num_nodes}")
        if self.num_slots % self.num_ranks:
            raise TopologyError(f"num_slots={self.num_slots} is not divisible by num_ranks={self.num_ranks}")

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes

    @property
    def slots_per_node(self) -> int:
        return self.num_slots // self.num_nodes

    def is_hierarchical(self, num_logical: int) -> bool:
        """Whether groups can be packed to nodes: nodes divide groups and groups divide experts."""
        return self.num_groups % self.num_nodes == 0 and num_logical % self.num_groups == 0

    def check_experts(self, num_logical: int) -> None:
        """Raise TopologyError if `num_logical` experts cannot each have a slot."""
        if num_logical < 1:
            raise TopologyError(f"num_logical={num_logical} is below 1")
        if num_logical > self.num_slots:
            raise TopologyError(
                f"num_logical={num_logical} experts do not fit into num_slots={self.num_slots}"
            )

    def rank_of_slot(self, device: torch.device | str | None = None) -> torch.Tensor:
        """The rank of every slot: int64 [slots]."""
        return torch.arange(self.num_slots, device=device) // self.slots_per_rank

    def slots_of_rank(self, rank: int) -> slice:
        """The slots of `rank`, as a slice of any slot axis."""
        if not 0 <= rank < self.num_ranks:
            raise TopologyError(f"rank={rank} is outside 0..{self.num_ranks - 1}")
        return slice(rank * self.slots_per_rank, (rank + 1) * self.slots_per_rank)
