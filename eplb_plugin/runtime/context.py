"""What every rebalance of a rank works with, and the placement that it serves with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config.options import PlannerOptions, RebalancerOptions
from ..core.placement import Placement
from ..core.topology import Topology
from ..dispatch.registry import Dispatch
from .connections import Connections
from .load_window import LoadWindow
from .move_times import TransferTimes
from .recorder import Recorder
from .verify.fingerprints import ExpertFingerprints
from .weights.expert_weights import ExpertWeights
from .weights.staging import Staging
from .weights.streams import DeviceOrder

__all__ = ["Context", "PlacementInForce"]


class PlacementInForce:
    """The expert in each slot now, and the dispatch tables that follow from it. Changes layer by layer.

    The serving thread writes to it. The background reads it while no switch is due.

    Args:
        physical_to_logical: int64 [layers, slots] on the CPU; copied. -1 for an empty slot.
        num_logical: logical experts per layer.
        tables: what tokens are dispatched by.
    """

    def __init__(self, physical_to_logical: torch.Tensor, num_logical: int, tables: Dispatch) -> None:
        self.num_logical = num_logical
        self.tables = tables
        # Written by either thread, in inference mode or not: an inference tensor would refuse that.
        with torch.inference_mode(False):
            self.physical_to_logical = physical_to_logical.clone()
        self._placement: Placement | None = None

    @property
    def placement(self) -> Placement:
        """A copy that does not change."""
        placement = self._placement
        if placement is None:
            placement = self._placement = Placement(self.physical_to_logical, self.num_logical)
        return placement

    def switch(self, layer: int, row: torch.Tensor, prepared: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Put one layer in force, its weights being in place.

        `row`: int64 [slots], the expert in each. `prepared`: of this layer, from `tables.prepare`.
        """
        self.physical_to_logical[layer] = row
        self._placement = None
        self.tables.write(layer, prepared)


@dataclass(frozen=True, eq=False, kw_only=True)
class Context:
    """Made once, when the loop starts; see the classes of its attributes.

    Attributes:
        fingerprints: of all expert weights; None if nothing is verified.
        expert_cost: least cost of a replica in use, in tokens, for the dispatch `balanced`.
        recorder: writes intervals to a folder; None on all ranks but the first, and without `record`.
    """

    topology: Topology
    planner: PlannerOptions
    options: RebalancerOptions
    connections: Connections
    window: LoadWindow
    weights: ExpertWeights
    fingerprints: ExpertFingerprints | None
    staging: Staging
    in_force: PlacementInForce
    expert_cost: int
    streams: DeviceOrder
    transfer_times: TransferTimes
    recorder: Recorder | None
