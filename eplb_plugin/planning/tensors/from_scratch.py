"""The two policies that plan from scratch on tensors: plain and ensemble."""

from __future__ import annotations

from functools import partial

import torch

from ...config.options import PlannerOptions
from ...core.topology import Topology
from ..exact import to_exact
from ..greedy import lpt_packing
from ..hierarchy import place_from_scratch
from ..replica_counts import replica_slots, replicate
from .packing import best_packing

__all__ = ["place_by_ensemble", "place_greedily"]

_VARIANTS = 4  # of replica counts that are packed


def place_greedily(load: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Greedy replication and LPT with capacity on the summed load: the algorithm of engines today.

    Args:
        load: float64 [snapshots, layers, logical].
        topology: as from `effective_topology`.

    Returns:
        physical_to_logical: int64 [layers, slots].
    """
    return place_from_scratch(
        load.sum(0, keepdim=True), topology, _pack_plainly, partial(_fill_plainly, topology=topology)
    )


def place_by_ensemble(load: torch.Tensor, topology: Topology, options: PlannerOptions) -> torch.Tensor:
    """The best of many packings, for ranks with equal slots.

    The same placement on every device: all is computed from whole numbers. Nothing waits for the device.

    Args:
        load: float64 [snapshots, layers, logical], weighted by snapshot.
        topology: as from `effective_topology`.
        options: candidates, rounds, objective, memory bound and seed.

    Returns:
        physical_to_logical: int64 [layers, slots].
    """
    return place_from_scratch(
        to_exact(load),
        topology,
        partial(_pack_groups, options=options),
        partial(_fill_with_the_best, topology=topology, options=options),
    )


def _pack_plainly(weight: torch.Tensor, num_packs: int) -> torch.Tensor:
    pack, place = lpt_packing(weight.sum(0), num_packs)
    item = torch.arange(weight.shape[2], device=weight.device).expand_as(pack)
    return torch.empty_like(pack).scatter_(1, pack * (weight.shape[2] // num_packs) + place, item)


def _fill_plainly(node_load: torch.Tensor, topology: Topology) -> torch.Tensor:
    slot_expert = replicate(node_load.sum(0), topology.slots_per_node)[:, 0]
    count = replica_slots(slot_expert, node_load.shape[2])
    share = (node_load.sum(0) / count).gather(1, slot_expert)
    width = topology.ranks_per_node
    if topology.is_even:
        rank, place = lpt_packing(share, width)
        slot = rank * topology.slots_per_rank + place
    else:
        rank, place = lpt_packing(share, width, topology.slots_by_rank[:width])
        slot = torch.tensor(topology.first_slots[:width], device=share.device)[rank] + place
    return torch.empty_like(slot_expert).scatter_(1, slot, slot_expert)


def _pack_groups(weight: torch.Tensor, num_packs: int, options: PlannerOptions) -> torch.Tensor:
    # Sums of whole numbers, which no sum over all of them makes too large.
    items, _ = best_packing(weight[:, :, None], None, num_packs, options)
    return items


def _fill_with_the_best(node_load: torch.Tensor, topology: Topology, options: PlannerOptions) -> torch.Tensor:
    """Greedy counts, and those where no expert has more than one, two or three fewer than the greedy most.

    Greedy counts have the lowest hottest replica; but where replicas of two hot experts have to share a rank,
    fewer of the first and more of the second may do better.
    """
    snapshots, rows, num_experts = node_load.shape
    slots, width = topology.slots_per_node, topology.ranks_per_node
    variants = min(_VARIANTS, options.num_candidates) if width > 1 and slots > num_experts else 1
    slot_expert = replicate(node_load.sum(0), slots, width, variants)
    flat = slot_expert.flatten(0, 1)
    count = replica_slots(flat, num_experts).view(rows, -1, num_experts)
    share = (node_load[:, :, None] / count).gather(3, slot_expert.expand(snapshots, -1, -1, -1))
    exact = to_exact(share.flatten(2)).view_as(share)
    items, variant = best_packing(exact, slot_expert, width, options)
    chosen = slot_expert.gather(1, variant[:, None, None].expand(-1, 1, slots))[:, 0]
    return chosen.gather(1, items)
