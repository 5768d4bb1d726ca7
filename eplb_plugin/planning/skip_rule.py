"""The skip rule: layers that would gain too little stay, and experts that stay on a rank keep their slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch

from ..core.load import sum_over_last
from ..core.placement import Placement
from ..core.topology import Topology
from .elastic import held_slots
from .hierarchy import groups_within_nodes
from .kernels.api import keep_slots, step_peaks

__all__ = ["Kept", "Peaks", "apply_skip_rule"]

Peaks: TypeAlias = Callable[[torch.Tensor, torch.Tensor, Topology], torch.Tensor]
"""The peak rank loads of a load under a placement, as `step_peaks`."""


class Kept(NamedTuple):
    """A placement after the skip rule."""

    physical_to_logical: torch.Tensor  # int64 [layers, slots]
    moves: int  # transfers of one expert's weights to one rank, over all layers
    shared_replicas: int  # replicas on a rank beside another of the same expert, over all layers


def apply_skip_rule(
    load: torch.Tensor,
    planned: torch.Tensor,
    current: Placement,
    topology: Topology,
    min_gain: float,
    peaks: Peaks = step_peaks,
) -> Kept:
    """Skip layers that would gain too little; in the others, experts that stay on a rank keep their slots.

    The gain of a layer is the rise of mean rank load / peak rank load, both summed over the snapshots.
    Example: from 0.900 to 0.901, the gain is 0.001. A layer is not skipped if it breaks a rule today: a group
    that spans nodes, or more replicas that share a rank than planned.

    Args:
        load: float64 [snapshots, layers, logical] on the CPU, the expected load.
        planned: int64 [layers, slots] on the CPU.
        current: the placement in force, completed, on the CPU.
        topology: as from `effective_topology`.
        min_gain: least gain of a layer that changes.
        peaks: the peak rank loads of a load under a placement: `step_peaks`, or `split_peaks`.
    """
    num_logical = load.shape[2]
    held, start = held_slots(current), current.physical_to_logical
    ids, moves, shared, shared_held = keep_slots(planned, held, topology, num_logical)
    # A layer that stays is completed all the same.
    if held is start:
        moves_start, shared_start = torch.zeros_like(moves), shared_held
    else:
        _, moves_start, shared_start, _ = keep_slots(start, held, topology, num_logical)

    gain = torch.zeros(load.shape[1], dtype=torch.float64, device="cpu")
    changed = (ids != start).any(1)
    if bool(changed.any()):
        part = load[:, changed]
        after, before = (peaks(part, x[changed], topology).sum(0) for x in (ids, start))
        mean = sum_over_last(part).sum(0) / topology.num_ranks
        gain[changed] = torch.where(mean > 0, mean / after - mean / before, 0.0)
    stays = (gain < min_gain) & (shared_start <= shared) & groups_within_nodes(start, num_logical, topology)
    return Kept(
        torch.where(stays[:, None], start, ids),
        int(torch.where(stays, moves_start, moves).sum()),
        int(torch.where(stays, shared_start, shared).sum()),
    )
