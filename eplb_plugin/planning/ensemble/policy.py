"""The policy `ensemble`: three steps from scratch, packed by the ensemble packer, replicas then set apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...config.options import PlannerOptions
from ...core.errors import TopologyError
from ...core.placement import Placement
from ...core.topology import Topology
from ..anti_affinity import set_replicas_apart
from ..exact import to_exact
from ..pipeline import place_from_scratch
from .packing import pack_items

__all__ = ["Ensemble"]


@dataclass(frozen=True)
class Ensemble:
    """Plans from the summed load, on its device, whatever is in force. It needs equal slots on every rank."""

    options: PlannerOptions

    def __call__(self, window: torch.Tensor, topology: Topology, current: Placement | None) -> Placement:
        if not topology.is_even:
            raise TopologyError(
                f"policy='ensemble' plans ranks with equal slots only, not {topology.rank_slots}; "
                "'adaptive' plans any"
            )
        # Whole numbers: the sums of a group are then the same on every device.
        load = to_exact(window).sum(0)
        ids = place_from_scratch(load, topology, self._pack, max_replicas=topology.ranks_per_node)
        ids = set_replicas_apart(ids.cpu(), load[None].cpu(), topology)
        return Placement(ids.to(window.device), window.shape[2])

    def _pack(
        self, weight: torch.Tensor, capacities: Sequence[int], expert: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return pack_items(weight, len(capacities), expert, self.options.ensemble)
