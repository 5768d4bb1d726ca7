"""A plan from scratch on the device of the load, with one look at it from the host.

Everything is computed without knowing whether the load is one at all; then a handful of numbers are copied
to the host together, and say so. On a GPU each look waits for all that was launched before it.
"""

from __future__ import annotations

import torch

from ...config.options import PlannerOptions
from ...core.load import check_values, zero_if_bad
from ...core.placement import Placement
from ...core.topology import Topology
from ..active_ranks import Living
from ..anti_affinity import shared_replicas
from ..forecast import expected_load
from ..replica_counts import replica_slots
from ..skip_rule import Settled, mean_balancedness
from .from_scratch import place_by_ensemble, place_greedily
from .host_waits import look

__all__ = ["plan_with_one_look"]


def plan_with_one_look(
    load: torch.Tensor, topology: Topology, living: Living, options: PlannerOptions
) -> tuple[Placement, Settled]:
    """Plan by tensor operations alone.

    Args:
        load: float64 [snapshots, layers, logical] from `to_snapshots`, any device.
        topology: as from `effective_topology`.
        living: the ranks that the topology was made of.
        options: policy, effort and seed.

    Returns:
        The placement over all ranks, and what it comes to on the living ones.

    Raises:
        LoadError: NaN, infinite or negative values, or some too large to be added up.
    """
    num_logical = load.shape[2]
    usable, least, most = zero_if_bad(load)
    if options.policy == "greedy":
        ids = place_greedily(usable, topology)
    else:
        expected = expected_load(usable, options.snapshot_decay, options.persistence)
        ids = place_by_ensemble(expected, topology, options)
    count = replica_slots(ids, num_logical)
    placed = (usable / count).gather(2, ids.expand(load.shape[0], -1, -1))
    peaks = topology.by_rank(placed, 0.0).sum(3).amax(2)
    balance = mean_balancedness(usable.sum(2), peaks, topology)
    shared = shared_replicas(ids, topology).sum()
    every = living.expand(ids)

    seen = torch.stack([least, most, balance, shared.double(), count.amax().double()])
    least_seen, most_seen, balancedness, num_shared, max_replicas = look(seen)
    check_values(load, least_seen, most_seen)
    placement = Placement.known_valid(every, num_logical, int(max_replicas))
    return placement, Settled(ids, balancedness, 0, int(num_shared))
