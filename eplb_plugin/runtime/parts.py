"""What every rebalance of a rank works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..config import PlannerOptions, RebalancerOptions
from ..placement import Placement
from ..topology import Topology
from ..window import LoadWindow
from .channels import Channels
from .dispatch import DispatchTables
from .fingerprints import ExpertFingerprints
from .staging import Staging
from .streams import DeviceOrder
from .weights import ExpertWeights

__all__ = ["Parts"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Parts:
    """Made once, when the loop starts.

    Attributes:
        start: the placement that the loop starts from.
        fingerprints: of the weights; None where nothing is verified.
        switch: puts one layer in force: its row, int64 [slots], and what the tables prepared for it.
    """

    topology: Topology
    planner: PlannerOptions
    options: RebalancerOptions
    channels: Channels
    start: Placement
    window: LoadWindow
    weights: ExpertWeights
    fingerprints: ExpertFingerprints | None
    staging: Staging
    tables: DispatchTables
    order: DeviceOrder
    switch: Callable[[int, torch.Tensor, tuple[torch.Tensor, torch.Tensor]], None]
