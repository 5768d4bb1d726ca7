"""Dispatch `balanced`: each batch is split anew over the replicas, so that all ranks finish together."""

from __future__ import annotations

import torch

from ..core.errors import TopologyError
from ..core.placement import Placement
from ..core.topology import Topology
from .batch_split import BatchSplit
from .tables import LayerTables, ReplicaTables

__all__ = ["BalancedDispatch"]


class BalancedDispatch(ReplicaTables):
    """The split of `balance_batch`, token by token.

    Args:
        placement: the placement in force.
        topology: number of slots.
        split: of the batches of this rank.

    Raises:
        TopologyError: the split is of other slots by rank.
    """

    def __init__(self, placement: Placement, topology: Topology, split: BatchSplit) -> None:
        if split.slots_by_rank != topology.slots_by_rank:
            raise TopologyError(
                f"the split is for {sum(split.slots_by_rank)} slots on {split.num_ranks} ranks, "
                f"the tables are for {topology.num_slots} on {topology.num_ranks}"
            )
        super().__init__(placement, topology, device=split.device)
        self._split = split

    def reserve(self, num_tokens: int) -> None:
        """Nothing to do: no buffer depends on the size of a batch."""

    def physical(self, layer: int, expert_ids: torch.Tensor) -> torch.Tensor:
        """The slot of each token, numbered over all ranks; shape and dtype of `expert_ids`.

        Where ranks have tokens of their own, all ranks call it together for each layer and batch, also ranks
        without tokens.

        Args:
            layer: index of the MoE layer.
            expert_ids: int32 or int64 [tokens, top_k] or [tokens], logical experts; -1 stays -1.

        Raises:
            LoadError: wrong shape, dtype or layer, or an id beyond the experts.
        """
        return self._split.slots(expert_ids, self._replicas(layer, expert_ids))

    def physical_and_received(
        self, layer: int, expert_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `physical`, and the tokens that this rank gets, see `BatchSplit.slots_and_received`."""
        return self._split.slots_and_received(expert_ids, self._replicas(layer, expert_ids))

    def _replicas(self, layer: int, expert_ids: torch.Tensor) -> LayerTables:
        self.check_ids(layer, expert_ids)
        return self.of_layer(layer)
