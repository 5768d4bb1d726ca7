"""Compile before serving, so that no compilation falls into the first rebalance."""

from __future__ import annotations

import torch

from ..config.options import PlannerOptions
from ..core.placement import Placement
from ..core.topology import Topology
from .planner import plan

__all__ = ["warmup"]


def warmup(topology: Topology | None = None) -> None:
    """Compile whatever the first plan would compile, or load it from the cache on disk.

    Compiling takes 30 to 90 seconds, once for each version and location of the package. Loading takes about
    one second.

    Args:
        topology: planned for as well, so that everything its plans need is loaded; None plans for a small
            topology of several nodes alone.
    """
    small = Topology(num_nodes=2, num_ranks=4, num_slots=12, num_groups=2)
    for each in (small,) if topology is None else (small, topology):
        _plan_once(each)


def _plan_once(topology: Topology) -> None:
    """Plan from scratch, from a placement in force, and from both."""
    num_logical = topology.num_groups * max(1, topology.num_slots // (2 * topology.num_groups))
    num_logical = min(num_logical, topology.num_slots)
    load = torch.arange(1, num_logical + 1, dtype=torch.float64).expand(2, 1, -1)
    current = Placement.default(1, num_logical, topology.num_slots)
    _ = plan(load, topology).lower_bound
    plan(load, topology, current)
    # With free moves, a plan from scratch is matched to the placement in force, which imports scipy.
    plan(load, topology, current, PlannerOptions(move_price=0))
