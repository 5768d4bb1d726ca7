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

    Compiling takes half a minute to a minute and a half, by the machine, once for each version and place of
    the package; loading takes about a second.

    Args:
        topology: plan for it too, so that everything which that plan needs is loaded; a small one with
            several nodes always is.
    """
    small = Topology(num_nodes=2, num_ranks=4, num_slots=12, num_groups=2)
    for each in (small,) if topology is None else (small, topology):
        _plan_each_way(each)


def _plan_each_way(topology: Topology) -> None:
    """Plan in each of the ways that the online loop may."""
    num_logical = topology.num_groups * max(1, topology.num_slots // (2 * topology.num_groups))
    num_logical = min(num_logical, topology.num_slots)
    load = torch.arange(1, num_logical + 1, dtype=torch.float64).expand(2, 1, -1)
    current = Placement.default(1, num_logical, topology.num_slots)
    _ = plan(load, topology).lower_bound
    plan(load, topology, current)
    # Where moves are free a plan from scratch is compared too, for which scipy is imported.
    plan(load, topology, current, PlannerOptions(move_price=0))
