"""A planned placement meets the one in force: experts keep their slot, layers that gain too little stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.balancedness import rank_loads
from ..core.load import sum_over_last
from ..core.placement import Placement
from ..core.topology import Topology
from .anti_affinity import num_shared
from .compiled import keep_slots, step_peaks
from .hierarchy import groups_within_nodes

__all__ = ["Settled", "mean_balancedness", "settle"]


@dataclass(frozen=True)
class Settled:
    """What a plan comes to.

    Attributes:
        physical_to_logical: int64 [layers, slots].
        balancedness: of the load that was planned from, mean over its snapshots.
        moves: transfers of one expert's weights to one rank; 0 without a placement in force.
        shared_replicas: replicas that sit on a rank beside another of the same expert.
    """

    physical_to_logical: torch.Tensor
    balancedness: float
    moves: int
    shared_replicas: int


def settle(
    load: torch.Tensor,
    expected: torch.Tensor,
    ids: torch.Tensor,
    current: torch.Tensor | None,
    topology: Topology,
    min_gain: float,
    start: torch.Tensor | None = None,
) -> Settled:
    """Reorder the slots of each rank so that experts which it holds already stay where they are, and leave
    layers alone whose balancedness would rise by less than `min_gain`.

    What a layer gains is the rise of its mean rank load / peak rank load, both summed over the snapshots. A
    layer that breaks a rule today, by groups that span nodes or by replicas that share a rank, does not stay.

    Args:
        load: float64 [snapshots, layers, logical], what the balancedness is of.
        expected: float64 [any snapshots, layers, logical], what the gain of a layer is of.
        ids: int64 [layers, slots], the planned placement.
        current: int64 [layers, slots], the placement in force, or None; where `start` is given it may have
            empty slots (-1) and lack experts.
        topology: as from `effective_topology`.
        min_gain: the least rise, as a share.
        start: int64 [layers, slots], `current` completed, for the layers that stay; None is `current`.
    """
    totals = sum_over_last(load)
    if current is None:
        peaks = _step_peaks(load, ids, topology)
        shared = int(num_shared(ids, topology, load.shape[2]).sum())
        return Settled(ids, float(mean_balancedness(totals, peaks, topology)), 0, shared)
    num_logical = load.shape[2]
    on_host, moves, shared_after, shared_before = keep_slots(ids.cpu(), current.cpu(), topology, num_logical)
    moves_before = torch.zeros_like(moves)
    if start is not None:
        _, moves_before, shared_before, _ = keep_slots(start.cpu(), current.cpu(), topology, num_logical)
        current = start
    ids = on_host.to(load.device)
    after, before = (_step_peaks(expected, x, topology).sum(0) for x in (ids, current))
    mean = sum_over_last(expected).sum(0) / topology.num_ranks
    gain = torch.where(mean > 0, mean / after - mean / before, 0.0)
    stays = (gain < min_gain) & groups_within_nodes(current, num_logical, topology)
    stays &= (shared_before <= shared_after).to(load.device)
    stays_here = stays.cpu()
    ids = torch.where(stays[:, None], current, ids)
    peaks = _step_peaks(load, ids, topology)
    return Settled(
        ids,
        float(mean_balancedness(totals, peaks, topology)),
        int(torch.where(stays_here, moves_before, moves).sum()),
        int(torch.where(stays_here, shared_before, shared_after).sum()),
    )


def mean_balancedness(totals: torch.Tensor, step_peaks: torch.Tensor, topology: Topology) -> torch.Tensor:
    """`metrics.balancedness`, from total loads and peak rank loads, both [snapshots, layers]: float64 of no
    dimension, on their device."""
    peaks = step_peaks.sum(1)
    busy = peaks > 0
    shares = torch.where(busy, totals.sum(1) / topology.num_ranks / peaks, 0.0)
    return torch.where(busy.any(), shares.sum() / busy.sum(), 1.0)


def _step_peaks(load: torch.Tensor, ids: torch.Tensor, topology: Topology) -> torch.Tensor:
    """float64 [snapshots, layers]: the peak rank load, by the compiled kernel where that can be used."""
    if load.device.type == "cpu":
        return step_peaks(load, ids, topology)
    return rank_loads(load, Placement(ids, load.shape[2]), topology).amax(2)
