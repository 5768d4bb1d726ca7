"""What every rebalance of a rank works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..config.options import PlannerOptions, RebalancerOptions
from ..core.placement import Placement
from ..core.topology import Topology
from ..dispatch.registry import Dispatch
from .connections import Channels
from .load_window import LoadWindow
from .verify.fingerprints import ExpertFingerprints
from .weights.expert_weights import ExpertWeights
from .weights.staging import Staging
from .weights.streams import DeviceOrder

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
    tables: Dispatch
    order: DeviceOrder
    switch: Callable[[int, torch.Tensor, tuple[torch.Tensor, torch.Tensor]], None]
