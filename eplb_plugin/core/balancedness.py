"""How good a placement is for a load, and how far one placement is from another."""

from __future__ import annotations

import torch

from .errors import LoadError, PlacementError
from .load import as_snapshots
from .placement import Placement
from .topology import Topology

__all__ = [
    "balancedness",
    "balancedness_of_peaks",
    "count_moves",
    "filled_ranks",
    "peak_rank_loads",
    "rank_loads",
]


def rank_loads(
    load: torch.Tensor, placement: Placement, topology: Topology, shares: torch.Tensor | None = None
) -> torch.Tensor:
    """Load of every rank; 0 for an empty one.

    Args:
        load: [layers, logical] or [snapshots, layers, logical], tokens.
        placement: the placement to score.
        topology: gives the slots of each rank.
        shares: float64 [layers, slots], what each slot gets of its expert's tokens, 0 for an empty slot.
            None: all replicas of an expert get the same.

    Returns:
        float64 [snapshots, layers, ranks], tokens, on the device of `load`.

    Raises:
        LoadError: the load is malformed or its layers or experts differ from the placement's.
        PlacementError: the placement's slots differ from the topology's, or from those of `shares`.
    """
    load = as_snapshots(load)
    if load.shape[1:] != (placement.num_layers, placement.num_logical):
        raise LoadError(
            f"load has {load.shape[1]} layers of {load.shape[2]} experts, "
            f"the placement {placement.num_layers} of {placement.num_logical}"
        )
    placement.validate(topology)
    placement = placement.to(load.device)
    if shares is not None:
        return _shared_loads(load, placement, topology, shares.to(load.device))
    per_replica = load / placement.replica_count
    ids = placement.physical_to_logical
    if placement.has_empty_slots:
        # One more expert that nobody asks for, at the end, where -1 is found as well.
        per_replica = torch.cat([per_replica, per_replica.new_zeros(*load.shape[:2], 1)], dim=2)
        ids = torch.where(ids < 0, placement.num_logical, ids)
    return topology.by_rank(per_replica.gather(2, ids.expand(load.shape[0], -1, -1)), 0.0).sum(3)


def _shared_loads(
    load: torch.Tensor, placement: Placement, topology: Topology, shares: torch.Tensor
) -> torch.Tensor:
    ids = placement.physical_to_logical
    if shares.shape != ids.shape:
        raise PlacementError(f"shares are {tuple(shares.shape)}, layers and slots {tuple(ids.shape)}")
    tokens = load.gather(2, ids.clamp(min=0).expand(load.shape[0], -1, -1)) * shares
    return topology.by_rank(tokens, 0.0).sum(3)


def peak_rank_loads(load: torch.Tensor, placement: Placement, topology: Topology) -> torch.Tensor:
    """The load of the heaviest rank, float64 [snapshots, layers], tokens. Arguments as for `rank_loads`."""
    return rank_loads(load, placement, topology).amax(2)


def balancedness(
    load: torch.Tensor, placement: Placement, topology: Topology, shares: torch.Tensor | None = None
) -> float:
    """Sum over layers of the mean rank load / sum over layers of the max rank load; 1 is perfect.

    Of several snapshots: the mean of that over the snapshots that hold any tokens. A load without tokens
    gives 1. Ranks that hold nothing in any layer, since they failed or have no slots, are left out of the
    mean. Arguments and errors as for `rank_loads`.
    """
    loads = rank_loads(load, placement, topology, shares)
    if placement.has_empty_slots or not topology.is_even:
        loads = loads[:, :, filled_ranks(placement, topology).to(loads.device)]
    return balancedness_of_peaks(loads.mean(2), loads.amax(2))


def filled_ranks(placement: Placement, topology: Topology) -> torch.Tensor:
    """bool [ranks]: whether the rank holds an expert in any layer."""
    return topology.by_rank(placement.physical_to_logical >= 0, False).any(2).any(0)


def balancedness_of_peaks(mean: torch.Tensor, peak: torch.Tensor) -> float:
    """Balancedness from the mean and the peak rank load, both float64 [snapshots, layers], tokens.

    Two layers of mean 10 and 20 and peak 15 and 25: 30 / 40 = 0.75.
    """
    means, peaks = mean.sum(1), peak.sum(1)
    busy = peaks > 0
    return float((means[busy] / peaks[busy]).mean()) if bool(busy.any()) else 1.0


def count_moves(old: Placement, new: Placement, topology: Topology) -> torch.Tensor:
    """How many (rank, expert) pairs of each layer hold an expert that the rank did not hold before.

    Each is one transfer of that expert's weights, also where the rank gets it into several slots. A slot
    that becomes empty is no move.

    Returns:
        int64 [layers], on the device of `new`.

    Raises:
        PlacementError: the placements differ in shape, or from the topology's slots.
    """
    if (
        old.num_logical != new.num_logical
        or old.physical_to_logical.shape != new.physical_to_logical.shape
        or new.num_slots != topology.num_slots
    ):
        raise PlacementError(f"cannot compare {old} with {new} on {topology}")
    held_before = _held(old.to(new.device), topology)
    held_after = _held(new, topology)
    return (held_after & ~held_before).sum((1, 2))


def _held(placement: Placement, topology: Topology) -> torch.Tensor:
    """bool [layers, ranks, logical]: whether the rank holds the expert."""
    # Column 0 is for empty slots.
    ids = topology.by_rank(placement.physical_to_logical + 1, 0)
    held = torch.zeros((*ids.shape[:2], placement.num_logical + 1), dtype=torch.bool, device=ids.device)
    return held.scatter_(2, ids, True)[:, :, 1:]
